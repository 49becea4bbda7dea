"""Pools over windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.windows import Sizes, Windows, in_2d, pool_volume, read_windows


def _windows(node: NodeImport) -> Windows:
    kernel = node.integers("kernel_shape")
    if kernel is None or len(kernel) != node.rank() - 2:
        raise node.refuse(f"kernel_shape={kernel} does not fit an input of shape {list(node.shape(0))}", hint="the model is damaged; export it again")
    return read_windows(node, kernel)


def _pooled(node: NodeImport, windows: Windows, pool: Callable[[str, Windows], str], x: str = "") -> str:
    """A pool over one to three spatial dimensions."""
    x = x or node.input(0)
    if node.rank() == 5:
        return pool_volume(node, x, windows, pool)
    return in_2d(node, x, lambda image: pool(image, windows))


def max_pool(node: NodeImport) -> str:
    """Largest value of each window; padding never wins."""

    def pool(image: str, windows: Windows) -> str:
        return node.emit("max_pool", (image,), ops.Pool(_two(windows.kernel), _two(windows.strides), windows.pads, _two(windows.dilations)))

    return _pooled(node, _windows(node), pool)


def _two(sizes: Sizes) -> tuple[int, int]:
    return (sizes[0], sizes[1])


def average_pool(node: NodeImport) -> str:
    """Mean of each window, with or without its padding."""
    include = bool(node.integer("count_include_pad", 0))
    return _pooled(node, _windows(node), lambda image, windows: _average(node, image, windows, include))


def lp_pool(node: NodeImport) -> str:
    """The p-norm of each window: a mean over all of it, padding too, times its size."""
    windows = _windows(node)
    windows = replace(windows, ends=tuple(map(sum, zip(windows.ends, windows.extra, strict=True))), extra=(0,) * len(windows.extra))
    size = float(math.prod(windows.kernel))
    before, after = _norm(node)
    mean = _pooled(node, windows, lambda image, part: _average(node, image, part, True, wide=True), node.table(before, node.input(0), wide=True))
    return node.table(scalar.compose(after, ("mul", "x", size)), mean)


def global_lp_pool(node: NodeImport) -> str:
    """The p-norm over the spatial dimensions."""
    before, after = _norm(node)
    return node.table(after, node.reduce("reduce_sum", node.table(before, node.input(0)), range(2, node.rank())))


def _norm(node: NodeImport) -> tuple[scalar.Expression, scalar.Expression]:
    """|x|ᵖ and its inverse."""
    p = node.integer("p", 2)
    if p == 1:
        return ("abs", "x"), "x"
    return (("mul", "x", "x"), ("sqrt", "x")) if p == 2 else (("pow", ("abs", "x"), float(p)), ("pow", "x", 1 / p))


def _average(node: NodeImport, x: str, windows: Windows, include: bool, *, wide: bool = False) -> str:
    """Padding that ceil mode adds is never counted; if stated padding is, that becomes a Pad."""
    if include and any(windows.extra):
        before, after = (0, 0, *windows.begins), (0, 0, *windows.ends)
        x = node.emit("pad", (x,), ops.Pad(before, after)) if any(before + after) else x
        windows = replace(windows, begins=(0, 0), ends=(0, 0))
        include = False
    include = include and any(windows.pads)
    if windows.dilations != (1, 1):
        return _dilated_average(node, x, windows, include)
    attributes = ops.Pool(_two(windows.kernel), _two(windows.strides), windows.pads, _two(windows.dilations), include)
    return node.emit("average_pool", (x,), attributes, wide=wide)


def _dilated_average(node: NodeImport, x: str, windows: Windows, include: bool) -> str:
    """As a depthwise convolution with equal weights; padding that is not counted scales the results near the edge."""
    _, channels, *size = node.shape_of(x)
    weights = np.full((channels, 1, *windows.kernel), 1 / math.prod(windows.kernel))
    attributes = ops.Conv(_two(windows.strides), windows.pads, _two(windows.dilations), channels)
    mean = node.emit("conv", (x, node.new_constant(weights, "weights")), attributes)
    if include or not any(windows.pads):
        return mean
    share = [_inside(size[i], windows, i, node.shape_of(mean)[2 + i]) for i in (0, 1)]
    return node.binary("mul", mean, node.new_constant(1 / np.outer(share[0], share[1]), "uncounted"))


def _inside(size: int, windows: Windows, i: int, count: int) -> np.ndarray:
    """Which share of each window lies inside the image, along one dimension."""
    taps = np.arange(count)[:, None] * windows.strides[i] + np.arange(windows.kernel[i]) * windows.dilations[i] - windows.begins[i]
    return np.asarray(((taps >= 0) & (taps < size)).mean(axis=1))


def global_average_pool(node: NodeImport) -> str:
    """Mean over the spatial dimensions."""
    return node.reduce("reduce_mean", node.input(0), range(2, node.rank()))


def global_max_pool(node: NodeImport) -> str:
    """Maximum over the spatial dimensions."""
    return node.reduce("reduce_max", node.input(0), range(2, node.rank()))


TABLE: tuple[Importer, ...] = (
    Importer("MaxPool", max_pool, "1-D to 3-D, without indices"),
    Importer("AveragePool", average_pool, "1-D to 3-D"),
    Importer("LpPool", lp_pool, "1-D to 3-D"),
    Importer("GlobalLpPool", global_lp_pool),
    Importer("GlobalAveragePool", global_average_pool),
    Importer("GlobalMaxPool", global_max_pool),
)
