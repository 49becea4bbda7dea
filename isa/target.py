"""What a chip is: a dozen primary numbers in a TOML file; everything else is derived from them."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isa.errors import TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

TARGETS_FOLDER = Path(__file__).parent / "targets"
LIMIT = 1 << 48
#: how sums become stored values, as `requant` spells them out
REQUANTIZE = ("fp32.rne", "q31.rne", "q31.tosa", "q31.tfl")
#: fields that are one of a few words
WORDS = {
    "family": ("systolic", "mac"), "dataflow": ("ws", "os", "is"), "requantize": REQUANTIZE,
    "skip": ("none", "structured", "weights", "activations", "both"),
}  # fmt: skip
_FORMAT = re.compile(r"nm:([1-9][0-9]{0,2}):([1-9][0-9]{0,2})|block|mask|s4")


@dataclass(frozen=True, slots=True)
class Target:
    """A virtual NPU. Sizes in bytes, rates per cycle, energies in picojoules, one clock for all engines."""

    name: str  # what `--target` and `.target` call it
    description: str = ""  # one line for the reader
    family: str = "systolic"  # systolic (weight stationary R×C), or mac (m×n×k multiply-accumulates each cycle)
    rows: int = 32  # systolic: the K direction; mac: output pixels (m)
    cols: int = 32  # systolic: output channels (N direction); mac: output channels (n)
    depth: int = 1  # mac only: products summed per output and cycle (k)
    dataflow: str = "ws"  # systolic only: ws, os or is
    shadow_weights: bool = True  # systolic only: the next fold's weights load behind the current one
    patches: bool = True  # systolic, ws only: a fold may hold a patch of neighbouring results, and several groups
    pipeline_depth: int = 8  # mac only: cycles from the first operand to the last sum
    spm_bytes: int = 1 << 20  # scratchpad
    acc_bytes: int = 1 << 18  # accumulators, 4 bytes each
    alignment: int = 1  # of every tile's start, in bytes
    dram_bytes: int = 1 << 32  # the most that a program may use
    dram_bytes_per_cycle: float = 25.6  # of the one channel that ld and st share
    dram_latency: int = 120  # cycles from request to first byte
    dram_burst_bytes: int = 32  # a shorter contiguous run still costs this much
    vec_lanes: int = 64  # elements per cycle of the vector engine
    vec_startup: int = 8  # cycles per vector instruction
    clock_hz: float = 1.0e9  # turns cycles into seconds
    host_latency: int = 20_000  # cycles to hand a segment over to the host and back: driver call and interrupt, 20 us at 1 GHz
    weight_formats: str = ""  # packed weights that it can unpack, of nm:N:M, block, mask and s4, with spaces between
    skip: str = "none"  # what the array leaves out of its time: none, structured, weights, activations or both
    requantize: str = "fp32.rne"  # how requant rounds: fp32.rne, q31.rne, q31.tosa or q31.tfl
    pj_mac: float = 0.30  # int8 multiply-accumulate; Horowitz, ISSCC 2014 (45 nm)
    pj_vector: float = 1.0  # one vector element operation: fp32 add 0.9 plus control; Horowitz, ISSCC 2014
    pj_spm_byte: float = 12.5  # 1 MB SRAM; Horowitz, ISSCC 2014
    pj_acc_byte: float = 2.5  # 32 KB SRAM; Horowitz, ISSCC 2014
    pj_dram_byte: float = 64.0  # LPDDR4; accelergy-cacti-plug-in

    def __post_init__(self) -> None:
        """Refuse impossible numbers at once, by field name."""
        for field, words in WORDS.items():
            if getattr(self, field) not in words:
                raise TargetError(f"{field} is {getattr(self, field)!r}", hint=f"use {' or '.join(map(repr, words))}")
        for field in ("rows", "cols", "depth", "spm_bytes", "acc_bytes", "alignment", "dram_bytes", "vec_lanes", "dram_burst_bytes"):
            if not 1 <= getattr(self, field) < LIMIT:
                raise TargetError(f"{field} is {getattr(self, field)}", hint="it must be at least 1, and below 2**48")
        energies = ("pj_mac", "pj_vector", "pj_spm_byte", "pj_acc_byte", "pj_dram_byte")
        for field in ("pipeline_depth", "dram_latency", "vec_startup", "host_latency", *energies):
            if not 0 <= getattr(self, field) < LIMIT:
                raise TargetError(f"{field} is {getattr(self, field)}", hint="it cannot be negative, nan or 2**48 and above")
        for field in ("dram_bytes_per_cycle", "clock_hz"):
            if not 0 < getattr(self, field) < LIMIT:
                raise TargetError(f"{field} is {getattr(self, field)}", hint="it must be above 0, and below 2**48")
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        for word in self.formats:
            if not _FORMAT.fullmatch(word):
                raise TargetError(f"weight_formats names {word!r}", hint="it lists some of nm:N:M (as nm:2:4), block, mask and s4")
        if self.skip in ("weights", "activations", "both") and self.family != "mac":
            raise TargetError(f"skip is {self.skip!r}", hint="values flow through a systolic array in lock step: use 'structured', or family 'mac'")
        if self.skip == "structured" and self.family == "systolic" and self.dataflow != "ws":
            raise TargetError("skip is 'structured'", hint="of the systolic arrays only the weight stationary one (dataflow 'ws') skips")

    @property
    def skips_inputs(self) -> bool:
        """Whether cycles depend on zeros in the data of a run."""
        return self.skip in ("activations", "both")

    @property
    def formats(self) -> tuple[str, ...]:
        """The weight formats, each a word."""
        return tuple(self.weight_formats.split())

    @property
    def macs_per_cycle(self) -> int:
        """Peak multiply-accumulates per cycle of the matrix engine."""
        return self.rows * self.cols * (self.depth if self.family == "mac" else 1)


def target_names() -> list[str]:
    """The targets that come with the package."""
    return sorted(path.stem for path in TARGETS_FOLDER.glob("*.toml"))


def load_target(name: str | Path | Target) -> Target:
    """A target by its name (`edge`), by its TOML file, or as it is. Raises TargetError."""
    if isinstance(name, Target):
        return name
    path = Path(name) if str(name).endswith(".toml") else TARGETS_FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(target_names())
        raise TargetError(f"no target {str(name)!r}", hint=f"known: {known}; or give a .toml file (npucc targets NAME prints one to copy)")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"not a TOML file: {error}", file=str(path)) from error
    return target_from_fields({"name": path.stem, **fields}, file=str(path))


def target_from_fields(fields: dict[str, Any], *, file: str = "") -> Target:
    """Build a Target from plain values, checking names and types. Raises TargetError."""
    known = {field.name: field for field in dataclasses.fields(Target)}
    checked: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in known:
            raise TargetError(f"unknown field {key!r}", file=file, hint=f"known fields: {', '.join(known)}")
        wanted = {"int": int, "float": float, "str": str, "bool": bool}[str(known[key].type)]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise TargetError(f"{key} is {value!r}", file=file, hint=f"expected {known[key].type}")
        checked[key] = value
    return Target(**checked)
