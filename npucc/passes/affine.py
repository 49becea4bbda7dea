"""Affine maps and clips after (or before) a convolution or matrix product become part of it.

The one big idea: BatchNormalization, biases, scales, HardSigmoid, ReLU and Clip are all min(max(scale · x + shift, low), high) with one scale per
channel or one for all; a matrix operator followed by such a map is the matrix operator with other weights, another bias and a clamp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from npucc import ops
from npucc.graph import Editor, Given, Node, Tensor
from npucc.passes.rewrite import Result, Rewrite, Rule, merged_sources
from npucc.passes.values import ARITHMETIC, ChannelMap, Reals, as_function, channel_map, constant, has_bias, is_depthwise_1x1, uniform

MAPS = frozenset({"table", "add", "sub", "mul", "div", "max", "min", "conv"})
MATRIX = ("conv", "conv_transpose", "matmul")


def fold_into_producer(editor: Editor, node: Node) -> Result:
    """y = conv(x, w, b); z = clip(s·y + t)  →  z = conv(x, w·s, b·s + t) clamp=…

    y must have no other reader. With one s and t for all channels a clamp already there is mapped too; per channel there must be none.
    """
    for tensor in node.inputs[:2]:
        producer = editor.producer(tensor) if tensor else None
        if producer is None or producer.op not in MATRIX:
            continue
        chain = channel_map(editor, node, _channel_axis(editor, producer))
        if chain is None or chain.variable != tensor:
            continue
        return _fold(editor, producer, node, chain)
    return None


def _channel_axis(editor: Editor, producer: Node) -> int:
    return len(editor.tensors[producer.outputs[0]].shape) - 1 if producer.op == "matmul" else 1


def _fold(editor: Editor, producer: Node, node: Node, chain: ChannelMap) -> Result:
    if not editor.is_read_once(producer.outputs[0]):
        return f"the result of {producer.name!r} has other readers" if node.op == "conv" or chain.is_line else None
    clamp = _mapped_clamp(getattr(producer.attributes, "clamp", None), chain)
    if isinstance(clamp, str):
        return clamp
    if not (np.all(chain.scale == 1) and np.all(chain.shift == 0)):
        inputs = _scaled_inputs(editor, producer, chain, _given_shift(editor, node))
        if inputs is None:
            return f"the weights of {producer.name!r} are not a constant matrix"
        producer = replace(producer, inputs=inputs)
    attributes: Any = producer.attributes
    return Rewrite((replace(producer, outputs=node.outputs, attributes=replace(attributes, clamp=clamp), sources=merged_sources(producer, node)),))


def _mapped_clamp(clamp: ops.Clamp, chain: ChannelMap) -> ops.Clamp | str:
    """The clamp after the map: its limits go through the map, then the map's own limits apply."""
    low, high = -math.inf, math.inf
    if clamp is not None:
        if not chain.is_scalar:
            return "it is a different map per channel, after a clamp"
        scale, shift = float(chain.scale[0]), float(chain.shift[0])
        if scale == 0:
            return "it multiplies by 0"
        low, high = sorted((clamp[0] * scale + shift, clamp[1] * scale + shift))
    low, high = (min(max(limit, chain.low), chain.high) for limit in (low, high))
    return None if (low, high) == (-math.inf, math.inf) else (_as_float32(low), _as_float32(high))


def _as_float32(value: float) -> float:
    return float(np.float32(value))


def _given_shift(editor: Editor, node: Node) -> Given | None:
    """How the model has quantized the constant that a node adds, as a vector."""
    found = [given for name in node.inputs if node.op == "add" and (given := editor.tensors[name].given) and given.stored is not None]
    return found[0].reshaped((found[0].stored.size,)) if len(found) == 1 and found[0].stored is not None else None


def _scaled_inputs(editor: Editor, producer: Node, chain: ChannelMap, shift: Given | None) -> tuple[str, ...] | None:
    """The producer's inputs with weights and bias multiplied per output channel. `shift`: how what is added is quantized already."""
    weights = editor.tensors[producer.inputs[1]]
    if weights.data is None or (producer.op == "matmul" and weights.data.ndim != 2):
        return None
    if np.all(chain.scale == 1):
        scaled = producer.inputs[1]
    else:
        given = weights.given and weights.given.scaled(_scale_outputs(producer, np.ones(weights.shape), chain.scale))
        scaled = _add_weights(editor, producer.inputs[1], _scale_outputs(producer, weights.data.astype(np.float64), chain.scale), given)
    channels = editor.tensors[producer.outputs[0]].shape[_channel_axis(editor, producer)]
    bias = constant(editor, producer.inputs[2]).astype(np.float64) if has_bias(producer) else np.zeros(channels)
    new_bias = np.broadcast_to(bias * chain.scale + chain.shift, (channels,))
    kept = _given_bias(editor, producer, chain, channels, shift)
    return (producer.inputs[0], scaled, *_add_bias(editor, producer, new_bias, kept))


