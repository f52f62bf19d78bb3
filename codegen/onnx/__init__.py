"""ONNX: a routed model as one file, its routing done by operators of the standard opset."""
