"""Biases that take back the mean error of everything before them.

The one big idea: run the integer graph on a few samples, node by node; where a matrix operator's sums are off on average from the float
model's, per output channel, its bias takes the difference, and the nodes after it see the corrected values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from npucc import reference
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS
from npucc.quantize.calibrate import tensor_runner
from npucc.quantize.constants import LARGEST_SUM

SHRINK = 1.0
Array = np.ndarray[Any, np.dtype[Any]]


def correct_biases(graph: Graph, integer: Graph, feeds: Sequence[Mapping[str, Array]]) -> Graph:
    """The integer graph with corrected biases. `graph`: the float graph that it was made from, with the same nodes."""
    nodes = [node for node in integer if _has_bias(integer, node)]
    wanted = _float_means(graph, nodes, feeds)
    editor, tensors = Editor(integer), dict(integer.tensors)
    working = replace(integer, tensors=tensors)
    samples = [{name: reference.store_input(tensors[name], feed) for name in integer.inputs} for feed in feeds]
    last_use = {name: node.name for node in integer for name in node.inputs}
    for node in integer:
        if node.outputs[0] in wanted:
            bias = _corrected_bias(working, node, wanted[node.outputs[0]], samples)
            node = replace(node, inputs=(*node.inputs[:2], bias.name))
            tensors[bias.name] = bias
            editor.add_tensor(bias)
            editor.add_node(node)
        for stored in samples:
            stored |= reference.run_node(working, node, stored)
            _forget(stored, node, last_use)
    return editor.freeze()


def _forget(stored: dict[str, Array], node: Node, last_use: Mapping[str, str]) -> None:
    """Drop the tensors that no later node reads."""
    for name in {*node.inputs, *node.outputs}:
        if last_use.get(name, node.name) == node.name:
            stored.pop(name, None)


def _has_bias(graph: Graph, node: Node) -> bool:
    """Whether the node has constant weights, so that its result has channels with a bias each."""
    if not OPS[node.op].matrix or graph.tensors[node.inputs[0]].is_constant or not graph.tensors[node.inputs[1]].is_constant:
        return False
    return node.op != "matmul" or len(graph.tensors[node.inputs[1]].shape) == 2


def _float_means(graph: Graph, nodes: Sequence[Node], feeds: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    """Per result of the nodes and per sample: the mean of each output channel before the clamp."""
    run = tensor_runner(graph, [node.outputs[0] for node in nodes], before_clamp=False)
    means: dict[str, list[Array]] = {node.outputs[0]: [] for node in nodes}
    for feed in feeds:
        values = run(feed)
        for node in nodes:
            means[node.outputs[0]].append(_channel_means(values[node.outputs[0]], node))
    return means


def _channel_axis(node: Node) -> int:
    return -1 if node.op == "matmul" else 1


def _channel_means(value: Array, node: Node) -> Array:
    axis = _channel_axis(node) % value.ndim
    return np.asarray(value.mean(axis=tuple(i for i in range(value.ndim) if i != axis), dtype=np.float64))


def _corrected_bias(graph: Graph, node: Node, wanted: Sequence[Array], samples: Sequence[Mapping[str, Array]]) -> Tensor:
    """The node's bias plus what its sums lack on average, as a constant of the node's own."""
    source, weights = graph.quant(node.inputs[0]), graph.quant(node.inputs[1])
    scale = (np.float32(source.scale) * weights.scale).astype(np.float32)
    clamp = getattr(node.attributes, "clamp", None)
    low, high = clamp or (-np.inf, np.inf)
    per = scale.astype(np.float64)
    along = per if node.op == "matmul" or per.ndim == 0 else per.reshape(-1, 1, 1)
    found, active = [], []
    for stored in samples:
        real = reference.sums(graph, node, stored) * along
        found.append(_channel_means(np.clip(real, low, high), node))
        active.append(_channel_means(((real > low) & (real < high)).astype(float), node))
    gain = np.maximum(np.mean(active, axis=0), 0.3)
    lacking = shrunk_mean((np.array(wanted) - np.array(found)) / per / gain)
    name, old = (node.inputs[2], graph.tensors[node.inputs[2]].data) if len(node.inputs) > 2 and node.inputs[2] else ("", None)
    bias = np.rint((0 if old is None else old) + lacking)
    quant = Quant("s32", np.asarray(scale), 0, None if scale.ndim == 0 else 0)
    stored_bias = np.clip(bias, -LARGEST_SUM, LARGEST_SUM).astype(np.int32)
    if name and len(graph.users(name)) == 1:
        return replace(graph.tensors[name], data=stored_bias)
    return Tensor(f"{node.outputs[0]}/bias", stored_bias.shape, "float32", stored_bias, quant)


def shrunk_mean(samples: Array) -> Array:
    """Mean over the first dimension, pulled towards zero by how little the samples agree: m · m² / (m² + standard error²)."""
    mean = samples.mean(axis=0)
    if len(samples) < 2:
        return np.zeros_like(mean)
    error = SHRINK * samples.var(axis=0, ddof=1) / len(samples)
    return np.asarray(mean**3 / np.maximum(mean**2 + error, 1e-30))
