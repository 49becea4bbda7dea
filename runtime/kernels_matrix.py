"""The matrix engine's instructions: conv, matmul, dwconv.

The one big idea: a convolution gathers its windows into the rows of a float matrix and becomes an exact matrix product. Windows
are gathered along one row of the input only; the vertical taps are whole-row offsets into that matrix, so each input value is
copied kernel-width times, not kernel-width x kernel-height times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from runtime.gemm import EXACT, LARGEST, FloatSums, Part, bind_product, bind_store, cut, cut_evenly, float_sums, working_type
from runtime.memory import Array
from runtime.scratch import PIECE
from runtime.site import Run, Site, sequence
from runtime.windows import Geometry, gather, geometry, pad

#: below this many values per row of windows the BLAS calls get too small: gather whole windows instead
SHORT_WINDOW = 48


def bind_conv(site: Site) -> Run:
    """y[h,w,n] = (b[n] or y) + windows of x times w."""
    groups, shape = int(site.attributes["groups"]), geometry(site, site.views["w"].shape[:2])
    return _plain_conv(site, shape) if groups == 1 else _grouped_conv(site, shape, groups)


def _plain_conv(site: Site, shape: Geometry) -> Run:
    x, w, y = site.views["x"], site.views["w"], site.views["y"]
    dtype = working_type(x.dtype)
    weights = _weights(site, "w", dtype, lambda stored: stored.reshape(-1, stored.shape[-1]))
    columns, lefts = _columns(site, shape, dtype)
    depth = len(weights.matrix) // len(lefts)
    parts = [part for k, left in enumerate(lefts) for part in weights.cut(left, LARGEST[x.dtype], slice(k * depth, (k + 1) * depth))]
    return sequence(columns, weights.refresh, _product(site, parts, y.reshape(-1, w.shape[3]) if _mergeable(y) else y, site.views.get("b"), shape))


def _product(site: Site, parts: list[Part], y: Array, bias: Array | None, shape: Geometry | None = None) -> Run:
    if y.ndim == 3 and shape is not None:  # a padded accumulator tile: matrices of one output row each
        height, width = shape.outputs
        parts = [Part(part.left.reshape(height, width, -1), part.right, part.bound) for part in parts]
    accumulate = bool(site.attributes["accumulate"])
    floats = None if accumulate or y.ndim > 2 else _float_sums(site, parts[0].left.dtype, sum(part.bound for part in parts))
    return bind_product(parts, y, site.scratch, bias=bias, accumulate=accumulate, floats=floats)


def _float_sums(site: Site, dtype: np.dtype[Any], bound: int) -> FloatSums | None:
    """Offer sums of this type and largest magnitude as float32, where they and the bias are exact in it."""
    name = "c" if site.instruction.name == "matmul" else "b"
    if name in site.views and name not in site.constants:
        return None
    floats = float_sums(dtype, bound, site.constants.get(name) if name in site.views else None)
    if floats is not None:
        site.offered.append(floats)
    return floats


def _mergeable(y: Array) -> bool:
    """Whether [h, w, n] can be seen as [h·w, n] in place."""
    return bool(y.shape[0] == 1 or y.shape[1] == 1 or y.strides[0] == y.strides[1] * y.shape[1])


@dataclass(frozen=True, slots=True)
class Weights:
    """An operand as the float `matrix` that a product takes, and how to bring that up to date.

    `content`: the integers that the matrix will hold in every run, if they are known; `largest` bounds their magnitude in any case.
    `refresh` is None where the matrix already holds them: the step before that used the same memory decoded the same operand.
    """

    matrix: Array
    refresh: Run | None
    content: Array | None
    largest: int

    def cut(self, left: Array, largest: int, rows: slice = slice(None)) -> list[Part]:
        """left (its values at most `largest`) times some rows of the matrix, as exact parts."""
        matrix = self.matrix[..., rows, :]
        if self.content is None:
            return cut_evenly(left, matrix, largest * self.largest)
        return cut(left, matrix, self.content[..., rows, :], largest=largest)


def _weights(site: Site, name: str, dtype: np.dtype[Any], arrange: Callable[[Array], Array], *, zero: int = 0, variant: int = 0) -> Weights:
    """Operand `name` less `zero`, arranged. `variant` tells apart what `arrange` makes of the same content.

    Constants are decoded at each use, into memory that is still in the cache when the product reads it: keeping them as float32
    would take four times their size and be hardly faster.
    """
    stored = site.views[name]
    decoded = site.scratch.take("weights", stored.shape, dtype)
    arranged = arrange(decoded)
    in_place = np.may_share_memory(arranged, decoded)
    matrix = arranged if in_place else site.scratch.take("matrix", arranged.shape, dtype)
    key = (site.constants[name][0], dtype, zero, site.instruction.name, variant) if name in site.constants else None
    held = [site.scratch.holds(array, key) for array in (decoded, matrix)]

    def refresh() -> None:
        np.copyto(decoded, stored)
        if zero:
            np.subtract(decoded, zero, out=decoded)
        if not in_place:
            np.copyto(matrix, arrange(decoded))

    content = None if key is None else arrange(stored.astype(np.int16) - zero if zero else stored)
    return Weights(matrix, None if all(held) else refresh, content, LARGEST[np.dtype(np.int8)] + abs(zero))


def _columns(site: Site, shape: Geometry, dtype: np.dtype[Any]) -> tuple[Run | None, list[Array]]:
    """The left matrices [h·w, depth], one per equal share of the weights' rows, and the closure that gathers them."""
    channels = site.views["x"].shape[2]
    if shape.kernel[0] == 1 or shape.kernel[1] * channels < SHORT_WINDOW:
        return _whole_windows(site, shape, dtype)
    padded = pad(site, shape, int(site.attributes["zero"]))
    stride, width = shape.stride[0], shape.outputs[1]
    starts = [k * shape.dilation[0] for k in range(shape.kernel[0])]
    phases = sorted({start % stride for start in starts})
    rows = {phase: max(start // stride for start in starts if start % stride == phase) + shape.outputs[0] for phase in phases}
    depth = shape.kernel[1] * channels
    buffer = site.scratch.take("columns", (sum(rows.values()), width, depth), dtype)
    targets, first = {}, 0
    for phase in phases:
        targets[phase] = buffer[first : first + rows[phase]]
        first += rows[phase]
    copies = []
    for phase in phases:
        line = Geometry((rows[phase], width), (1, shape.kernel[1]), shape.stride, shape.dilation, shape.pad)
        copies.append((targets[phase].reshape(rows[phase], width, 1, shape.kernel[1], channels), gather(padded.array[phase:], line)))
    lefts = [targets[start % stride][start // stride :][: shape.outputs[0]].reshape(-1, depth) for start in starts]
    return None if site.scratch.holds(buffer, site.window) else _gathering(padded.refresh, copies), lefts


def _whole_windows(site: Site, shape: Geometry, dtype: np.dtype[Any]) -> tuple[Run | None, list[Array]]:
    padded = pad(site, shape, int(site.attributes["zero"]))
    windows = gather(padded.array, shape)
    buffer = site.scratch.take("columns", windows.shape, dtype)
    gathering = None if site.scratch.holds(buffer, site.window) else _gathering(padded.refresh, [(buffer, windows)])
    return gathering, [buffer.reshape(-1, shape.taps * windows.shape[4])]


def _gathering(refresh: Run, copies: list[tuple[Array, Array]]) -> Run:
    def run() -> None:
        refresh()
        for target, source in copies:
            np.copyto(target, source)

    return run


def _grouped_conv(site: Site, shape: Geometry, groups: int) -> Run:
    """Groups side by side: left [G, h·w, taps·g], weights [G, taps·g, n/G]."""
    x, w, y = site.views["x"], site.views["w"], site.views["y"]
    dtype, (height, width) = working_type(x.dtype), shape.outputs
    share, outputs = w.shape[2], w.shape[3] // groups
    weights = _weights(site, "w", dtype, lambda stored: stored.reshape(-1, groups, outputs).swapaxes(0, 1), variant=groups)
    padded = pad(site, shape, int(site.attributes["zero"]))
    windows = _split_channels(gather(padded.array, shape), groups)
    buffer = site.scratch.take("columns", (groups, height, width, *shape.kernel, share), dtype)
    held = site.scratch.holds(buffer, site.window)
    gathering = None if held else _gathering(padded.refresh, [(buffer.transpose(1, 2, 3, 4, 0, 5), windows)])
    parts = weights.cut(buffer.reshape(groups, height * width, -1), LARGEST[x.dtype])
    shares = _split_channels(y, groups)
    target = shares.reshape(height * width, groups, outputs).swapaxes(0, 1) if _mergeable(y) else None
    bias = site.views["b"].reshape(groups, 1, outputs) if "b" in site.views else None
    if target is not None:
        return sequence(gathering, weights.refresh, _product(site, parts, target, bias))
    whole = site.scratch.take("accumulators", (groups, height * width, outputs), np.int32)
    rows = whole.reshape(groups, height, width, outputs).transpose(1, 2, 0, 3)
    fetch = (lambda: np.copyto(rows, shares)) if site.attributes["accumulate"] else None
    return sequence(gathering, weights.refresh, fetch, _product(site, parts, whole, bias), lambda: np.copyto(shares, rows))


def _split_channels(array: Array, groups: int) -> Array:
    """[..., c] as [..., groups, c / groups] in place."""
    share, channel = array.shape[-1] // groups, array.strides[-1]
    return as_strided(array, (*array.shape[:-1], groups, share), (*array.strides[:-1], share * channel, channel))


def bind_matmul(site: Site) -> Run:
    """y[m,n] = (c[n] or y) + (a - za)[m,k] times (b - zb)[k,n]."""
    a, y = site.views["a"], site.views["y"]
    zero_a, zero_b = int(site.attributes["za"]), int(site.attributes["zb"])
    dtype = working_type(a.dtype)
    left = site.scratch.take("left", a.shape, dtype)
    right = _weights(site, "b", dtype, lambda stored: stored, zero=zero_b)
    parts = right.cut(left, LARGEST[a.dtype] + abs(zero_a))

    def refresh_left() -> None:
        np.copyto(left, a)
        if zero_a:
            np.subtract(left, zero_a, out=left)

    return sequence(refresh_left, right.refresh, _product(site, parts, y, site.views.get("c")))


def bind_dwconv(site: Site) -> Run:
    """y[h,w,c] = (b[c] or y) + windows of each channel times its taps, summed over the taps of whole rows at once."""
    y, x, shape = site.views["y"], site.views["x"], geometry(site, site.views["w"].shape[:2])
    bound = shape.taps * LARGEST[x.dtype] * LARGEST[np.dtype(np.int8)]
    dtype = next(kind for kind, limit in EXACT.items() if bound <= limit)
    refresh_taps, taps = _tap_rows(site, shape, dtype)
    refresh_weights, weights = _repeated_taps(site, dtype)
    product = site.scratch.take("product", y.shape, dtype)
    total, block = product.reshape(len(y), -1), max(1, PIECE // y[0].size)
    work = [(taps[:, :, row : row + block], total[row : row + block]) for row in range(0, len(y), block)]
    floats = None if site.attributes["accumulate"] else _float_sums(site, dtype, bound)

    def multiply() -> None:
        for windows, sums in work:
            np.einsum("klhw,klw->hw", windows, weights, out=sums)

    store = bind_store(product, y, site.scratch, bias=site.views.get("b"), accumulate=bool(site.attributes["accumulate"]), floats=floats)
    return sequence(refresh_taps, refresh_weights, multiply, store)


def _tap_rows(site: Site, shape: Geometry, dtype: np.dtype[Any]) -> tuple[Run, Array]:
    """The values that each tap multiplies, as [k, l, h, w·c], and the closure that brings them up to date.

    With a stride across, each of the l taps gets a copy of its own, so that those of neighbouring outputs lie side by side.
    """
    zero, (height, width) = int(site.attributes["zero"]), shape.outputs
    channels = site.views["x"].shape[2]
    if shape.stride[1] == 1:
        padded = pad(site, shape, zero, dtype)
        rows, (row, across, _) = padded.array, padded.array.strides
        refresh, step = padded.refresh, across * shape.dilation[1]
    else:
        padded = pad(site, shape, zero)
        line = Geometry((shape.reach(0), width), (1, shape.kernel[1]), (1, shape.stride[1]), shape.dilation, shape.pad)
        rows = site.scratch.take("taps", (shape.kernel[1], shape.reach(0), width, channels), dtype)
        step, row = rows.strides[:2]
        refresh = _gathering(padded.refresh, [(rows.transpose(1, 2, 0, 3), gather(padded.array, line)[:, :, 0])])
    strides = (row * shape.dilation[0], step, row * shape.stride[0], rows.itemsize)
    return refresh, as_strided(rows, (*shape.kernel, height, width * channels), strides)


def _repeated_taps(site: Site, dtype: np.dtype[Any]) -> tuple[Run | None, Array]:
    """The taps [k, l, c] once for each output of a row, as [k, l, w·c], and how to bring them up to date (None: they are)."""
    width = site.views["y"].shape[1]
    stored = site.views["w"]
    repeated = site.scratch.take("matrix", (*stored.shape[:2], width, stored.shape[2]), dtype)
    key = (site.constants["w"][0], dtype, site.instruction.name, width) if "w" in site.constants else None
    refresh = None if site.scratch.holds(repeated, key) else lambda: np.copyto(repeated, stored[:, :, None])
    return refresh, repeated.reshape(*stored.shape[:2], -1)
