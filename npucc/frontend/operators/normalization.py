"""Normalizations. Those with fixed statistics are an affine map per channel; the others are layer_norm over reshaped data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from npucc import ops
from npucc.frontend.node import Importer, NodeImport

SMALLEST_NORM = 1e-30


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
    flat = node.reshape(node.input(0), grouped)
    normal = node.reshape(node.emit("layer_norm", (flat,), ops.LayerNorm(node.real("epsilon", 1e-5))), shape)
    scale, bias = (np.repeat(_vector(node, index, what, parameters), shape[1] // parameters) for index, what in ((1, "scale"), (2, "bias")))
    return per_channel(node, normal, scale, bias)


def layer_normalization(node: NodeImport) -> str:
    """Over all dimensions from `axis` on, which are merged into one."""
    shape = node.shape(0)
    axis = node.axis(node.integer("axis", -1), len(shape))
    tail = shape[axis:]
    flat = node.reshape(node.input(0), (*shape[:axis], math.prod(tail)))
    parameters = [_parameter(node, index, tail) for index in (1, 2)]
    while parameters and not parameters[-1]:
        parameters.pop()
    normal = node.emit("layer_norm", (flat, *parameters), ops.LayerNorm(node.real("epsilon", 1e-5)))
    return node.reshape(normal, shape)


def _parameter(node: NodeImport, index: int, tail: tuple[int, ...]) -> str:
    """Scale or bias as a constant vector over the merged dimension; "" if it is left out."""
    if not node.has(index):
        return ""
    value = node.floats(index, "scale" if index == 1 else "bias")
    return (
        node.input(index)
        if value.shape == tail and len(tail) == 1
        else node.new_constant(np.broadcast_to(value, tail).reshape(-1), f"parameter{index}")
    )


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
)
