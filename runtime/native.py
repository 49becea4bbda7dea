"""The compiled loops as functions of this process: object code that a child process made, kept on disk for the next start.

The one big idea: numba and the parts of LLVM that compile are needed once per computer, by a process that ends; what stays in memory is
30 KB of code. Each entry of the code takes one pointer, to its arguments as 64-bit words; its name ends with their kinds ("q" integers, "f"
float32), so a call that does not fit finds no entry. Importing this raises ImportError where there is no numba that can be used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LANES = 16  # int32 sums in a 512-bit register
TAPS = 4  # products that one instruction adds to each of them
REGISTER_BYTES = LANES * TAPS  # bytes, of the sums and of either side of the products

if find_spec("numba") is None:
    raise ImportError("numba is not installed")
if tuple(int(part) for part in version("numba").split(".")[:2]) < (0, 62):
    raise ImportError("numba 0.62 or later is needed: the code generated here is for LLVM 20 or later")

from llvmlite import binding  # noqa: E402  (it comes with numba)

PROCESSOR = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
FEATURES = os.environ.get("NUMBA_CPU_FEATURES") or binding.get_host_cpu_features().flatten()
#: whether the code may use AVX512-VNNI (`vpdpbusd`): four int8 products added to each of sixteen int32 sums by one instruction
HAS_PRODUCTS = {"+avx512f", "+avx512vnni"} <= set(FEATURES.split(","))


def _compile() -> bytes:
    """The object code, as a child process makes it in some seconds. Raises ImportError."""
    root = str(Path(__file__).parents[1])
    start = f"import sys; sys.path.insert(0, {root!r}); from runtime import compiled; sys.stdout.buffer.write(compiled.object_code())"
    environment = {**os.environ, "NUMBA_CPU_NAME": PROCESSOR, "NUMBA_CPU_FEATURES": FEATURES}
    done = subprocess.run([sys.executable, "-c", start], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise ImportError(f"numba did not compile the loops: {done.stderr.decode(errors='replace').strip().splitlines()[-1:]}")
    return done.stdout


def _key() -> str:
    """What the object code depends on."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("compiled.py", "native.py")]
    told = (version("numba"), version("llvmlite"), binding.get_default_triple(), PROCESSOR, FEATURES)
    return hashlib.sha256(b"\0".join([*sources, *map(str.encode, told)])).hexdigest()[:32]


def _folders() -> list[Path]:
    """Where the code may be kept, the preferred folder first."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    personal = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return [Path(chosen)] if chosen else [Path(__file__).parent / "__pycache__", Path(personal) / "npu"]


def _object_code() -> bytes:
    """The object code, kept from an earlier start or made now; a kept file begins with the digest of the rest."""
    name = f"loops-{_key()}.o"
    for folder in _folders():
        with suppress(OSError):
            digest, code = (kept := (folder / name).read_bytes())[:32], kept[32:]
            if hashlib.sha256(code).digest() == digest:
                return code
    code = _compile()
    for folder in _folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(file.name).replace(folder / name)  # another process may do the same
            break
    return code


@cache
def load() -> Any:
    """LLVM with the code in it, which lives as long as the process. Raises ImportError where nothing can be compiled."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), binding.Target.from_default_triple().create_target_machine(jit=True))
    engine.add_object_file(binding.ObjectFileRef.from_data(_object_code()))
    engine.finalize_object()
    return engine


@cache
def _entry(symbol: str) -> Any:
    place = load().get_function_address(symbol)
    if not place:
        raise AssertionError(f"there is no compiled loop {symbol}")
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(place)


class Call(partial[None]):
    """A compiled loop with its arguments, integers and floats: called without a Python frame in between."""

    kept: tuple[Any, ...]

    def __new__(cls, loop: str, *arguments: int | float) -> Call:
        kinds = "".join("f" if isinstance(argument, float) else "q" for argument in arguments)
        words = b"".join(struct.pack("=fi", argument, 0) if isinstance(argument, float) else struct.pack("=q", argument) for argument in arguments)
        return super().__new__(cls, _entry(f"{loop}.{kinds}"), ctypes.create_string_buffer(words))

