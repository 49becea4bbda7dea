"""Resize and Upsample.

The one big idea: every resize is separable. Nearest and linear over height and width have an operator of their own; whatever else there is
(cubic, antialiased, cropped, over other dimensions) is a look-up or a product with a constant matrix, dimension by dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from npucc import arithmetic, ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.indexing import along, select
from npucc.frontend.operators.layout import take
from npucc.frontend.operators.windows import in_2d

DIRECT = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
COORDINATES = (*DIRECT, "half_pixel_symmetric", "tf_crop_and_resize")
MODES = ("nearest", "linear", "cubic")
BYTES: dict[int, str] = {TensorProto.UINT8: "uint8", TensorProto.INT8: "int8"}


@dataclass(frozen=True, slots=True)
class _Request:
    """What a node asks for, per dimension of its input. `roi`: start and end of the crop, in shares of the dimension."""

    sizes: list[int]
    scales: list[float]
    mode: str
    coordinates: str
    nearest_mode: str
    roi: list[tuple[float, float]] = field(default_factory=list)


def upsample(node: NodeImport) -> str:
    """Upsample, and Resize of opset 10: scales only, asymmetric coordinates, rounded down (up where it shrinks, as in onnxruntime)."""
    scales = [float(scale) for scale in (node.attribute("scales", None) or ())] or [float(scale) for scale in node.floats(1, "scales").reshape(-1)]
    sizes = [int(size * scale) for size, scale in zip(node.shape(0), scales, strict=True)]
    if len({scale < 1 for scale in scales if scale != 1}) > 1:
        raise node.refuse(f"enlarges one dimension and shrinks another (scales {scales})", hint="export the model with opset 11 or later")
    return _resize(node, _Request(sizes, scales, node.word("mode", "nearest"), "asymmetric", "ceil" if min(scales) < 1 else "floor"))


def resize(node: NodeImport) -> str:
    """By `sizes` or `scales`, over all dimensions or those in `axes`."""
    if node.opset < 11:
        return upsample(node)
    shape = node.shape(0)
    axes = [node.axis(axis, len(shape)) for axis in (node.integers("axes") or range(len(shape)))]
    sizes, scales = list(shape), [1.0] * len(shape)
    if node.has(3) and 0 not in node.shape(3):
        wanted = _kept_aspect(node, [shape[axis] for axis in axes], node.integers_input(3, "sizes"))
        for axis, (size, scale) in zip(axes, wanted, strict=True):
            sizes[axis], scales[axis] = size, scale
    else:
        for axis, scale in zip(axes, node.floats(2, "scales").reshape(-1), strict=True):
            sizes[axis], scales[axis] = int(shape[axis] * scale), float(scale)
    words = node.word("mode", "nearest"), node.word("coordinate_transformation_mode", "half_pixel"), node.word("nearest_mode", "round_prefer_floor")
    return _resize(node, _Request(sizes, scales, *words, _roi(node, axes)))


def _kept_aspect(node: NodeImport, shape: list[int], sizes: list[int]) -> list[tuple[int, float]]:
    """(size, scale) per dimension, with one scale for all where the node asks for that."""
    policy = node.word("keep_aspect_ratio_policy", "stretch")
    ratios = [size / old for size, old in zip(sizes, shape, strict=True)]
    if policy == "stretch":
        return list(zip(sizes, ratios, strict=True))
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [(math.floor(scale * old + 0.5), scale) for old in shape]


def _roi(node: NodeImport, axes: list[int]) -> list[tuple[float, float]]:
    roi = [(0.0, 1.0)] * node.rank()
    if node.word("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        bounds = [float(value) for value in node.floats(1, "roi").reshape(-1)]
        for index, axis in enumerate(axes):
            roi[axis] = (bounds[index], bounds[index + len(axes)])
    return roi


def _resize(node: NodeImport, request: _Request) -> str:
    shape = node.shape(0)
    for word, known in ((request.mode, MODES), (request.coordinates, COORDINATES), (request.nearest_mode, arithmetic.ROUNDINGS)):
        if word not in known:
            raise node.refuse(f"{word!r} is not known; supported are {', '.join(known)}")
    changed = [axis for axis in range(len(shape)) if request.sizes[axis] != shape[axis] or request.scales[axis] != 1]
    if request.coordinates == "tf_crop_and_resize":
        changed = [axis for axis in range(len(shape)) if axis in changed or request.roi[axis] != (0.0, 1.0)]
    if not changed:
        return node.input(0)
    plain = request.mode != "cubic" and request.coordinates in DIRECT and node.word("keep_aspect_ratio_policy", "stretch") == "stretch"
    plain = plain and not (node.integer("antialias", 0) or node.integer("exclude_outside", 0))
    is_image = plain and len(shape) in (3, 4) and min(changed) >= 2
    result = _image(node, request) if is_image else _by_dimension(node, request, changed)
    return result if request.mode == "nearest" or node.element_type(0) not in BYTES else _without_fractions(node, result)


def _without_fractions(node: NodeImport, x: str) -> str:
    """What lies between bytes is rounded towards zero: in steps of 1/128, less nearly half, to the nearest."""
    fine = node.emit("quantize", (x,), ops.Quantize("s16", 1 / 128, 0), dtype="float32")
    dtype, half = BYTES[node.element_type(0)], node.new_constant(127 / 256, "half")
    above = node.emit("sub", (fine, half), ops.Binary((0.0, 255.0)), dtype=dtype)
    if dtype == "uint8":
        return above
    below = node.emit("add", (fine, half), ops.Binary((-128.0, 0.0)), dtype=dtype)
    return node.emit("add", (above, below), ops.Binary(), dtype=dtype)


def _image(node: NodeImport, request: _Request) -> str:
    """Nearest or linear over height and width."""
    size = (request.sizes[-2] if node.rank() == 4 else 1, request.sizes[-1])
    scales = (request.scales[-2] if node.rank() == 4 else 1.0, request.scales[-1])
    if request.mode == "nearest":
        nearest = ops.Resize(request.coordinates, request.nearest_mode, size, scales)
        return in_2d(node, node.input(0), lambda image: node.emit("resize", (image,), nearest))
    linear = ops.Interpolate(request.coordinates, size, scales)
    return in_2d(node, node.input(0), lambda image: node.emit("interpolate", (image,), linear))


def _by_dimension(node: NodeImport, request: _Request, axes: list[int]) -> str:
    x, shape = node.input(0), node.shape(0)
    outside = np.zeros(request.sizes, bool)
    for axis in axes:
        positions = _positions(request, axis, shape[axis])
        if request.coordinates == "tf_crop_and_resize":
            beyond = (positions < 0) | (positions > shape[axis] - 1)
            outside |= beyond.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        if request.mode == "nearest":
            x = take(node, x, axis, arithmetic.whole_positions(positions, request.nearest_mode, shape[axis]))
        else:
            x = along(node, x, axis, _matrix(node, request, axis, positions))
    if not outside.any():
        return x
    return select(node, node.new_constant(outside, "outside"), node.new_constant(node.real("extrapolation_value", 0.0), "extrapolation"), x)


def _positions(request: _Request, axis: int, size: int) -> np.ndarray:
    """Where each result index lies in the source."""
    result, scale = request.sizes[axis], request.scales[axis]
    index = np.arange(result)
    if request.coordinates == "tf_crop_and_resize":
        start, end = request.roi[axis]
        if result == 1:
            return np.array([0.5 * (start + end) * (size - 1)])
        return np.asarray(start * (size - 1) + index * (end - start) * (size - 1) / (result - 1))
    if request.coordinates == "half_pixel_symmetric":
        offset = size / 2 * (1 - result / (scale * size))
        return np.asarray(offset + (index + 0.5) / scale - 0.5)
    return arithmetic.source_positions(size, result, scale, request.coordinates)


def _matrix(node: NodeImport, request: _Request, axis: int, positions: np.ndarray) -> np.ndarray:
    """[source, result]: the weight of each source index. What lies outside takes the value at the edge, or has no weight."""
    size, scale = node.shape(0)[axis], request.scales[axis]
    stretch = max(1.0, 1 / scale) if node.integer("antialias", 0) else 1.0
    reach = math.ceil((2 if request.mode == "cubic" else 1) * stretch) + 1
    taps = np.floor(positions)[:, None].astype(np.int64) + np.arange(-reach, reach + 1)
    distance = np.abs(taps - positions[:, None]) / stretch
    weights = np.maximum(0, 1 - distance) if request.mode == "linear" else _cubic(distance, node.real("cubic_coeff_a", -0.75))
    if node.integer("exclude_outside", 0):
        weights = np.where((taps >= 0) & (taps < size), weights, 0)
    matrix = np.zeros((size, positions.size))
    np.add.at(matrix, (np.clip(taps, 0, size - 1), np.arange(positions.size)[:, None]), weights / weights.sum(axis=1, keepdims=True))
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.asarray(np.where(distance <= 1, near, np.where(distance < 2, far, 0.0)))


TABLE: tuple[Importer, ...] = (
    Importer("Resize", resize, "constant sizes, all modes; nearest moves data, cubic is a product with a constant; bytes are rounded towards 0"),
    Importer("Upsample", upsample, "constant scales"),
)
