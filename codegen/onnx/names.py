"""Names of inputs, outputs and open sizes, as clients of exported models expect them.

Causal language models follow Hugging Face Optimum: ``input_ids``, ``attention_mask``,
``position_ids``, ``past_key_values.N.key`` and ``.value`` in, ``logits``, ``present.N.key`` and
``.value`` out. Others keep the names of their arguments and of their output's fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.runtime.calling import CallSpec, CausalCall
from sparsify.runtime.trees import leaf_names

BATCH, TOKENS, PAST = "batch_size", "sequence_length", "past_sequence_length"
WHOLE = f"{PAST} + {TOKENS}"


def input_names(call: CallSpec) -> list[str]:
    """One per flat input."""
    if not isinstance(call, CausalCall):
        return [slot.name for slot in call.slots]
    plain = [slot.name for slot in call.slots[: len(call.slots) - 2 * len(call.layers)]]
    return [*plain, *_cache("past_key_values", len(call.layers))]


def output_names(call: CallSpec) -> list[str]:
    """One per flat output."""
    if isinstance(call, CausalCall):
        return ["logits", *_cache("present", len(call.layers))]
    names = [name.strip("_") or "output" for name in leaf_names(call.output, "")]
    taken = set(input_names(call))
    return [f"output_{n}" if n in taken or n[0].isdigit() else n for n in names]


def _cache(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def size_names(call: CallSpec, shapes: Sequence[Sequence[Any]]) -> dict[str, str]:
    """The exporter's symbol -> a name that says what the size is.

    Args:
        shapes: of the inputs, sizes as numbers or symbols' texts.
    """
    found: dict[str, str] = {}
    cached = 2 * len(call.layers) if isinstance(call, CausalCall) else 0
    for number, (slot, shape) in enumerate(zip(call.slots, shapes, strict=True)):
        for axis, size in enumerate(shape):
            if isinstance(size, int) or not re.fullmatch(r"\w+", str(size)) or str(size) in found:
                continue
            if isinstance(call, CausalCall):
                roles = {0: BATCH, 2: PAST} if number >= len(shapes) - cached else {
                    0: BATCH, 1: WHOLE if slot.name == "attention_mask" and cached else TOKENS,
                }  # fmt: skip
                found[str(size)] = roles.get(axis, f"{slot.name}_{axis}")
            else:
                known = BATCH not in found.values() and axis == 0
                found[str(size)] = BATCH if known else f"{slot.name}_{axis}"
    return found


def renamed(size: str, names: Mapping[str, str]) -> str:
    """The text of a size, its symbols named; sums of past and new tokens in one order."""
    text = re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), size)
    return WHOLE if text in (f"{TOKENS} + {PAST}", f"{PAST} + {TOKENS}") else text