def _given_bias(editor: Editor, producer: Node, chain: ChannelMap, channels: int, shift: Given | None) -> Given | None:
    """How the model has quantized the bias that comes out: the old one, scaled, or what is added where there was none."""
    if not has_bias(producer):
        return shift if shift and shift.stored is not None and shift.stored.shape == (channels,) and np.all(chain.scale == 1) else None
    given = editor.tensors[producer.inputs[2]].given
    return given.scaled(chain.scale) if given and np.all(chain.shift == 0) else None


def _scale_outputs(producer: Node, weights: Reals, scale: Reals) -> Reals:
    """Weights multiplied along their output channels."""
    if producer.op == "conv":
        return weights * scale.reshape(-1, 1, 1, 1)
    if producer.op == "matmul" or scale.size == 1:
        return weights * scale
    assert isinstance(producer.attributes, ops.ConvTranspose)
    groups = producer.attributes.groups
    grouped = weights.reshape(groups, -1, *weights.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, 1, 1)).reshape(weights.shape)


def _add_weights(editor: Editor, stem: str, weights: Reals, given: Given | None = None) -> str:
    return editor.constant(stem, np.ascontiguousarray(weights, np.float32), given)


def _add_bias(editor: Editor, producer: Node, bias: Reals, given: Given | None = None) -> tuple[str, ...]:
    """The bias as a constant; none if it is zero and there was none."""
    if not has_bias(producer) and not np.any(bias):
        return ()
    return (editor.constant(f"{producer.inputs[1]}.bias", np.ascontiguousarray(bias, np.float32), given),)


def clamp_producer(editor: Editor, node: Node) -> Result:
    """y = add(a, b); z = clip(y, low, high)  →  z = add(a, b) clamp=low,high

    For two-operand arithmetic and products of two activations. Arithmetic with one constant value stays: it becomes part of a table.
    """
    function = as_function(editor, node)
    producer = editor.producer(function[0]) if function else None
    if function is None or producer is None or producer.op not in (*ARITHMETIC, "matmul"):
        return None
    chain = channel_map(editor, node, 0)
    if chain is None or chain.is_line or (chain.scale[0], chain.shift[0]) != (1, 0):
        return None
    if any(uniform(editor, name) is not None for name in producer.inputs[:2]):
        return None
    if not editor.is_read_once(producer.outputs[0]):
        return f"the result of {producer.name!r} has other readers"
    attributes: Any = producer.attributes
    clamp = _mapped_clamp(attributes.clamp, chain)
    assert not isinstance(clamp, str)
    return Rewrite((replace(producer, outputs=node.outputs, attributes=replace(attributes, clamp=clamp), sources=merged_sources(producer, node)),))


def fold_into_reader(editor: Editor, node: Node) -> Result:
    """y = s·x + t; z = conv(y, w, b)  →  z = conv(x, w·s, b + Σ w·t)

    Only where padding does not see t: the convolution has no pads, or t is 0.
    """
    producer = editor.producer(node.inputs[0])
    if producer is None or producer.op not in MAPS or (producer.op == "conv" and editor.tensors[producer.inputs[1]].shape[1:] != (1, 1, 1)):
        return None
    weights = editor.tensors[node.inputs[1]].data
    shape = editor.tensors[node.inputs[0]].shape
    chain = channel_map(editor, producer, len(shape) - 1 if node.op == "matmul" else 1)
    if chain is None or not chain.is_line or weights is None or (node.op == "matmul" and weights.ndim != 2):
        return None
    if not editor.is_read_once(node.inputs[0]):
        return f"its input {node.inputs[0]!r} has other readers"
    if isinstance(node.attributes, ops.Conv) and any(node.attributes.pads) and np.any(chain.shift):
        return "its zero padding would have to be shifted by the affine map before it"
    inputs = (chain.variable, *_absorbed(editor, node, weights.astype(np.float64), chain))
    return Rewrite((replace(node, inputs=inputs, sources=merged_sources(producer, node)),))


