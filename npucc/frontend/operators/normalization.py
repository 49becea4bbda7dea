"""Normalizations. Those with fixed statistics are an affine map per channel; the others are layer_norm over reshaped data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.graph import Moments

SMALLEST_NORM = 1e-30
SMALLEST_VARIANCE = 1e-9


def per_channel(node: NodeImport, x: str, scale: np.ndarray, shift: np.ndarray) -> str:
    """scale[c] · x + shift[c] over dimension 1: a 1×1 depthwise convolution, which folds into one before it; on matrices a mul and an add."""
    shape = node.shape_of(x)
    channels = shape[1]
    if len(shape) == 2:
        scaled = node.binary("mul", x, node.new_constant(scale, "scale"))
        return node.binary("add", scaled, node.new_constant(shift, "shift"))
    weights, bias = node.new_constant(scale.reshape(channels, 1, 1, 1), "scale"), node.new_constant(shift, "shift")
    image = x if len(shape) == 4 else node.reshape(x, (shape[0], channels, 1, math.prod(shape[2:])))
    return node.reshape(node.emit("conv", (image, weights, bias), ops.Conv(groups=channels)), shape)


def _vector(node: NodeImport, index: int, what: str, size: int) -> np.ndarray:
    """A constant input of `size` elements, as float64."""
    value = node.floats(index, what).astype(np.float64)
    if value.shape != (size,):
        raise node.refuse(f"{what} has shape {list(value.shape)}, expected [{size}]", hint="the model is damaged; export it again")
    return value


def batch_normalization(node: NodeImport) -> str:
    """(x − mean) / sqrt(variance + epsilon) · scale + bias with stored statistics."""
    if node.integer("training_mode", 0) or not node.integer("spatial", 1):
        raise node.refuse("is in training mode, or not per channel", hint="export the model in evaluation mode")
    channels = node.shape(0)[1]
    gamma, beta, mean, variance = (_vector(node, i + 1, what, channels) for i, what in enumerate(("scale", "bias", "mean", "variance")))
    spread = variance + node.real("epsilon", 1e-5)
    if not np.all(spread > 0):
        raise node.refuse("has a variance that is negative or not a number", hint="the model is damaged; export it again")
    node.note_moments(node.input(0), Moments(mean, variance))
    scale = gamma / np.sqrt(spread)
    return per_channel(node, node.input(0), scale, beta - mean * scale)


def instance_normalization(node: NodeImport) -> str:
    """Each channel of each sample over its spatial dimensions."""
    shape = node.shape(0)
    return _grouped(node, (shape[0], shape[1], math.prod(shape[2:])), shape[1])


def group_normalization(node: NodeImport) -> str:
    """Each group of channels of each sample. Until opset 20 scale and bias are per group, since then per channel."""
    shape = node.shape(0)
    groups = node.integer("num_groups", 1)
    return _grouped(node, (shape[0], groups, math.prod(shape[1:]) // groups), shape[1] if node.opset >= 21 else groups)


def _grouped(node: NodeImport, grouped: Sequence[int], parameters: int) -> str:
    shape = node.shape(0)
    normal = normalized(node, node.input(0), grouped, ops.LayerNorm(node.real("epsilon", 1e-5)))
    scale, bias = (np.repeat(_vector(node, index, what, parameters), shape[1] // parameters) for index, what in ((1, "scale"), (2, "bias")))
    return per_channel(node, normal, scale, bias)


def normalized(node: NodeImport, x: str, merged: Sequence[int], norm: ops.LayerNorm, parameters: Sequence[str] = ()) -> str:
    """x as `merged`, normalized over the last dimension of that, in its own shape again."""
    flat = node.reshape(x, merged)
    return node.reshape(node.emit("layer_norm", (flat, *parameters), norm), node.shape_of(x))


def _merged(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The shape with all dimensions from `axis` on as one."""
    return (*shape[:axis], math.prod(shape[axis:]))


def layer_normalization(node: NodeImport) -> list[str]:
    """Over all dimensions from `axis` on; the further results are mean and 1 / standard deviation."""
    shape, epsilon = node.shape(0), node.real("epsilon", 1e-5)
    axes = list(range(node.axis(node.integer("axis", -1), len(shape)), len(shape)))
    results = [layer_norm(node, node.input(0), 1, 2, epsilon, axes[0])]
    if any(node.outputs[1:]):
        mean = node.reduce("reduce_mean", node.input(0), axes)
        centred = node.binary("sub", node.input(0), mean)
        variance = node.reduce("reduce_mean", node.table(("mul", "x", "x"), centred), axes)
        results += [mean, node.table(("reciprocal", ("sqrt", ("add", "x", epsilon))), variance)]
    return results


