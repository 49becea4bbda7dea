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

from runtime.gemm import EXACT, LARGEST, FloatSums, Part, bind_product, cut, cut_evenly, float_sums, to_int32, working_type
from runtime.memory import Array
from runtime.scratch import PIECE
from runtime.site import Site
from runtime.windows import Geometry, gather, geometry, pad, tap

Run = Callable[[], None]
#: below this many values per row of windows the BLAS calls get too small: gather whole windows instead
SHORT_WINDOW = 48
#: a float32 sum of this many int8 x int8 products is always exact
EXACT_TAPS = 1 << 10


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
    return _sequence(columns, weights.refresh, _product(site, parts, y.reshape(-1, w.shape[3]) if _mergeable(y) else y, site.views.get("b"), shape))


def _product(site: Site, parts: list[Part], y: Array, bias: Array | None, shape: Geometry | None = None) -> Run:
    if y.ndim == 3 and shape is not None:  # a padded accumulator tile: matrices of one output row each
        height, width = shape.outputs
        parts = [Part(part.left.reshape(height, width, -1), part.right, part.bound) for part in parts]
    accumulate = bool(site.attributes["accumulate"])
    floats = None if accumulate or y.ndim > 2 else _float_sums(site, parts)
    return bind_product(parts, y, site.scratch, bias=bias, accumulate=accumulate, floats=floats)


def _float_sums(site: Site, parts: list[Part]) -> FloatSums | None:
    """Offer the sums as float32 where they and the bias are exact in it."""
    name = "c" if site.instruction.name == "matmul" else "b"
    if name in site.views and name not in site.constants:
        return None
    floats = float_sums(parts, site.constants.get(name) if name in site.views else None)
    if floats is not None:
        site.offered.append(floats)
    return floats


def _mergeable(y: Array) -> bool:
    """Whether [h, w, n] can be seen as [h·w, n] in place."""
    return bool(y.shape[0] == 1 or y.shape[1] == 1 or y.strides[0] == y.strides[1] * y.shape[1])


def _sequence(*steps: Run | None) -> Run:
    """One closure for several."""
    present = [step for step in steps if step is not None]
    if len(present) == 1:
        return present[0]

    def run() -> None:
        for step in present:
            step()

    return run


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
    stored = site.constants[name][1] if name in site.constants else site.views[name]
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
        return _sequence(gathering, weights.refresh, _product(site, parts, target, bias))
    whole = site.scratch.take("accumulators", (groups, height * width, outputs), np.int32)
    rows = whole.reshape(groups, height, width, outputs).transpose(1, 2, 0, 3)
    fetch = (lambda: np.copyto(rows, shares)) if site.attributes["accumulate"] else None
    return _sequence(gathering, weights.refresh, fetch, _product(site, parts, whole, bias), lambda: np.copyto(shares, rows))


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

    return _sequence(refresh_left, right.refresh, _product(site, parts, y, site.views.get("c")))


def bind_dwconv(site: Site) -> Run:
    """y[h,w,c] = (b[c] or y) + windows of each channel times its taps: one multiply-add over whole rows per tap."""
    shape = geometry(site, site.views["w"].shape[:2])
    dtype, groups = _tap_groups(site, shape)
    repeat = shape.outputs[1]
    weights = _weights(site, "w", dtype, lambda stored: np.tile(stored.reshape(shape.taps, -1), (1, repeat)), variant=repeat)
    refresh, taps = _tap_rows(site, shape, dtype)
    terms = [[(taps[index], weights.matrix[index]) for index in group] for group in groups]
    return _sequence(refresh, weights.refresh, _multiply_add(site, terms, dtype))


def _tap_groups(site: Site, shape: Geometry) -> tuple[np.dtype[Any], list[list[int]]]:
    """The type to multiply in, and the taps in groups whose sums it holds exactly.

    Known int8 weights: int16, the fastest, with groups from their magnitudes; else float32 or float64, all taps in one group.
    """
    everything = list(range(shape.taps))
    if site.views["x"].dtype != np.int8 or ("w" not in site.constants and shape.taps > EXACT_TAPS):
        return np.dtype(np.float64), [everything]
    if "w" not in site.constants:
        return np.dtype(np.float32), [everything]
    key, content = site.constants["w"]
    memo = ("taps", key)
    if memo not in site.memo:
        site.memo[memo] = _grouped(LARGEST[np.dtype(np.int8)] * np.abs(content.reshape(shape.taps, -1).astype(np.int32)), EXACT[np.dtype(np.int16)])
    return np.dtype(np.int16), site.memo[memo]


def _grouped(magnitudes: Array, limit: int) -> list[list[int]]:
    """Consecutive rows of `magnitudes` [taps, c] in groups that sum to at most `limit` in every column."""
    groups: list[list[int]] = []
    total = magnitudes[0]
    for index, row in enumerate(magnitudes):
        if groups and (total + row).max() <= limit:
            groups[-1].append(index)
            total = total + row
        else:
            groups.append([index])
            total = row
    return groups


def _tap_rows(site: Site, shape: Geometry, dtype: np.dtype[Any]) -> tuple[Run, list[Array]]:
    """For each tap the values it multiplies as [h, w·c] rows, and the closure that converts the input to float."""
    padded = pad(site, shape, int(site.attributes["zero"]))
    stride, width = shape.stride[1], shape.outputs[1]
    starts = [tap_index * shape.dilation[1] for tap_index in range(shape.kernel[1])]
    converted, copies = {}, []
    for phase in sorted({start % stride for start in starts}):
        source = padded.array[:, phase::stride]
        converted[phase] = site.scratch.take(f"phase{phase}", source.shape, dtype)
        copies.append((converted[phase], source))
    taps = []
    for k in range(shape.kernel[0]):
        for start in starts:
            chosen = converted[start % stride][:, start // stride :][:, :width]
            rows = tap(chosen, shape, 0, k)
            taps.append(_join_columns(rows))
    return _gathering(padded.refresh, copies), taps


def _join_columns(rows: Array) -> Array:
    """[h, w, c] with dense (w, c) as [h, w·c] in place."""
    height, width, channels = rows.shape
    return as_strided(rows, (height, width * channels), (rows.strides[0], rows.itemsize))


def _multiply_add(site: Site, groups: list[list[tuple[Array, Array]]], dtype: np.dtype[Any]) -> Run:
    """Sum of taps [h, w·c] times weights [w·c] into y, in blocks of rows that stay in the cache; groups are added as int32."""
    y, bias, keep = site.views["y"], site.views.get("b"), bool(site.attributes["accumulate"])
    height, width, channels = y.shape
    block = max(1, PIECE // (width * channels))
    work = []
    for start in range(0, height, block):
        part = y[start : start + block]
        total, product = (site.scratch.take(role, (part.shape[0], width * channels), dtype) for role in ("total", "term"))
        terms = [[(rows[start : start + block], weights) for rows, weights in group] for group in groups]
        work.append((part, total, product, total.reshape(part.shape), site.scratch.take("integers", part.shape, np.int32), terms))

    def run() -> None:
        for part, total, product, shaped, whole, terms in work:
            adding = keep
            for (first, weights), *others in terms:
                np.multiply(first, weights, out=total)
                for rows, weights in others:
                    np.multiply(rows, weights, out=product)
                    np.add(total, product, out=total)
                to_int32(shaped, whole if adding else part)
                if adding:
                    np.add(part, whole, out=part)
                adding = True
            if bias is not None:
                np.add(part, bias, out=part)

    return run
