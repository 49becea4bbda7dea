"""Resize and Upsample."""

from __future__ import annotations

from dataclasses import dataclass

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.windows import in_2d

COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")


@dataclass(frozen=True, slots=True)
class _Request:
    """What a node asks for, per dimension of its input."""

    sizes: list[int]
    scales: list[float]
    mode: str
    coordinates: str
    nearest_mode: str


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
    for name in ("antialias", "exclude_outside"):
        if node.integer(name, 0):
            raise node.refuse(f"{name} is set, which is not supported")
    if node.word("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("keep_aspect_ratio_policy is not 'stretch', which is not supported")
    axes = [node.axis(axis, len(shape)) for axis in (node.integers("axes") or range(len(shape)))]
    sizes, scales = list(shape), [1.0] * len(shape)
    if node.has(3) and 0 not in node.shape(3):
        for axis, size in zip(axes, node.integers_input(3, "sizes"), strict=True):
            sizes[axis], scales[axis] = size, size / shape[axis]
    else:
        for axis, scale in zip(axes, node.floats(2, "scales").reshape(-1), strict=True):
            sizes[axis], scales[axis] = int(shape[axis] * scale), float(scale)
    words = node.word("mode", "nearest"), node.word("coordinate_transformation_mode", "half_pixel"), node.word("nearest_mode", "round_prefer_floor")
    return _resize(node, _Request(sizes, scales, *words))


def _resize(node: NodeImport, request: _Request) -> str:
    """Only the last two dimensions may change."""
    x, shape = node.input(0), node.shape(0)
    if tuple(request.sizes) == shape and all(scale == 1 for scale in request.scales):
        return x
    if request.mode not in ("nearest", "linear"):
        raise node.refuse(f"mode {request.mode!r} is not supported; supported are nearest and linear")
    if request.coordinates not in COORDINATES:
        raise node.refuse(f"coordinate_transformation_mode {request.coordinates!r} is not supported; supported are {', '.join(COORDINATES)}")
    if tuple(request.sizes[:2]) != shape[:2] or len(shape) not in (3, 4):
        raise node.refuse(f"changes shape {list(shape)} to {request.sizes}; only the spatial dimensions of [N, C, H, W] can change")
    size = (1, request.sizes[2]) if len(shape) == 3 else (request.sizes[2], request.sizes[3])
    scales = (1.0, request.scales[2]) if len(shape) == 3 else (request.scales[2], request.scales[3])
    attributes = ops.Resize(request.mode, request.coordinates, request.nearest_mode, size, scales)
    return in_2d(node, x, lambda image: node.emit("resize", (image,), attributes))


TABLE: tuple[Importer, ...] = (
    Importer("Resize", resize, "nearest and linear, spatial dimensions"),
    Importer("Upsample", upsample, "nearest and linear, spatial dimensions"),
)
