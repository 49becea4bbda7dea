"""DATA as the command line takes it: an `.npz` (or a folder of them) with samples for a model's inputs, and optional labels.

The one big idea: samples are streamed. Headers are read and checked when the data is opened; a sample's bytes are decompressed
when it is asked for, so that neither a large data set nor a zip bomb is ever held in memory whole.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from npucc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Feed = dict[str, Array]

LABELS = "labels"
MAX_SAMPLE_BYTES = 1 << 30  # of one input; nothing that a virtual NPU runs comes near


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a model: its ONNX shape (None: a size that is not fixed) and numpy element type."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The numpy type of its arrays."""
        return np.dtype(self.dtype)

    def text(self) -> str:
        """`x float32[1,3,?,?]`."""
        return f"{self.name} {self.dtype}[{','.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True, slots=True)
class Sample:
    """One inference: arrays in the model's input shapes, and the labels of its rows (None without labels)."""

    feed: Feed
    labels: Array | None = None


@dataclass(frozen=True, slots=True)
class _Member:
    """One array of one `.npz`: `count` pieces of `piece` elements each, to be seen in shape `shape`."""

    name: str
    entry: str  # its name in the zip
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # of one sample
    count: int
    fortran: tuple[int, ...] | None  # whole shape, when the file is in Fortran order


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    members: tuple[_Member, ...]
    labels: _Member | None
    count: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """Opened and checked DATA. Iterating yields feeds; `samples()` yields feeds with their labels."""

    path: Path
    ports: tuple[Port, ...]
    files: tuple[_File, ...]
    limit: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample per input: binds the sizes that the model leaves open."""
        return {member.name: member.shape for member in self.files[0].members}

    def __len__(self) -> int:
        total = sum(file.count for file in self.files)
        return total if self.limit is None else min(total, self.limit)

    def __iter__(self) -> Iterator[Feed]:
        return (sample.feed for sample in self.samples())

    def samples(self) -> Iterator[Sample]:
        """Every sample in order, at most `limit`. Raises DataError where a value does not fit."""
        left = len(self)
        for file in self.files:
            for sample in _read(file, self.ports):
                if left == 0:
                    return
                left -= 1
                yield sample


def open_dataset(path: str | Path, ports: Iterable[Port], *, limit: int | None = None) -> Dataset:
    """Open DATA for a model with these inputs: names, shapes, element types and counts are checked now. Raises DataError."""
    path, ports = Path(path), tuple(ports)
    if path.is_dir():
        paths = sorted(path.glob("*.npz"))
        if not paths:
            raise DataError("the folder holds no .npz file", file=str(path), hint="DATA is one .npz, or a folder of .npz files")
    else:
        paths = [path]
    dataset = Dataset(path, ports, tuple(_open(each, ports) for each in paths), limit)
    if len(dataset) == 0:
        raise DataError("there are no samples", file=str(path), hint="each array needs a leading sample axis of at least 1")
    return dataset


def check_feed(feed: Mapping[str, Any], ports: Iterable[Port], *, place: str = "") -> Feed:
    """One sample as arrays of exactly the ports' shapes and element types. Raises DataError."""
    ports = tuple(ports)
    unknown = [name for name in feed if name not in {port.name for port in ports}]
    if unknown:
        raise DataError(f"{unknown[0]!r} is not an input", file=place, hint=f"the inputs are {_list(ports)}")
    checked: Feed = {}
    for port in ports:
        if port.name not in feed:
            raise DataError(f"input {port.name!r} is missing", file=place, hint=f"the inputs are {_list(ports)}")
        value = np.asarray(feed[port.name])
        if len(value.shape) != len(port.shape) or not _fits(value.shape, port.shape):
            raise DataError(f"input {port.name!r} has shape {list(value.shape)}", file=place, hint=f"expected {port.text()}")
        checked[port.name] = _convert(value, port, place=place)
    return checked


