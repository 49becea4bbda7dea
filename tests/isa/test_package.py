"""A package comes back as it was saved, is the same file every time, and a damaged one is refused with a reason."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from isa import Package, PackageError, ParseError, load, pack_text, parse_program
from isa.package import DERIVED, _write_zip

TEXT = """\
.npu 1
.source "a.onnx"
.target tiny
.memory dram=0x1000 constants=0x800+0x8
.input  "x" s8[4] @0x0 scale=0.1 zero=-3 type=float32
.output "y" s8[4] @0x10 scale=0.2 zero=0 type=int64

.layer "one" relu macs=0
  ld      %0x0:s8[4], @0x0:s8[4]                                                                signal=st.0
  st      @0x10:s8[4], %0x0:s8[4]                                                               wait=ld.0
"""
CONSTANTS = bytes(range(8))


@pytest.fixture
def package() -> Package:
    return Package(parse_program(TEXT), CONSTANTS, {"tool": "test 1"}, {"graph.json": b"{}", "host/1.onnx": b"abc"})


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    _write_zip(members, stream)
    return stream.getvalue()


def rewritten(package: Package, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The package's file with changed members, checksums corrected."""
    with zipfile.ZipFile(io.BytesIO(package.to_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if "manifest.json" in members:
        manifest = json.loads(members["manifest.json"])
        manifest["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in members.items() if name != "manifest.json"}
        members["manifest.json"] = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    return zipped(members)


def test_comes_back_as_saved(package: Package, tmp_path: Path) -> None:
    package.save(tmp_path / "a.npu")
    loaded = load(tmp_path / "a.npu")
    assert (loaded.program, loaded.constants, dict(loaded.members)) == (package.program, package.constants, package.members)
    assert loaded.manifest["tool"] == "test 1"
    assert loaded.text == TEXT
    assert loaded.to_bytes() == package.to_bytes()


def test_same_contents_are_the_same_file(package: Package, tmp_path: Path) -> None:
    """The bytes depend on contents alone, not on the order of members, the time or the path; this digest holds on every machine."""
    package.save(tmp_path / "a.npu")
    (tmp_path / "folder").mkdir()
    replace(package, members=dict(reversed(list(package.members.items())))).save(tmp_path / "folder" / "b.npu")
    assert (tmp_path / "a.npu").read_bytes() == (tmp_path / "folder" / "b.npu").read_bytes()
    assert hashlib.sha256(package.to_bytes()).hexdigest()[:16] == "99424d0fafaa49e2"


def test_is_a_plain_zip_with_a_readable_manifest(package: Package) -> None:
    with zipfile.ZipFile(io.BytesIO(package.to_bytes())) as archive:
        assert archive.namelist() == ["manifest.json", "constants.bin", "graph.json", "host/1.onnx", "program.npuasm"]
        assert archive.read("program.npuasm").decode() == TEXT
        manifest = json.loads(archive.read("manifest.json"))
    assert set(manifest) == {*DERIVED, "tool"}
    assert manifest["inputs"] == [{"name": "x", "dtype": "s8", "outside": "float32", "shape": [4], "scale": 0.10000000149011612, "zero": -3}]


def test_text_is_packed() -> None:
    packed = pack_text(TEXT, CONSTANTS, tool="npucc 1")
    assert (packed.text, packed.constants, packed.manifest) == (TEXT, CONSTANTS, {"tool": "npucc 1"})
    with pytest.raises(ParseError, match=r"a.npuasm:1:1: unknown instruction 'npu'"):
        pack_text("npu 1", file="a.npuasm")


def test_every_changed_byte_is_found(package: Package) -> None:
    blob = package.to_bytes()
    for position in range(0, len(blob), 3):
        for flip in (0x01, 0x80):
            damaged = blob[:position] + bytes([blob[position] ^ flip]) + blob[position + 1 :]
            with pytest.raises(PackageError):
                Package.from_bytes(damaged)


def test_every_cut_and_every_addition_is_found(package: Package) -> None:
    blob = package.to_bytes()
    for length in range(0, len(blob), 7):
        with pytest.raises(PackageError):
            Package.from_bytes(blob[:length])
    for longer in (blob + b"\0", b"\0" + blob, blob + blob):
        with pytest.raises(PackageError):
            Package.from_bytes(longer)


def drop(name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.__delitem__(name)


def put(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: content})


def edit(old: bytes, new: bytes, name: str = "program.npuasm") -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: members[name].replace(old, new)})


WRONG = {
    "no program": (drop("program.npuasm"), "f: the package has no program.npuasm"),
    "no manifest": (drop("manifest.json"), "f: the package has no manifest.json"),
    "no constants": (drop("constants.bin"), "f: the package has no constants.bin"),
    "other version": (edit(b'"format": 1', b'"format": 2', "manifest.json"), "f: the package has format version 2, this reader knows 1"),
    "wrong size": (put("constants.bin", b"1234"), "f: constants.bin has 4 bytes, but the program's .memory line says 8"),
    "bad program": (edit(b"ld  ", b"lod "), "f: program.npuasm cannot be read: f:program.npuasm:9:3: unknown instruction 'lod'"),
    "not text": (edit(b"ld  ", b"\xff\xff  "), "f: program.npuasm cannot be read: 'utf-8' codec can't decode byte 0xff in position"),
    "other signature": (edit(b"zero=-3", b"zero=-4"), "f: manifest.json and program.npuasm disagree about the inputs"),
    "leaves the folder": (put("../evil", b""), "f: member '../evil' has a name that a package cannot have"),
    "absolute path": (put("/etc/passwd", b""), "f: member '/etc/passwd' has a name that a package cannot have"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_members_are_refused(case: str, package: Package) -> None:
    change, message = WRONG[case]
    with pytest.raises(PackageError) as caught:
        Package.from_bytes(rewritten(package, change), file="f")
    assert str(caught.value).startswith(message)
    assert caught.value.hint


def test_a_changed_member_does_not_pass_its_checksum(package: Package) -> None:
    with zipfile.ZipFile(io.BytesIO(package.to_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with pytest.raises(PackageError, match=r"member 'graph.json' does not have the checksum that manifest.json states"):
        Package.from_bytes(zipped({**members, "graph.json": b"[]"}))
    with pytest.raises(PackageError, match=r"the members of the package and the checksums in manifest.json differ"):
        Package.from_bytes(zipped({**members, "more": b""}))


def test_a_zip_bomb_is_refused_before_it_unpacks() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"\0" * (64 << 20))
    with pytest.raises(PackageError, match=r"member 'manifest.json' is compressed \(\d+ bytes for 67108864\)"):
        Package.from_bytes(buffer.getvalue())


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npu").write_bytes(b"hello")
    with pytest.raises(PackageError, match=r"a.npu: this is not a .npu package: it does not begin as a zip file"):
        load(tmp_path / "a.npu")
    with pytest.raises(PackageError, match=r"b.npu: cannot read the package: No such file or directory"):
        load(tmp_path / "b.npu")
    with pytest.raises(PackageError, match="cannot read the package"):
        load(tmp_path)


def test_a_failed_save_leaves_nothing_behind(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.npu"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PackageError, match=r"a.npu: cannot write the package: No space left on device"):
        package.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npu"]
    assert target.read_bytes() == b"old"
    monkeypatch.undo()
    with pytest.raises(PackageError, match="cannot write the package: No such file or directory"):
        package.save(tmp_path / "missing" / "a.npu")


def test_members_are_read_from_the_file_when_asked_for(package: Package, tmp_path: Path) -> None:
    package.save(tmp_path / "a.npu")
    loaded = load(tmp_path / "a.npu")
    assert dict(loaded.members) == package.members
    assert "more" not in loaded.members
    replace(package, members={**package.members, "graph.json": b"[]"}).save(tmp_path / "a.npu")
    with pytest.raises(PackageError, match=r"a.npu: member 'graph.json' changed after the package was loaded\n  hint: load the package again"):
        loaded.members["graph.json"]
    (tmp_path / "a.npu").unlink()
    with pytest.raises(PackageError, match=r"a.npu: member 'host/1.onnx' can no longer be read"):
        loaded.members["host/1.onnx"]


def test_loading_takes_little_more_memory_than_twice_the_constants(tmp_path: Path) -> None:
    size = 8 << 20
    program = replace(parse_program(TEXT), dram_bytes=size + 0x1000, constants_bytes=size)
    Package(program, bytes(size), members={"graph.bin": bytes(size)}).save(tmp_path / "a.npu")
    tracemalloc.start()
    try:
        load(tmp_path / "a.npu")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * size + (2 << 20)


def test_a_package_is_complete_from_the_start() -> None:
    program = parse_program(TEXT)
    with pytest.raises(PackageError, match=r"constants.bin has 0 bytes, but the program's .memory line says 8"):
        Package(program, b"")
    with pytest.raises(PackageError, match=r"a package cannot have a further member named 'manifest.json'"):
        Package(program, CONSTANTS, members={"manifest.json": b""})
    with pytest.raises(PackageError, match=r"a package cannot have a further member named 'a/../b'"):
        Package(program, CONSTANTS, members={"a/../b": b""})
