"""What rules ask about nodes and tensors: constants, functions of one variable, and affine maps per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npucc import ops, scalar
from npucc.graph import Editor, Node

ARITHMETIC = ("add", "sub", "mul", "div", "max", "min")
LARGEST_UNIFORM = 1 << 16  # elements; larger constants are not searched for one common value
Reals = NDArray[np.float64]


def uniform(editor: Editor, tensor: str) -> float | None:
    """The value of a constant whose elements are all equal, else None."""
    data = editor.tensors[tensor].data
    if data is None or not 0 < data.size <= LARGEST_UNIFORM or data.dtype == bool:
        return None
    first = data.reshape(-1)[0]
    return float(first) if data.size == 1 or bool(np.all(data == first)) else None


def as_function(editor: Editor, node: Node) -> tuple[str, scalar.Expression] | None:
    """(variable, expression) of a node that is a function of one tensor of its own shape: a table, or arithmetic with one constant value."""
    if isinstance(node.attributes, ops.Table):
        return None if editor.tensors[node.inputs[0]].dtype == "bool" else (node.inputs[0], node.attributes.expression)
    if node.op not in ARITHMETIC and node.op != "compare":
        return None
    arguments: list[scalar.Expression] = [uniform(editor, name) for name in node.inputs]
    if arguments.count(None) != 1:
        return None
    position = arguments.index(None)
    variable = node.inputs[position]
    if editor.tensors[variable].is_constant or editor.tensors[variable].shape != editor.tensors[node.outputs[0]].shape:
        return None
    arguments[position] = "x"
    return variable, clamped((function_name(node), *arguments), node)


def function_name(node: Node) -> str:
    """The scalar function that a binary node or a comparison applies."""
    return node.attributes.kind if isinstance(node.attributes, ops.Compare) else node.op


def clamped(expression: scalar.Expression, node: Node) -> scalar.Expression:
    """The expression with the node's clamp applied."""
    clamp = getattr(node.attributes, "clamp", None)
    return scalar.simplify(("clip", expression, float(clamp[0]), float(clamp[1])) if clamp else expression)


@dataclass(frozen=True, slots=True)
class ChannelMap:
    """min(max(scale · x + shift, low), high) of the tensor `variable`; scale and shift are one number, or one per channel."""

    variable: str
    scale: Reals
    shift: Reals
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_line(self) -> bool:
        return (self.low, self.high) == (-math.inf, math.inf)

    @property
    def is_scalar(self) -> bool:
        return self.scale.size == self.shift.size == 1


def channel_map(editor: Editor, node: Node, axis: int) -> ChannelMap | None:
    """The node as an affine map per entry of dimension `axis` of its result, possibly clipped; None if it is none."""
    function = as_function(editor, node)
    if function is not None:
        line = scalar.clipped_line(function[1])
        return ChannelMap(function[0], np.array([line.scale]), np.array([line.shift]), line.low, line.high) if line else None
    if node.op in ("add", "sub", "mul", "div"):
        return _arithmetic_map(editor, node, axis)
    return _depthwise_map(editor, node) if node.op == "conv" and axis == 1 else None


def _arithmetic_map(editor: Editor, node: Node, axis: int) -> ChannelMap | None:
    first, second = node.inputs
    shape = editor.tensors[node.outputs[0]].shape
    for variable, constant, is_left in ((first, second, False), (second, first, True)):
        value = channel_vector(editor, constant, shape, axis)
        if value is None or editor.tensors[variable].is_constant or editor.tensors[variable].shape != shape or (is_left and node.op == "div"):
            continue
        if node.op in ("add", "sub"):
            negative = node.op == "sub"
            scale = np.array([-1.0 if negative and is_left else 1.0])
            shift = -value if negative and not is_left else value
        elif node.op == "div" and not np.all(value):
            continue
        else:
            scale, shift = (1 / value if node.op == "div" else value), np.array([0.0])
        low, high = getattr(node.attributes, "clamp", None) or (-math.inf, math.inf)
        return ChannelMap(variable, scale, shift, low, high)
    return None


def channel_vector(editor: Editor, tensor: str, shape: tuple[int, ...], axis: int) -> Reals | None:
    """A constant that varies along one axis of `shape` only, as a float64 vector; None if it is anything else, or not finite."""
    data = editor.tensors[tensor].data
    if data is None or data.dtype == bool or data.ndim > len(shape):
        return None
    full = (1,) * (len(shape) - data.ndim) + data.shape
    if any(size != 1 for i, size in enumerate(full) if i != axis) or full[axis] not in (1, shape[axis]) or not np.all(np.isfinite(data)):
        return None
    return data.reshape(-1).astype(np.float64)


def _depthwise_map(editor: Editor, node: Node) -> ChannelMap | None:
    """A 1×1 convolution of each channel by itself (BatchNormalization)."""
    if not is_depthwise_1x1(editor, node):
        return None
    assert isinstance(node.attributes, ops.Conv)
    weights = constant(editor, node.inputs[1])
    bias = constant(editor, node.inputs[2]) if has_bias(node) else np.zeros(1)
    low, high = node.attributes.clamp or (-math.inf, math.inf)
    return ChannelMap(node.inputs[0], weights.reshape(-1).astype(np.float64), bias.astype(np.float64), low, high)


def is_depthwise_1x1(editor: Editor, node: Node) -> bool:
    """Whether a convolution only scales and shifts each channel."""
    a = node.attributes
    if not isinstance(a, ops.Conv) or editor.tensors[node.inputs[1]].data is None:
        return False
    shape = editor.tensors[node.inputs[1]].shape
    return shape == (a.groups, 1, 1, 1) and a.groups == editor.tensors[node.inputs[0]].shape[1] and a.strides == (1, 1) and not any(a.pads)


def has_bias(node: Node) -> bool:
    """Whether a convolution or matrix product has its third input."""
    return len(node.inputs) > 2 and bool(node.inputs[2])


def constant(editor: Editor, tensor: str) -> np.ndarray:
    """The value of a tensor known to be constant."""
    data = editor.tensors[tensor].data
    assert data is not None, f"{tensor} is not constant"
    return data


def lower_bound(editor: Editor, tensor: str, depth: int = 8) -> float:
    """A value that no element of the tensor lies below (−∞ if nothing is known)."""
    node = editor.producer(tensor)
    if node is None or depth == 0:
        return -math.inf
    clamp = getattr(node.attributes, "clamp", None)
    if clamp:
        return float(clamp[0])
    if node.op == "table":
        assert isinstance(node.attributes, ops.Table)
        return scalar.bounds(node.attributes.expression)[0]
    record = ops.OPS[node.op]
    if record.fixed_range:
        return record.fixed_range[0]
    if record.moves_data and not isinstance(node.attributes, ops.Pad):
        return min(lower_bound(editor, name, depth - 1) for name in node.inputs)
    return -math.inf