def synthetic_feeds(ports: Iterable[Port], *, count: int = 1, seed: int = 0) -> Iterator[Feed]:
    """Made-up samples, always the same: a standard normal for floats, small whole numbers for integers. Raises DataError."""
    ports = tuple(ports)
    random = np.random.default_rng(seed)
    for port in ports:
        if None in port.shape:
            raise DataError(f"input {port.text()} has open sizes", hint="give them with --shape (shapes= in Python)")
    for _ in range(count):
        feed: Feed = {}
        for port in ports:
            shape = tuple(size or 0 for size in port.shape)
            is_float = port.array_dtype.kind == "f"
            values = random.standard_normal(shape) if is_float else random.integers(0, 2, shape)
            feed[port.name] = np.asarray(values).astype(port.array_dtype)
        yield feed


def _list(ports: Iterable[Port]) -> str:
    return ", ".join(port.text() for port in ports)


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(want in (None, have) for have, want in zip(found, wanted, strict=True))


def _open(path: Path, ports: tuple[Port, ...]) -> _File:
    """Read the headers of one file and fit them to the ports."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            missing = [port for port in ports if port.name not in names]
            if missing:
                raise DataError(
                    f"there is no array {missing[0].name!r}; the file holds {', '.join(map(repr, names)) or 'nothing'}",
                    file=str(path), hint=f"the model's inputs are {_list(ports)}; name the arrays so, with a leading sample axis",
                )  # fmt: skip
            members = tuple(_member(archive, names[port.name], port, path) for port in ports)
            count = _common_count(members, path)
            wants_labels = LABELS in names and LABELS not in {port.name for port in ports}
            labels = _labels(archive, names[LABELS], count, path) if wants_labels else None
    except FileNotFoundError:
        raise DataError("no such file", file=str(path), hint="DATA is one .npz, or a folder of .npz files") from None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error
    return _File(path, members, labels, count)


def _damaged(path: Path, error: Exception | str) -> DataError:
    return DataError(
        f"not a readable .npz file ({error})", file=str(path), hint="write it with numpy.savez(path, input_name=array_with_leading_sample_axis)"
    )


def _common_count(members: tuple[_Member, ...], path: Path) -> int:
    counts = {member.name: member.count for member in members}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name!r}: {count}" for name, count in counts.items())
        raise DataError(f"the arrays hold different numbers of samples ({found})", file=str(path), hint="all need the same leading sample axis")
    return next(iter(counts.values()), 0)


def _header(stream: IO[bytes], entry: zipfile.ZipInfo, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of an .npy stream, left standing at the first element. Never unpickles."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise _damaged(path, f"array {entry.filename!r} has format version {version}")
    if dtype.hasobject or dtype.names or dtype.kind not in "fiub":
        raise DataError(f"array {entry.filename.removesuffix('.npy')!r} holds {dtype}", file=str(path), hint="samples and labels are plain numbers")
    header = stream.tell()
    if header + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise _damaged(path, f"array {entry.filename!r} says shape {list(shape)} of {dtype}, but holds {entry.file_size - header} bytes")
    return tuple(shape), bool(fortran), dtype


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, port: Port, path: Path) -> _Member:
    """How an array is cut into samples: [N, *shape], or [N·B, *rest] where the model's own first dimension is the batch B."""
    with archive.open(entry) as stream:
        shape, fortran, dtype = _header(stream, entry, path)
    one = port.shape
    if len(shape) == len(one) + 1 and _fits(shape[1:], one):
        sample, count = shape[1:], shape[0]
    elif len(shape) == len(one) and one and _fits(shape[1:], one[1:]):
        batch = one[0] if one[0] is not None else 1
        if batch and shape[0] % batch:
            raise DataError(
                f"array {port.name!r} has {shape[0]} rows, which is no multiple of the model's batch of {batch}",
                file=str(path), hint=f"leave {shape[0] % batch} rows out",
            )  # fmt: skip
        sample, count = (batch, *shape[1:]), shape[0] // max(batch, 1)
    else:
        wanted = ",".join("?" if size is None else str(size) for size in one)
        raise DataError(f"array {port.name!r} has shape {list(shape)}", file=str(path), hint=f"expected [samples,{wanted}] for input {port.text()}")
    if math.prod(sample) * dtype.itemsize > MAX_SAMPLE_BYTES:
        raise DataError(f"one sample of {port.name!r} is larger than {MAX_SAMPLE_BYTES >> 20} MiB", file=str(path))
    if fortran and math.prod(shape) * dtype.itemsize > MAX_SAMPLE_BYTES:
        raise DataError(f"array {port.name!r} is large and in Fortran order", file=str(path), hint="store numpy.ascontiguousarray(array)")
    return _Member(port.name, entry.filename, dtype, sample, count, shape if fortran else None)