def layer_norm(node: NodeImport, x: str, gamma: int, beta: int, epsilon: float, axis: int = -1) -> str:
    """LayerNorm of a tensor over all dimensions from `axis` on, which are merged into one; scale and bias are inputs of the node."""
    shape = node.shape_of(x)
    parameters = [_parameter(node, index, shape[axis:]) for index in (gamma, beta)]
    while parameters and not parameters[-1]:
        parameters.pop()
    return normalized(node, x, _merged(shape, axis), ops.LayerNorm(epsilon), parameters)


def _parameter(node: NodeImport, index: int, tail: tuple[int, ...]) -> str:
    """Scale or bias as a constant vector over the merged dimension; "" if it is left out."""
    if not node.has(index):
        return ""
    value = node.floats(index, "scale or bias")
    if value.shape == tail and len(tail) == 1:
        return node.input(index)
    return node.new_constant(np.broadcast_to(value, tail).reshape(-1), f"parameter{index}")


def rms_normalization(node: NodeImport) -> str:
    """x / sqrt(mean(x²) + epsilon) · scale over all dimensions from `axis` on."""
    axis = node.axis(node.integer("axis", -1), node.rank())
    return rms_norm(node, node.input(0), 1, node.real("epsilon", 1e-5), axis)


def rms_norm(node: NodeImport, x: str, gamma: int, epsilon: float, axis: int = -1) -> str:
    """RMSNorm of a tensor over all dimensions from `axis` on, which are merged into one; the scale is an input of the node."""
    normal = normalized(node, x, _merged(node.shape_of(x), axis), ops.LayerNorm(epsilon, centered=False))
    return node.binary("mul", normal, node.input(gamma)) if node.has(gamma) else normal


def mean_variance_normalization(node: NodeImport) -> str:
    """(x − mean) / standard deviation over the given axes, brought to the end: a layer_norm without parameters."""
    rank = node.rank()
    axes = sorted(node.axis(axis, rank) for axis in (node.integers("axes") or [0, 2, 3]))
    order = [axis for axis in range(rank) if axis not in axes] + axes
    moved = node.transpose(node.input(0), order)
    normal = normalized(node, moved, _merged(node.shape_of(moved), rank - len(axes)), ops.LayerNorm(SMALLEST_VARIANCE))
    return node.transpose(normal, list(np.argsort(order)))


def local_response_normalization(node: NodeImport) -> str:
    """x / (bias + alpha / size · sum of x² over neighbouring channels) ^ beta: the sum is a mean over windows along the channels."""
    shape, size = node.shape(0), node.integer("size", 1)
    alpha, beta, bias = node.real("alpha", 1e-4), node.real("beta", 0.75), node.real("bias", 1.0)
    squares = node.reshape(node.table(("mul", "x", "x"), node.input(0), wide=True), (shape[0], 1, shape[1], math.prod(shape[2:])))
    pads = ((size - 1) // 2, 0, size // 2, 0)
    mean = node.emit("average_pool", (squares,), ops.Pool((size, 1), (1, 1), pads, (1, 1), count_include_pad=True), wide=True)
    factor = node.table(("pow", ("add", ("mul", "x", alpha), bias), -beta), node.reshape(mean, shape))
    return node.binary("mul", node.input(0), factor)


def lp_normalization(node: NodeImport) -> str:
    """x / |x| along an axis, with the norm of order 1 or 2; 0 stays 0."""
    axis = node.axis(node.integer("axis", -1), node.rank())
    x = node.input(0)
    if node.integer("p", 2) == 1:
        total = node.reduce("reduce_sum", node.table(("abs", "x"), x), [axis])
        return node.binary("div", x, node.table(("max", "x", SMALLEST_NORM), total))
    total = node.reduce("reduce_sum", node.table(("mul", "x", "x"), x), [axis])
    return node.binary("div", x, node.table(("max", ("sqrt", "x"), SMALLEST_NORM), total))


TABLE: tuple[Importer, ...] = (
    Importer("BatchNormalization", batch_normalization, "inference only"),
    Importer("InstanceNormalization", instance_normalization),
    Importer("GroupNormalization", group_normalization),
    Importer("LayerNormalization", layer_normalization, "constant scale and bias"),
    Importer("LpNormalization", lp_normalization),
    Importer("RMSNormalization", rms_normalization),
    Importer("SimplifiedLayerNormalization", rms_normalization, domain="com.microsoft"),
    Importer("MeanVarianceNormalization", mean_variance_normalization),
    Importer("LRN", local_response_normalization),
)
