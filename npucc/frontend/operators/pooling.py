"""Pools over windows."""

from __future__ import annotations

import math

import numpy as np

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.windows import Windows, in_2d, read_windows


def _windows(node: NodeImport) -> Windows:
    kernel = node.integers("kernel_shape")
    if kernel is None or len(kernel) != node.rank() - 2:
        raise node.refuse(f"kernel_shape={kernel} does not fit an input of shape {list(node.shape(0))}", hint="the model is damaged; export it again")
    return read_windows(node, kernel)


def max_pool(node: NodeImport) -> str:
    """Largest value of each window; padding never wins."""
    windows = _windows(node)
    attributes = ops.Pool(windows.kernel, windows.strides, windows.pads, windows.dilations)
    return in_2d(node, node.input(0), lambda x: node.emit("max_pool", (x,), attributes))


def average_pool(node: NodeImport) -> str:
    """Mean of each window, with or without its padding."""
    windows = _windows(node)
    return in_2d(node, node.input(0), lambda x: _average(node, x, windows, bool(node.integer("count_include_pad", 0))))


def _average(node: NodeImport, x: str, windows: Windows, include: bool) -> str:
    """Padding that ceil mode adds is never counted; if stated padding is, that becomes a Pad."""
    if include and windows.extra != (0, 0):
        before, after = (0, 0, *windows.begins), (0, 0, *windows.ends)
        x = node.emit("pad", (x,), ops.Pad(before, after)) if any(before + after) else x
        windows = Windows(windows.kernel, windows.strides, windows.dilations, extra=windows.extra)
        include = False
    include = include and any(windows.pads)
    if windows.dilations != (1, 1):
        return _dilated_average(node, x, windows, include)
    return node.emit("average_pool", (x,), ops.Pool(windows.kernel, windows.strides, windows.pads, windows.dilations, include))


def _dilated_average(node: NodeImport, x: str, windows: Windows, include: bool) -> str:
    """As a depthwise convolution with equal weights, which can't leave padding out of the mean."""
    if any(windows.pads) and not include:
        raise node.refuse("has dilations and padding that is not counted")
    channels = node.shape_of(x)[1]
    weights = np.full((channels, 1, *windows.kernel), 1 / math.prod(windows.kernel))
    attributes = ops.Conv(windows.strides, windows.pads, windows.dilations, channels)
    return node.emit("conv", (x, node.new_constant(weights, "weights")), attributes)


def global_average_pool(node: NodeImport) -> str:
    """Mean over the spatial dimensions."""
    return node.reduce("reduce_mean", node.input(0), range(2, node.rank()))


def global_max_pool(node: NodeImport) -> str:
    """Maximum over the spatial dimensions."""
    return node.reduce("reduce_max", node.input(0), range(2, node.rank()))


TABLE: tuple[Importer, ...] = (
    Importer("MaxPool", max_pool, "1-D and 2-D, without indices"),
    Importer("AveragePool", average_pool, "1-D and 2-D"),
    Importer("GlobalAveragePool", global_average_pool),
    Importer("GlobalMaxPool", global_max_pool),
)