def _absorbed(editor: Editor, node: Node, weights: Reals, chain: ChannelMap) -> tuple[str, ...]:
    """(weights, bias) with the map of the input channels taken in."""
    if isinstance(node.attributes, ops.Conv):
        channels = weights.shape[1] * node.attributes.groups
        scale, shift = (_per_group(values, channels, node.attributes.groups, len(weights)) for values in (chain.scale, chain.shift))
        added = np.einsum("ncij,nc->n", weights, shift)
        scaled = weights * scale[:, :, None, None]
    else:
        scale, shift = (np.broadcast_to(values, (len(weights),)) for values in (chain.scale, chain.shift))
        added = shift @ weights
        scaled = weights * scale[:, None]
    bias = constant(editor, node.inputs[2]).astype(np.float64) if has_bias(node) else np.zeros(len(added))
    return (_add_weights(editor, node.inputs[1], scaled), *_add_bias(editor, node, bias + added))


def _per_group(values: Reals, channels: int, groups: int, outputs: int) -> Reals:
    """Values per input channel as [output channel, channel within its group]."""
    grouped = np.broadcast_to(values, (channels,)).reshape(groups, -1)
    return np.repeat(grouped, outputs // groups, axis=0)


def scale_to_depthwise(editor: Editor, node: Node) -> Result:
    """z = mul(x, s[1,C,1,1])  →  z = conv(x, s[C,1,1,1]) groups=C   (add and sub likewise, with a bias)"""
    shape = editor.tensors[node.outputs[0]].shape
    if len(shape) != 4 or as_function(editor, node) is not None or any(editor.tensors[name].given for name in node.inputs):
        return None
    chain = channel_map(editor, node, 1)
    if chain is None:
        return None
    channels = shape[1]
    scale = np.broadcast_to(chain.scale, (channels,)).astype(np.float32).reshape(channels, 1, 1, 1)
    inputs: tuple[str, ...] = (chain.variable, editor.constant(f"{node.name}.scale", np.ascontiguousarray(scale)))
    if np.any(chain.shift):
        inputs = (*inputs, editor.constant(f"{node.name}.shift", np.ascontiguousarray(np.broadcast_to(chain.shift, (channels,)), np.float32)))
    attributes: Any = node.attributes
    return Rewrite((replace(node, op="conv", inputs=inputs, attributes=ops.Conv(groups=channels, clamp=attributes.clamp)),))


def scale_after_pool(editor: Editor, node: Node) -> Result:
    """z = max_pool(conv(x, s[C,1,1,1]))  →  z = conv(max_pool(x), s[C,1,1,1]), for s > 0: fewer elements to scale"""
    scale = editor.producer(node.inputs[0])
    if scale is None or not is_depthwise_1x1(editor, scale):
        return None
    if not editor.is_read_once(node.inputs[0]):
        return f"the result of {scale.name!r} has other readers"
    if np.any(constant(editor, scale.inputs[1]) <= 0):
        return f"{scale.name!r} has a scale that is not positive"
    output = editor.tensors[node.outputs[0]]
    pooled = Tensor(editor.fresh(f"{output.name}/unscaled"), output.shape)
    pool = replace(node, inputs=scale.inputs[:1], outputs=(pooled.name,))
    return Rewrite((pool, replace(scale, inputs=(pooled.name, *scale.inputs[1:]), outputs=node.outputs)), (pooled,))


FOLD_RULES: tuple[Rule, ...] = (
    Rule(
        "fold-into-producer",
        MAPS,
        fold_into_producer,
        "scales, biases, batch normalization and clips cost nothing inside a convolution or matrix product",
    ),
    Rule("clamp-producer", MAPS - {"conv"}, clamp_producer, "a clip costs nothing inside an addition or multiplication"),
)
FORWARD_RULES: tuple[Rule, ...] = (
    Rule(
        "fold-into-reader",
        frozenset({"conv", "matmul"}),
        fold_into_reader,
        "a scale before a convolution or matrix product costs nothing inside its weights",
    ),
)
DEPTHWISE_RULES: tuple[Rule, ...] = (
    Rule(
        "scale-to-depthwise",
        frozenset({"add", "sub", "mul", "div"}),
        scale_to_depthwise,
        "a scale per channel is exact as a 1×1 depthwise convolution",
    ),
    Rule("scale-after-pool", frozenset({"max_pool"}), scale_after_pool, "after the pool there are fewer elements to scale"),
)
