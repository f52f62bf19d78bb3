"""What codegen keeps on disk: compiled kernels and tuning results, safe among processes.

Every entry is one file ``<folder>/<name>``: the content, then a checksum. It is written under a
temporary name, flushed to disk and renamed, so that a reader sees all of it or nothing; what fails
its checksum (a full disk, a crash, a copy cut short) is dropped and built again. A lock per entry
makes the processes that want the same one at once build it once. Where the folder cannot be written
it is still read, and what is missing goes to a temporary folder of this process, with a remark.

The folder is ``$SPARSIFY_CACHE``, else ``sparsify`` in the user's cache directory. It holds code
that is run: let nobody else write there.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: renames stay atomic, an entry may be built twice
    fcntl = None  # type: ignore[assignment]

VARIABLE = "SPARSIFY_CACHE"
_MARK = b"\nsparsify-sha256:"
_TAIL = len(_MARK) + 64  # loaders of shared objects do not look past their own tables


class Store:
    """Entries in one folder.

    Args:
        folder: None = ``$SPARSIFY_CACHE`` or the user's cache directory.

    Attributes:
        remarks: what the user should know, in order: a folder that cannot be written, entries that
            were damaged.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        self.remarks: list[str] = []
        self._spare: Path | None = None
        self._lock = threading.Lock()

    # -- entries

    def find(self, name: str) -> Path | None:
        """The file of a good entry; None where there is none.

        A damaged one stays until it is written over: whoever removes it might remove the good one
        that another thread has just put in its place.
        """
        for folder in self._folders():
            path = folder / name
            try:
                sealed = path.read_bytes()
            except OSError:
                continue
            if _opened(sealed) is not None:
                return path
            self.remark(f"the cache entry {path} was damaged and is made again")
        return None

    def get(self, name: str) -> bytes | None:
        """The content of an entry, or None."""
        path = self.find(name)
        try:
            return None if path is None else _opened(path.read_bytes())
        except OSError:
            return None

    def put(self, name: str, content: bytes) -> Path:
        """Write an entry, over an earlier one; where it now is."""
        sealed = content + _MARK + hashlib.sha256(content).hexdigest().encode()
        try:
            return _write(self.folder, name, sealed)
        except OSError as error:
            return _write(self.private(error), name, sealed)

    def build(self, name: str, make: Callable[[], bytes]) -> Path:
        """The file of entry ``name``, made by ``make`` where it is missing or damaged."""
        path = self.find(name)
        if path is not None:
            return path
        with self._locked(name):
            return self.find(name) or self.put(name, make())  # another process may have been first

    # -- small results

    def get_json(self, key: str) -> Any:
        """What :meth:`put_json` kept under ``key``; None where nothing, or nothing readable, is."""
        content = self.get(_json_name(key))
        try:
            entry = None if content is None else json.loads(content)
        except ValueError:
            return None
        return entry["value"] if isinstance(entry, dict) and entry.get("key") == key else None

    def put_json(self, key: str, value: Any) -> None:
        """Keep a JSON value. The key says all that the value depends on: op, shape, dtype,
        threads and :attr:`sparsify.codegen.machine.Machine.key`."""
        entry = json.dumps({"key": key, "value": value}, sort_keys=True)
        self.put(_json_name(key), entry.encode())

    def json(self, key: str, make: Callable[[], Any]) -> Any:
        """What is kept under ``key``, else what ``make`` gives, which is kept then.

        Made anew it is Python's, kept it is JSON's: keys of dictionaries are text there.
        """
        kept = self.get_json(key)
        if kept is None:
            kept = make()
            self.put_json(key, kept)
        return kept

    # -- where the folder cannot be used

    def private(self, why: Exception | str) -> Path:
        """The temporary folder of this process, made at first use, with a remark that says why."""
        with self._lock:
            if self._spare is None:
                self._spare = Path(tempfile.mkdtemp(prefix="sparsify-"))
                atexit.register(_remove, self._spare, os.getpid())
                reason = (why.strerror or str(why)) if isinstance(why, OSError) else str(why)
                self.remark(
                    f"the cache folder {self.folder} cannot be used ({reason}): kernels are built"
                    f" anew in every process; set {VARIABLE} to a folder that can be written"
                )
            return self._spare

    def _folders(self) -> list[Path]:
        return [self.folder] if self._spare is None else [self._spare, self.folder]

    def remark(self, text: str) -> None:
        """Note something that the user should know, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One builder of ``name`` at a time among all processes and threads."""
        with contextlib.ExitStack() as stack:
            if fcntl is not None:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    lock = stack.enter_context((self.folder / f".{name}.lock").open("ab"))
                    fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file closes, or we die
                except OSError:
                    pass  # a folder that is not shared, or has no locks: renames are enough
            yield


def default_folder() -> Path:
    """``$SPARSIFY_CACHE``, else ``sparsify`` in the user's cache directory."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "sparsify"


_STORES: dict[Path, Store] = {}


def store() -> Store:
    """The store of the folder that is set now; one per folder and process."""
    return _STORES.setdefault(folder := default_folder(), Store(folder))


def _opened(sealed: bytes) -> bytes | None:
    """The content of an entry's file; None where it is damaged."""
    content, tail = sealed[:-_TAIL], sealed[-_TAIL:]
    good = _MARK + hashlib.sha256(content).hexdigest().encode()
    return content if tail == good else None


def _write(folder: Path, name: str, sealed: bytes) -> Path:
    """Write a file so that others see all of it or nothing, also after a crash."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, partial = tempfile.mkstemp(prefix=f".{name}.", suffix=".partial", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(sealed)
            file.flush()
            os.fsync(file.fileno())
        return Path(partial).replace(folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise


def _json_name(key: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9]+", "-", key)[:60].strip("-")
    return f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child leaves its parent's folder alone
        shutil.rmtree(folder, ignore_errors=True)