def _labels(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, count: int, path: Path) -> _Member:
    """Labels: a whole number of rows per sample."""
    with archive.open(entry) as stream:
        shape, fortran, dtype = _header(stream, entry, path)
    if dtype.kind not in "iu":
        raise DataError(f"labels are {dtype}", file=str(path), hint="expected class numbers: an integer per sample")
    if not shape or count == 0 or shape[0] % count:
        raise DataError(f"labels have shape {list(shape)} for {count} samples", file=str(path), hint="expected one entry per sample")
    return _Member(LABELS, entry.filename, dtype, (shape[0] // count, *shape[1:]), count, shape if fortran else None)


def _read(file: _File, ports: tuple[Port, ...]) -> Iterator[Sample]:
    """The samples of one file, one at a time."""
    by_name = {port.name: port for port in ports}
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(file.path))
            members = [*file.members, *([file.labels] if file.labels else [])]
            streams = [(member, _pieces(stack.enter_context(archive.open(member.entry)), member, file.path)) for member in members]
            for index in range(file.count):
                place = f"{file.path}, sample {index}"
                arrays = {member.name: next(pieces) for member, pieces in streams}
                labels = arrays.pop(LABELS) if file.labels else None
                yield Sample({name: _convert(value, by_name[name], place=place) for name, value in arrays.items()}, labels)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error, KeyError) as error:
        raise _damaged(file.path, error) from error


def _pieces(stream: IO[bytes], member: _Member, path: Path) -> Iterator[Array]:
    """One array's samples in order."""
    version = np.lib.format.read_magic(stream)
    skip = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    skip(stream)
    if member.fortran is not None:
        whole = np.frombuffer(_exactly(stream, math.prod(member.fortran) * member.dtype.itemsize, path), member.dtype).reshape(
            member.fortran, order="F"
        )
        yield from np.ascontiguousarray(whole).reshape(member.count, *member.shape)
        return
    size = math.prod(member.shape) * member.dtype.itemsize
    for _ in range(member.count):
        yield np.frombuffer(_exactly(stream, size, path), member.dtype).reshape(member.shape)


def _exactly(stream: IO[bytes], size: int, path: Path) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise _damaged(path, "the file ends early")
    return content


def _convert(value: Array, port: Port, *, place: str) -> Array:
    """The values in the port's element type, refusing what it can't hold and what is not a number."""
    wanted = port.array_dtype
    if value.dtype.kind not in "fiub":
        raise DataError(f"input {port.name!r} is {value.dtype}", file=place, hint=f"expected {port.text()}")
    if wanted.kind == "f":
        _refuse_not_finite(value, port, place=place)
        return _as(value, wanted)
    if value.dtype.kind == "f":
        raise DataError(
            f"input {port.name!r} is {value.dtype}", file=place, hint=f"the model takes {wanted}; convert the array (array.astype({wanted.name!r}))"
        )
    low, high = (0, 1) if wanted.kind == "b" else (int(np.iinfo(wanted).min), int(np.iinfo(wanted).max))
    if value.size and (int(value.min()) < low or int(value.max()) > high):
        raise DataError(f"input {port.name!r} has values from {value.min()} to {value.max()}", file=place, hint=f"{wanted} holds {low} to {high}")
    return _as(value, wanted)


def _as(value: Array, dtype: np.dtype[Any]) -> Array:
    """The same values, densely stored as `dtype`, in the same shape (numpy makes a scalar one-dimensional)."""
    dense: Array = np.ascontiguousarray(value, dtype=dtype).reshape(value.shape)
    return dense


def _refuse_not_finite(value: Array, port: Port, *, place: str) -> None:
    if value.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        finite = np.isfinite(value.astype(port.array_dtype, copy=False))
    if not finite.all():
        where = [int(i) for i in np.argwhere(~finite)[0]]
        raise DataError(f"input {port.name!r} is {value[tuple(where)]} at {where}", file=place, hint="every value must be a finite number")
