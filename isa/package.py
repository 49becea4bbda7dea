"""The `.npu` file: one plain zip with the program text, its constants, a manifest and whatever else the caller adds.

The one big idea: a package has exactly one spelling. Members are stored uncompressed (deflate gives other bytes with other zlib builds),
sorted, with fixed timestamps; on reading, every member is checked against the manifest and the whole file against the bytes that
writing it again would give. So equal contents are equal files, any changed byte is found, and a file cannot unpack to more than its size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from isa.errors import PackageError, ParseError
from isa.program import Program, TensorRecord
from isa.text import format_program, parse_program

FORMAT = 1
MAXIMUM_BYTES = 4 << 30
MAXIMUM_MEMBERS = 4096
PIECE = 1 << 20  # bytes of a member read at a time
MANIFEST, PROGRAM, CONSTANTS = "manifest.json", "program.npuasm", "constants.bin"
DERIVED = ("format", "inputs", "outputs", "sha256", "source", "target")  # manifest keys that follow from the contents
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*\Z")
_AGAIN = "make the package again with npucc compile or npucc asm"


@dataclass(frozen=True, slots=True)
class Package:
    """A program with the bytes it needs. `constants` lie in DRAM at `program.constants_address`.

    `manifest` may carry JSON values of the caller (such as `tool`, its name and version); the keys in DERIVED are computed when saving.
    `members` are further files by name, such as `graph.json`; this package stores and verifies them without reading them.
    Raises PackageError when the constants do not have the size that the program states, or a member has a bad name.
    """

    program: Program
    constants: bytes
    manifest: Mapping[str, Any] = field(default_factory=dict)
    members: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.constants) != self.program.constants_bytes:
            raise PackageError(
                f"{CONSTANTS} has {len(self.constants)} bytes, but the program's .memory line says {self.program.constants_bytes}",
                hint="give the constants that belong to this program",
            )
        for name in self.members:
            if name in (MANIFEST, PROGRAM, CONSTANTS) or not _MEMBER_NAME.match(name):
                raise PackageError(f"a package cannot have a further member named {name!r}", hint="use letters, digits, . _ + - and single slashes")

    def to_bytes(self) -> bytes:
        """The file's bytes: the same for equal packages, always."""
        buffer = io.BytesIO()
        _write_zip(self._files(), buffer)
        return buffer.getvalue()

    def _files(self) -> dict[str, bytes]:
        """All files of the package by name."""
        contents = {PROGRAM: format_program(self.program).encode("utf-8"), CONSTANTS: self.constants, **self.members}
        manifest = {key: value for key, value in self.manifest.items() if key not in DERIVED} | _derived_manifest(self.program, contents)
        contents[MANIFEST] = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode("utf-8")
        return contents

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Raises PackageError."""
        path, contents = Path(path), self._files()
        try:
            _replace(path, partial(_write_zip, contents))
        except OSError as error:
            raise PackageError(
                f"cannot write the package: {error.strerror or error}", file=str(path), hint="check the folder and its free space"
            ) from error

    @staticmethod
    def from_bytes(blob: bytes, *, file: str = "") -> Package:
        """Read and verify a package. Raises PackageError; `file` is named in it."""
        return _read(io.BytesIO(blob), file, None)

    @staticmethod
    def load(path: str | Path) -> Package:
        """Read and verify a package file. Raises PackageError.

        Its `members` stay in the file: each is read, and verified again, when it is asked for.
        """
        try:
            with Path(path).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size > MAXIMUM_BYTES:
                    raise PackageError(f"the file has {size} bytes", file=str(path), hint=f"a package has at most {MAXIMUM_BYTES} bytes")
                return _read(stream, str(path), Path(path).resolve())
        except OSError as error:
            raise PackageError(f"cannot read the package: {error.strerror or error}", file=str(path), hint="check the path") from error

    @property
    def text(self) -> str:
        """The program as npuasm."""
        return format_program(self.program)


def load(path: str | Path) -> Package:
    """`Package.load`: read and verify a package file. Raises PackageError."""
    return Package.load(path)


def pack_text(text: str, constants: bytes = b"", *, file: str = "", tool: str = "", members: Mapping[str, bytes] | None = None) -> Package:
    """Assemble npuasm text and its constants into a package. Raises ParseError or PackageError."""
    return Package(parse_program(text, file=file), constants, {"tool": tool} if tool else {}, members or {})


def _signature(records: tuple[TensorRecord, ...]) -> list[dict[str, Any]]:
    """What a caller of the program must know. `scale` is float32, stated as the double that equals it."""
    return [
        {
            "name": record.name,
            "dtype": record.tile.dtype,
            "outside": record.dtype,
            "shape": list(record.tile.shape),
            "scale": record.scale,
            "zero": record.zero,
        }
        for record in records
    ]


def _derived_manifest(program: Program, contents: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": program.source,
        "target": program.target.name,
        "inputs": _signature(program.inputs),
        "outputs": _signature(program.outputs),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }


def _write_zip(contents: Mapping[str, bytes], stream: BinaryIO) -> None:
    """A zip of stored members whose bytes depend on nothing but names and contents; the manifest comes first."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in _in_order(contents):
            _append(archive, name, [contents[name]], len(contents[name]))


