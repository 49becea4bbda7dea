"""Biases that take back the mean error of everything before them.

The one big idea: run the integer graph on a few samples, node by node; where a matrix operator's result is off on average from the float
model's, per output channel, its bias takes the difference, and the nodes after it see the corrected values. Only what the clamp lets
through counts: an error far below a ReLU's zero is none.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from npucc import reference
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS
from npucc.quantize.calibrate import Progress, tensor_runner
from npucc.quantize.constants import LARGEST_SUM
from npucc.quantize.sensitivity import work

Array = np.ndarray[Any, np.dtype[Any]]

DOUBT = 4.0  # how many times its variance the mean of few samples is distrusted
FEWEST = 8  # samples, if so many are allowed
WORK = 1e10  # multiply-accumulates to spend, with more samples than that
NODE = 1e6  # what it takes to run a node, whatever it computes, in multiply-accumulates
SMALLEST_SHARE = 0.3  # of a channel's values within the clamp: below, a bias says too little about their mean


def correct_biases(
    graph: Graph, integer: Graph, feeds: Sequence[Mapping[str, Array]], *, repeats: Container[str] = (), progress: Progress | None = None
) -> Graph:
    """The integer graph with corrected biases. `graph`: the float graph that it was made from, with the same nodes.

    `repeats`: results that keep theirs, as one step's error is no bias of all steps.
    """
    corrected = [node for node in integer if _has_bias(integer, node) and node.outputs[0] not in repeats]
    nodes = [node for node in corrected if graph.tensors[graph.nodes[node.name].inputs[1]].given is None]
    if not nodes or not feeds:
        return integer
    wanted = _float_means(graph, nodes, feeds)
    editor, tensors = Editor(integer), dict(integer.tensors)
    working = replace(integer, tensors=tensors)
    samples = [{name: reference.store_input(tensors[name], feed) for name in integer.inputs} for feed in feeds]
    last_use = {name: node.name for node in integer for name in node.inputs}
    for index, node in enumerate(integer):
        if progress:
            progress("correct biases", index, len(integer.nodes))
        if node.outputs[0] in wanted:
            bias = _correct(working, node, wanted[node.outputs[0]], samples)
            tensors[bias.name] = bias
            editor.add_tensor(bias)
            editor.add_node(replace(node, inputs=(*node.inputs[:2], bias.name)))
        else:
            for stored in samples:
                stored |= reference.run_node(working, node, stored)
        for stored in samples:
            _forget(stored, node, last_use)
    return editor.freeze()


def bias_samples(graph: Graph, most: int) -> int:
    """How many samples to correct with; depends on the graph only."""
    return min(most, max(FEWEST, int(WORK / (work(graph) + NODE * len(graph.nodes)))))


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
    """Per result of the nodes and per sample: the mean of each output channel."""
    run = tensor_runner(graph, [node.outputs[0] for node in nodes])
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


def _correct(graph: Graph, node: Node, wanted: Sequence[Array], samples: Sequence[dict[str, Array]]) -> Tensor:
    """The node's bias plus what its result lacks on average, as a constant of the node's own; its result goes into the samples."""
    scale = (np.float32(graph.quant(node.inputs[0]).scale) * graph.quant(node.inputs[1]).scale).astype(np.float32)
    sums = [reference.sums(graph, node, stored).astype(np.int32) for stored in samples]
    means, shares = zip(*(_clamped_means(each, scale, node) for each in sums), strict=True)
    lacking = shrunk_mean(np.array(wanted) - np.array(means)) / np.maximum(np.mean(shares, axis=0), SMALLEST_SHARE)
    name, old = (node.inputs[2], graph.tensors[node.inputs[2]].data) if len(node.inputs) > 2 and node.inputs[2] else ("", None)
    before = np.zeros(len(lacking)) if old is None else old.astype(np.float64)
    bias = np.clip(np.rint(before + lacking / scale.astype(np.float64)), -LARGEST_SUM, LARGEST_SUM).astype(np.int32)
    added = _along_channels(bias.astype(np.int64) - before.astype(np.int64), node)
    for stored, total in zip(samples, sums, strict=True):
        stored |= reference.from_sums(graph, node, stored, reference.wrap(total + added))
    if name and len(graph.users(name)) == 1:
        return replace(graph.tensors[name], data=bias)
    quant = Quant("s32", np.asarray(scale), 0, None if scale.ndim == 0 else 0)
    return Tensor(f"{node.outputs[0]}/bias", bias.shape, "float32", bias, quant)


def _along_channels(values: Array, node: Node) -> Array:
    """Per-channel numbers shaped to broadcast over the node's result."""
    return values if node.op == "matmul" or values.ndim == 0 else values.reshape(-1, 1, 1)


def _clamped_means(sums: Array, scale: Array, node: Node) -> tuple[Array, Array]:
    """Per channel: the mean of the real result after the clamp, and the share of values that the clamp leaves as they are."""
    low, high = getattr(node.attributes, "clamp", None) or (-np.inf, np.inf)
    real = sums.astype(np.float32) * _along_channels(scale, node)
    if (low, high) == (-np.inf, np.inf):
        return _channel_means(real, node), np.ones(real.shape[_channel_axis(node)])
    return _channel_means(np.clip(real, low, high), node), _channel_means((real > low) & (real < high), node)


def shrunk_mean(samples: Array) -> Array:
    """Mean over the first dimension, pulled towards zero by how little the samples agree: m · m² / (m² + standard error²)."""
    mean = samples.mean(axis=0)
    if len(samples) < 2:
        return np.zeros_like(mean)
    error = DOUBT * samples.var(axis=0, ddof=1) / len(samples)
    return np.asarray(mean**3 / np.maximum(mean**2 + error, 1e-30))
