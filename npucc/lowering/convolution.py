"""Convolution nodes, plain, grouped, depthwise and transposed, as plain correlations.

The one big idea: a transposed convolution is stride² ordinary ones, each with the kernel taps that its pixels see (one for all that see the
same inputs); a grouped
one is one per large group. What is left is one kind of problem, which `convolution_tiles` cuts into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from npucc import arithmetic, ops
from npucc.errors import CompileError
from npucc.graph import Node
from npucc.lowering.convolution_tiles import Convolution, lower_convolutions
from npucc.lowering.emitter import Emitter
from npucc.lowering.layers import Group


def lower_conv(emitter: Emitter, group: Group) -> None:
    """A convolution layer with its epilogue."""
    node = group.anchor
    attributes = node.attributes
    assert isinstance(attributes, ops.Conv)
    weights, bias, factors, zero = integer_weights(
        emitter, node, np.ascontiguousarray(_data(emitter, node.inputs[1]).transpose(2, 3, 1, 0)), axis=3
    )
    _, _, height, width = emitter.graph.tensors[node.outputs[0]].shape
    problem = Convolution(
        emitter.placement.views[node.inputs[0]], zero, weights, bias, factors, attributes.strides, attributes.dilations,
        attributes.pads[:2], attributes.groups, (height, width),
    )  # fmt: skip
    lower_convolutions(emitter, group, split_groups(problem))


def lower_conv_transpose(emitter: Emitter, group: Group) -> None:
    """One stride-1 convolution per phase of the result: rows r, r + stride, … see the same kernel taps."""
    node = group.anchor
    attributes = node.attributes
    assert isinstance(attributes, ops.ConvTranspose)
    data = _data(emitter, node.inputs[1])  # [C, N/g, kh, kw]
    per_group = data.shape[0] // attributes.groups
    blocks = [data[g * per_group : (g + 1) * per_group].transpose(2, 3, 0, 1) for g in range(attributes.groups)]
    weights, bias, factors, zero = integer_weights(
        emitter, node, dilate(np.concatenate(blocks, axis=3), attributes.dilations), axis=3, fold_zero=False
    )
    _, _, *extent = emitter.graph.tensors[node.outputs[0]].shape
    problems: list[Convolution] = []
    for phases in np.ndindex(*(min(stride, size) for stride, size in zip(attributes.strides, extent, strict=True))):
        rows, columns = (_phase(phases[a], attributes.pads[a], attributes.strides[a], weights.shape[a]) for a in range(2))
        kernel = np.ascontiguousarray(weights[rows[0]][:, columns[0]]) if rows[0] and columns[0] else np.zeros((1, 1, *weights.shape[2:]), np.int8)
        problem = Convolution(
            x=emitter.placement.views[node.inputs[0]],
            zero=zero,
            weights=kernel,
            bias=wrap(bias - zero * kernel.astype(np.int64).sum(axis=(0, 1, 2))),
            factors=factors,
            strides=(1, 1),
            dilations=(1, 1),
            pads=(kernel.shape[0] - 1 - rows[1], kernel.shape[1] - 1 - columns[1]),
            groups=attributes.groups,
            size=(-(-(extent[0] - phases[0]) // attributes.strides[0]), -(-(extent[1] - phases[1]) // attributes.strides[1])),
            starts=((phases[0], phases[1]),),
            steps=attributes.strides,
        )
        problems += split_groups(problem)
    lower_convolutions(emitter, group, merge_phases(problems))


def merge_phases(problems: Sequence[Convolution]) -> list[Convolution]:
    """Phases that read the same windows become one convolution with the output channels of all: inputs pass the array once."""
    together: dict[tuple[object, ...], list[Convolution]] = {}
    for number, problem in enumerate(problems):
        alone = number if problem.groups > 1 else -1
        together.setdefault((problem.kernel, problem.pads, problem.size, problem.x, problem.first_output, alone), []).append(problem)
    return [
        replace(
            parts[0],
            weights=np.concatenate([part.weights for part in parts], axis=3),
            bias=np.concatenate([part.bias for part in parts]),
            factors=np.concatenate([part.factors for part in parts], axis=1),
            starts=tuple(start for part in parts for start in part.starts),
        )
        for parts in together.values()
    ]


def _phase(phase: int, pad: int, stride: int, kernel: int) -> tuple[list[int], int]:
    """The kernel taps that results phase, phase + stride, … see, last first, and the input row of the first result's first tap."""
    first = (phase + pad) % stride
    taps = list(range(first, kernel, stride))
    return taps[::-1], (phase + pad - first) // stride


def dilate(weights: np.ndarray, dilations: tuple[int, int]) -> np.ndarray:
    """Zeros between the taps: the same kernel with dilation 1."""
    if dilations == (1, 1):
        return weights
    kh, kw = ((weights.shape[a] - 1) * dilations[a] + 1 for a in range(2))
    spread = np.zeros((kh, kw, *weights.shape[2:]), weights.dtype)
    spread[:: dilations[0], :: dilations[1]] = weights
    return spread


def wrap(values: np.ndarray) -> np.ndarray:
    """To int32 modulo 2³²."""
    return values.astype(np.int64).astype(np.uint32).astype(np.int32)


def _data(emitter: Emitter, name: str) -> np.ndarray:
    data = emitter.graph.tensors[name].data
    if data is None:
        raise CompileError(f"weights {name!r} are computed, not constant", hint="only matmul takes two computed operands")
    return data.astype(np.int8)


def integer_weights(
    emitter: Emitter, node: Node, weights: np.ndarray, *, axis: int, fold_zero: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(weights, bias with the input's zero point folded in, rows of `arithmetic.Factor`, zero point) of a matrix node."""
    graph = emitter.graph
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    count = weights.shape[axis]
    bias = np.zeros(count, np.int64)
    if len(node.inputs) > 2 and node.inputs[2]:
        data = graph.tensors[node.inputs[2]].data
        assert data is not None
        bias = bias + data.astype(np.int64).reshape(-1)
    if fold_zero:
        others = tuple(d for d in range(weights.ndim) if d != axis)
        bias = bias - source.zero * weights.astype(np.int64).sum(axis=others)
    factor = arithmetic.product_factor(source, graph.quant(node.inputs[1]), result, emitter.target.requantize)
    return weights, wrap(bias) if fold_zero else bias, factor.spread(count).rows, source.zero


def split_groups(problem: Convolution) -> list[Convolution]:
    """Large groups become convolutions of their own; small ones and depthwise stay together."""
    per_group = problem.outputs // problem.groups
    if problem.groups == 1 or problem.depthwise or (per_group < 16 and problem.channels // problem.groups < 16):
        return [problem]
    channels = problem.channels // problem.groups
    parts = []
    for g in range(problem.groups):
        n, _, h, w = problem.x.shape
        own = slice(g * per_group, (g + 1) * per_group)
        window = problem.x.window((0, g * channels, 0, 0), (n, channels, h, w))
        parts.append(
            replace(
                problem, x=window, weights=problem.weights[..., own], bias=problem.bias[own],
                factors=problem.factors[:, own], groups=1, first_output=g * per_group,
            )
        )  # fmt: skip
    return parts