def _in_order(names: Iterable[str]) -> list[str]:
    """Member names as they stand in the file."""
    return sorted(names, key=lambda name: (name != MANIFEST, name))


def _append(archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes], size: int) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr, entry.file_size = 3, 0o644 << 16, size
    with archive.open(entry, "w") as member:
        for piece in pieces:
            member.write(piece)


def _pieces(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """A member's content, a little at a time."""
    with archive.open(name) as member:
        while piece := member.read(PIECE):
            yield piece


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write to a temporary file beside `path`, then rename; on any failure the temporary file is removed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(stream: BinaryIO, file: str, path: Path | None) -> Package:
    """A verified package. If `path` is given, members other than the constants and the program are never in memory as a whole."""
    kept = _verified_contents(stream, file, keep_all=path is None)
    manifest = json.loads(kept.pop(MANIFEST))
    text, constants = kept.pop(PROGRAM), kept.pop(CONSTANTS)
    checksums = {name: digest for name, digest in manifest["sha256"].items() if name not in (PROGRAM, CONSTANTS)}
    try:
        program = parse_program(text.decode("utf-8"), file=f"{file}:{PROGRAM}" if file else PROGRAM)
        package = Package(program, constants, manifest, kept if path is None else _StoredMembers(path, checksums))
    except (ParseError, UnicodeDecodeError) as error:
        raise PackageError(f"{PROGRAM} cannot be read: {error}", file=file, hint=_AGAIN) from error
    except PackageError as error:
        raise PackageError(error.message, file=file, hint=error.hint) from None
    for key in ("inputs", "outputs"):
        if manifest.get(key) != _derived_manifest(program, {})[key]:
            raise PackageError(f"{MANIFEST} and {PROGRAM} disagree about the {key}", file=file, hint=_AGAIN)
    return package


def _verified_contents(stream: BinaryIO, file: str, *, keep_all: bool) -> dict[str, bytes]:
    """Names and sizes first, contents after; everything is refused that `_write_zip` would not have written."""
    if stream.read(2) != b"PK":
        raise PackageError(
            "this is not a .npu package: it does not begin as a zip file", file=file, hint="give a file made by npucc compile or npucc asm"
        )
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            _refuse_odd_entries(entries, stream.seek(0, os.SEEK_END), file)
            contents = _checked_members(archive, {entry.filename for entry in entries}, file, keep_all=keep_all)
            written = _Comparison(stream)
            with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as again:
                sizes = {entry.filename: entry.file_size for entry in entries}
                for name in _in_order(sizes):
                    _append(again, name, _pieces(archive, name), sizes[name])
    except (PackageError, OSError):
        raise
    except Exception as error:  # zipfile raises many kinds on damaged input: BadZipFile, EOFError, struct.error, NotImplementedError, …
        reason = str(error) or type(error).__name__
        raise PackageError(f"the zip container is damaged or cut short: {reason}", file=file, hint=f"copy the file again, or {_AGAIN}") from error
    if not written.same():
        raise PackageError("the zip container was changed, though its members are intact", file=file, hint=_AGAIN)
    return contents


def _checked_members(archive: zipfile.ZipFile, names: set[str], file: str, *, keep_all: bool) -> dict[str, bytes]:
    """Members whose checksums are right: all, or those that every package has."""
    for name in (MANIFEST, PROGRAM, CONSTANTS):
        if name not in names:
            raise PackageError(f"the package has no {name}", file=file, hint=_AGAIN)
    contents = {MANIFEST: archive.read(MANIFEST)}
    checksums = _checksums(contents[MANIFEST], names, file)
    for name in sorted(checksums):
        if keep_all or name in (PROGRAM, CONSTANTS):
            contents[name] = archive.read(name)
        digest = hashlib.sha256()
        for piece in [contents[name]] if name in contents else _pieces(archive, name):
            digest.update(piece)
        if digest.hexdigest() != checksums[name]:
            raise PackageError(
                f"member {name!r} does not have the checksum that {MANIFEST} states", file=file, hint=f"copy the file again, or {_AGAIN}"
            )
    return contents


class _Comparison(io.RawIOBase):
    """Stands for a file that is being written, and compares what would be written with what `stream` holds.

    Long pieces are compared at once; short ones, which the zip writer may go back to and write again, in `same`.
    """

    LONG = 1 << 16

    def __init__(self, stream: BinaryIO):
        self.stream, self.position, self.end, self.differs = stream, 0, 0, False
        self.pieces: dict[int, bytes] = {}

    def write(self, data: Any) -> int:
        if len(data) < self.LONG:
            self.pieces[self.position] = bytes(data)
        else:
            self.differs = self.differs or not self._equal(self.position, memoryview(data))
        self.position += len(data)
        self.end = max(self.end, self.position)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.end}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def same(self) -> bool:
        """Whether the stream holds what was written, and nothing else."""
        pieces = self.pieces.items()
        return not self.differs and self.stream.seek(0, os.SEEK_END) == self.end and all(self._equal(*piece) for piece in pieces)

    def _equal(self, position: int, data: bytes | memoryview) -> bool:
        self.stream.seek(position)
        starts = range(0, len(data), self.LONG)
        return all(self.stream.read(min(self.LONG, len(data) - start)) == data[start : start + self.LONG] for start in starts)


