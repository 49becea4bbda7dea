"""Host segments: what the NPU leaves to an engine outside, on tensors in DRAM.

The one big idea: the machine knows nothing of what a segment computes. It collects the inputs that `take` hands over, calls the engine
that its owner gave it with the number of the segment, and keeps the results for `give`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.errors import RuntimeFault
from runtime.memory import NAMES, Array
from runtime.requantize import DEFAULT_CLAMP, round_and_clamp
from runtime.site import Run, Site

#: (number of the segment, its inputs by port) → its outputs by port
HostEngine = Callable[[int, Sequence[Array]], Sequence[Array]]


class Host:
    """The host's side of one run: what was taken since the last segment, and what that segment returned."""

    def __init__(self, engine: HostEngine | None):
        self.engine = engine
        self.taken: dict[int, Array] = {}
        self.results: list[Array] = []

    def run(self, segment: int, *, line: int = 0) -> None:
        """Run a segment on what was taken. Raises RuntimeFault when there is no engine, or the inputs have gaps."""
        if self.engine is None:
            told = f"the program has host segment {segment}, but the machine has no host"
            raise RuntimeFault(told, line=line, hint="give Machine(..., host=engine), or compile with --no-host")
        inputs = [self.taken[port] for port in sorted(self.taken)]
        if sorted(self.taken) != list(range(len(inputs))):
            raise RuntimeFault(f"segment {segment} is given inputs {sorted(self.taken)}", line=line, hint="take ports from 0 on, without gaps")
        self.taken = {}
        self.results = [np.asarray(value) for value in self.engine(segment, inputs)]


def bind_take(site: Site) -> Run:
    """x as the segment's element type."""
    x, host, port = site.views["x"], _host(site), site.attributes["port"]
    (scale, zero), dtype = site.attributes["q"], np.dtype(site.attributes["type"])

    def take() -> None:
        host.taken[port] = to_host(x, scale, zero, dtype)

    return take


def bind_host(site: Site) -> Run:
    """The segment itself."""
    host, segment, line = _host(site), site.attributes["segment"], site.instruction.line
    return lambda: host.run(segment, line=line)


def bind_give(site: Site) -> Run:
    """A result of the last segment into its tile."""
    y, host, port = site.views["y"], _host(site), site.attributes["port"]
    scale, zero = site.attributes["q"]

    def give() -> None:
        if port >= len(host.results):
            site.fault(f"the last segment has {len(host.results)} outputs, so none with the number {port}")
        value = host.results[port]
        if value.shape != y.shape:
            site.fault(
                f"output {port} of the segment has shape {list(value.shape)}, but the program holds {list(y.shape)}",
                "shapes that depend on data are fixed when the program is compiled",
            )
        np.copyto(y, from_host(value, scale, zero, y.dtype))

    return give


def to_host(stored: Array, scale: float, zero: int, dtype: np.dtype[Any]) -> Array:
    """real(x) in the segment's element type; integers and floats that stand for themselves go over unchanged."""
    if dtype.kind == "b":
        return np.asarray(stored != zero)
    if stored.dtype.kind == "f" or (dtype.kind != "f" and (scale, zero) == (1.0, 0)):
        return np.array(stored, dtype)
    real = (stored.astype(np.int64) - zero).astype(np.float32) * np.float32(scale)
    return np.asarray(real if dtype.kind == "f" else np.rint(real)).astype(dtype)


def from_host(value: Array, scale: float, zero: int, dtype: np.dtype[Any]) -> Array:
    """The stored form of a segment's result."""
    if dtype.kind == "f" or (value.dtype == dtype and (scale, zero) == (1.0, 0)):
        return value.astype(dtype)
    if value.dtype.kind != "f" and scale == 1.0:
        limits = np.iinfo(dtype)
        shifted = np.clip(value.astype(np.int64), -(1 << 62), 1 << 62) + zero
        return np.clip(shifted, int(limits.min), min(int(limits.max), (1 << 63) - 1)).astype(dtype)
    if NAMES[dtype] not in ("s8", "u8", "s16", "s32"):
        raise RuntimeFault(f"a segment's {value.dtype} result can't be stored as {NAMES[dtype]} with a scale", hint="use s8, u8, s16 or s32")
    with np.errstate(over="ignore", invalid="ignore"):
        steps = value.astype(np.float32) / np.float32(scale)
    return round_and_clamp(np.array(steps), zero, NAMES[dtype], DEFAULT_CLAMP)


def _host(site: Site) -> Host:
    assert site.host is not None
    host: Host = site.host
    return host
