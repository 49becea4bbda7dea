"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold: the same content gives the same bytes


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write; `path` becomes it when the block ends well, and is left as it was when it does not."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to rename
        with path.open("wb") as stream:
            yield stream
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file. Raises OSError."""
    with replacing(path) as stream:
        stream.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file. Raises OSError."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: object, *, indent: int | None = 2) -> str:
    """JSON for people and scripts; not-a-number and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_array(path: str | Path, array: Array) -> None:
    """An `.npy` of dense values. Raises OSError."""
    write_bytes(path, _npy(np.ascontiguousarray(array)))


def write_arrays(path: str | Path, arrays: Mapping[str, Array]) -> None:
    """An `.npz` as numpy writes it, except that the same arrays give the same bytes. Raises OSError."""
    with replacing(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, _npy(np.asanyarray(array)), zipfile.ZIP_DEFLATED)


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()