class _StoredMembers(Mapping[str, bytes]):
    """Further members of a package file, read when they are asked for. Raises PackageError when the file is no longer what it was."""

    def __init__(self, path: Path, checksums: Mapping[str, str]):
        self._path, self._checksums = path, checksums

    def __getitem__(self, name: str) -> bytes:
        checksum = self._checksums[name]
        try:
            with zipfile.ZipFile(self._path) as archive:
                content = archive.read(name)
        except Exception as error:  # the file was replaced, cut or removed: see _verified_contents
            raise PackageError(f"member {name!r} can no longer be read: {error}", file=str(self._path), hint="load the package again") from error
        if hashlib.sha256(content).hexdigest() != checksum:
            raise PackageError(f"member {name!r} changed after the package was loaded", file=str(self._path), hint="load the package again")
        return content

    def __iter__(self) -> Iterator[str]:
        return iter(self._checksums)

    def __len__(self) -> int:
        return len(self._checksums)


def _refuse_odd_entries(entries: list[zipfile.ZipInfo], available: int, file: str) -> None:
    if len(entries) > MAXIMUM_MEMBERS:
        raise PackageError(f"the package has {len(entries)} members", file=file, hint=f"at most {MAXIMUM_MEMBERS} are read")
    names = set()
    for entry in entries:
        shown = repr(entry.filename if len(entry.filename) <= 80 else entry.filename[:77] + "...")
        if not _MEMBER_NAME.match(entry.filename):
            raise PackageError(
                f"member {shown} has a name that a package cannot have", file=file, hint="names are relative, without .. or backslashes"
            )
        if entry.filename in names:
            raise PackageError(f"member {shown} stands twice", file=file, hint=_AGAIN)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise PackageError(
                f"member {shown} is compressed ({entry.compress_size} bytes for {entry.file_size})",
                file=file,
                hint="members of a package are stored as they are; " + _AGAIN,
            )
        names.add(entry.filename)
    total = sum(entry.file_size for entry in entries)
    if total > available:
        raise PackageError(f"the members claim {total} bytes, the file has {available}", file=file, hint=f"copy the file again, or {_AGAIN}")


def _checksums(manifest_bytes: bytes, names: set[str], file: str) -> dict[str, str]:
    """The checksums in a manifest of the right version: one for every other member."""
    try:
        manifest = json.loads(manifest_bytes.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{MANIFEST} is not JSON: {error}", file=file, hint=_AGAIN) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise PackageError(
            f"the package has format version {found!r}, this reader knows {FORMAT}",
            file=file,
            hint="use the npucc that made it, or compile the model again",
        )
    checksums = manifest.get("sha256")
    if not isinstance(checksums, dict) or set(checksums) != names - {MANIFEST}:
        raise PackageError(f"the members of the package and the checksums in {MANIFEST} differ", file=file, hint=_AGAIN)
    return checksums
