"""Which parts of a ``.pt2`` file would run code: torch unpickles some of them without asking."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path


def unsafe_parts(path: Path) -> tuple[str, ...]:
    """Members that are pickles of more than plain tensors and containers.

    ``torch.export.load`` reads ``.pt`` members with ``weights_only=True`` first, but falls back to
    an unrestricted load, and reads members marked ``use_pickle`` and custom objects unrestricted.
    """
    found = []
    with zipfile.ZipFile(path) as archive:
        pickles = {n for n in archive.namelist() if n.endswith(".pt")}
        for name in archive.namelist():
            if name.endswith("_config.json"):
                pickles |= _marked(archive, name)
            member = name.rpartition("/")[2]
            if member.startswith(("custom_obj", "opaque_obj")):
                found.append(name)
        found += [name for name in sorted(pickles) if not _plain(archive, name)]
    return tuple(dict.fromkeys(found))


def _marked(archive: zipfile.ZipFile, config: str) -> set[str]:
    """Members that a payload config says are pickles."""
    folder = config.rpartition("/")[0]
    payloads = json.loads(archive.read(config)).get("config", {})
    return {f"{folder}/{p['path_name']}" for p in payloads.values() if p.get("use_pickle")}


def _plain(archive: zipfile.ZipFile, name: str) -> bool:
    import torch

    data = archive.read(name)
    if not data:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:
        return False
    return True
