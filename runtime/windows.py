"""Sliding windows: where the taps of a convolution or pooling window lie in their input tile.

The one big idea: every tap of every output is an element of one strided view of the (padded) input, so gathering windows is a
single copy, and "one tap for all outputs" is a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from runtime.memory import Array
from runtime.site import Site


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a window over an input tile. All pairs are (down, across); `pad` is top, left, bottom, right."""

    outputs: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pad: tuple[int, int, int, int]

    @property
    def padded(self) -> bool:
        return any(self.pad)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def reach(self, axis: int) -> int:
        """Rows (axis 0) or columns (axis 1) of the padded input that the outputs touch."""
        return (self.outputs[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1


def geometry(site: Site, kernel: tuple[int, int]) -> Geometry:
    """The geometry of an instruction with operands y[h,w,·] and x[u,v,·]. Faults when the window leaves the padded input.

    Loading has asked that before; here it guards the views below, which trust it.
    """
    attributes = site.attributes
    shape = Geometry(site.views["y"].shape[:2], kernel, attributes["stride"], attributes["dilation"], attributes["pad"])
    for axis, name in ((0, "rows"), (1, "columns")):
        size = site.views["x"].shape[axis] + shape.pad[axis] + shape.pad[axis + 2]
        if shape.reach(axis) > size:
            told = f"the windows touch {shape.reach(axis)} {name}, but x has {size} with its padding"
            site.fault(told, "make x larger, pad more, or compute fewer outputs")
    return shape


@dataclass(frozen=True, slots=True)
class Padded:
    """An input with its padding: `array` [U, V, c], and how to bring it up to date before reading it."""

    array: Array
    source: Array
    interior: Array | None
    fill: int

    def refresh(self) -> None:
        """Copy the tile in, with the padding around it; nothing where it is read in place."""
        if self.interior is not None:
            if self.interior.shape != self.array.shape:
                self.array[...] = self.fill
            np.copyto(self.interior, self.source)


def pad(site: Site, shape: Geometry, fill: int, dtype: np.dtype[Any] | None = None) -> Padded:
    """Operand x with `fill`, a value of its type, around it; as numbers of `dtype`, if there is one."""
    x = site.views["x"]
    if not shape.padded and dtype is None:
        return Padded(x, x, None, fill)
    top, left, bottom, right = shape.pad
    height, width, channels = x.shape
    array = site.scratch.take("padded", (height + top + bottom, width + left + right, channels), dtype or x.dtype)
    return Padded(array, x, array[top : top + height, left : left + width], fill)


def gather(array: Array, shape: Geometry) -> Array:
    """All windows as a view [h, w, k, l, c] of an array [U, V, c] that `geometry` has accepted."""
    down, across, channel = array.strides
    strides = (down * shape.stride[0], across * shape.stride[1], down * shape.dilation[0], across * shape.dilation[1], channel)
    return as_strided(array, (*shape.outputs, *shape.kernel, array.shape[2]), strides, writeable=False)


def tap(array: Array, shape: Geometry, axis: int, index: int) -> Array:
    """The rows (axis 0) or columns (axis 1) of `array` that tap number `index` of the window reads, one per output."""
    start = index * shape.dilation[axis]
    chosen = slice(start, start + (shape.outputs[axis] - 1) * shape.stride[axis] + 1, shape.stride[axis])
    return array[chosen] if axis == 0 else array[:, chosen]
