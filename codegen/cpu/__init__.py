"""CPU kernels: C made from the routed ops, compiled at first use by the system's compiler."""
