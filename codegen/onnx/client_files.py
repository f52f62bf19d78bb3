"""A folder that clients of exported language models load: the model, and what they read beside it.

* Optimum's ``ORTModelForCausalLM.from_pretrained(FOLDER)`` reads ``config.json`` and
  ``generation_config.json``; transformers writes both, and the tokenizer's files.
* onnxruntime-genai's ``Model(FOLDER)`` reads ``genai_config.json``, written here.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.codegen.onnx.custom.files import beside as libraries
from sparsify.codegen.onnx.names import input_names, output_names
from sparsify.codegen.onnx.write import MODEL, check_folder
from sparsify.errors import OutputError
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.files import new_folder, write_json
from sparsify.runtime.model import SparseModel

GENAI = "genai_config.json"


def in_folder(
    model: SparseModel, path: str | os.PathLike[str], force: bool, export: Callable[[Path], Any]
) -> Any:
    """What ``export`` wrote into the folder ``path``, client files beside it; all or nothing.

    Raises:
        OutputError: the folder holds something (``force`` replaces one with a ``model.onnx``), or
            cannot be written.
    """
    folder = Path(path)
    check_folder(folder, force=force)
    with new_folder(folder, marker=MODEL, force=force) as fresh:
        try:
            found = export(fresh / MODEL)
        except OutputError as error:  # it names the folder that is gone
            raise OutputError(f"cannot write {folder}", why=error.why, help=error.help) from error
        written = {file.name for file in found.files}
        _write(model, fresh)
        beside = sorted(file.name for file in fresh.iterdir() if file.name not in written)
    files = tuple(folder / file.name for file in found.files)
    return dataclasses.replace(found, files=files, beside=tuple(beside))


def _write(model: SparseModel, folder: Path) -> None:
    """config.json, generation_config.json, tokenizer files and genai_config.json, where the model
    has what they say."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return
    config.__dict__.pop("auto_map", None)  # the code that loads a saved sparse model
    config.dtype = "float32"  # of inputs and outputs, however weights are stored
    config.save_pretrained(folder)
    for part in (getattr(model, "generation_config", None), model.tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    found = genai_config(model)
    if found is not None:
        library, _ = libraries(folder / MODEL)
        if library.exists():
            found["model"]["decoder"]["session_options"]["custom_ops_library"] = library.name
        write_json(folder / GENAI, found)


def genai_config(model: SparseModel) -> dict[str, Any] | None:
    """What onnxruntime-genai reads; None where there is no cache, or its layers differ."""
    call = model.call_spec
    if not isinstance(call, CausalCall) or len(set(call.layers)) != 1:
        return None
    heads, key, value = call.layers[0]
    if key != value:
        return None
    cached = {
        f"{prefix}_{part}_names": f"{name}.%d.{part}"
        for prefix, name in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    plain = input_names(call)[: len(call.slots) - 2 * len(call.layers)]
    context = _said(model, "max_position_embeddings") or 2048
    stop = _said(model, "eos_token_id")
    pad = _said(model, "pad_token_id")
    first = stop[0] if isinstance(stop, list) and stop else stop
    tokens = {"bos_token_id": _said(model, "bos_token_id"), "eos_token_id": stop}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": call.vocabulary,
            "context_length": context,
            **{name: number for name, number in tokens.items() if number is not None},
            "pad_token_id": pad if pad is not None else first or 0,
            "decoder": {
                "filename": MODEL,
                "session_options": {"provider_options": []},
                "head_size": key,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(call.layers),
                "inputs": {
                    **{name: name for name in plain},
                    **{n: v for n, v in cached.items() if n.startswith("past")},
                },
                "outputs": {
                    output_names(call)[0]: output_names(call)[0],
                    **{n: v for n, v in cached.items() if n.startswith("present")},
                },
            },
        },
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": False},
    }


def _said(model: Any, name: str) -> Any:
    """By the generation config, else by the config, else None."""
    for part in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(part, name, None)
        if found is not None:
            return found
    return None
