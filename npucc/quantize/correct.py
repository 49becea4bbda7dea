"""Biases that take back the mean error of everything before them.

The one big idea: run the integer graph on a few samples, node by node; where a matrix operator's result is off on average from the float
model's, per output channel, its bias takes the difference, and the nodes after it see the corrected values. Only what gets through
the clamp and the function behind it counts: an error far below zero is none to a ReLU or a hard-swish.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from npucc import reference, scalar
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS, Table
from npucc.quantize.calibrate import Progress, tensor_runner
from npucc.quantize.constants import LARGEST_SUM
from npucc.quantize.sensitivity import work

Array = np.ndarray[Any, np.dtype[Any]]

DOUBT = 4.0  # how many times its variance the mean of few samples is distrusted
FEWEST = 8  # samples, if so many are allowed
WORK = 1e10  # multiply-accumulates to spend, with more samples than that
NODE = 1e6  # what it takes to run a node, whatever it computes, in multiply-accumulates
NUDGE = 2.0**-8  # of the largest value: what slopes are taken over
EVERYWHERE = np.linspace(-16, 16, 65, dtype=np.float32)  # a function that has a value at each has one for every mean
SMALLEST_SLOPE = 0.3  # by which a channel's mean follows its bias: below, a bias says too little about it


def correct_biases(
    graph: Graph, integer: Graph, feeds: Sequence[Mapping[str, Array]], *,
    repeats: Container[str] = (), means: dict[str, list[Array]] | None = None, progress: Progress | None = None,
) -> Graph:  # fmt: skip
    """The integer graph with corrected biases. `graph`: the float graph that it was made from, with the same nodes.

    `repeats`: results that keep theirs, as one step's error is no bias of all steps; `means`: keeps the float model's from one call with these
    feeds to the next.
    """
    corrected = [node for node in integer if _has_bias(integer, node) and node.outputs[0] not in repeats]
    nodes = [node for node in corrected if graph.tensors[graph.nodes[node.name].inputs[1]].given is None]
    if not nodes or not feeds:
        return integer
    ends = {node.outputs[0]: _end(graph, graph.nodes[node.name]) for node in nodes}
    wanted = {} if means is None else means
    places = [(node, ends[node.outputs[0]].outputs[0]) for node in nodes]
    wanted |= _float_means(graph, [(node, name) for node, name in places if name not in wanted], feeds)
    editor, tensors = Editor(integer), dict(integer.tensors)
    working = replace(integer, tensors=tensors)
    samples = [{name: reference.store_input(tensors[name], feed) for name in integer.inputs} for feed in feeds]
    last_use = {name: node.name for node in integer for name in node.inputs}
    for index, node in enumerate(integer):
        if progress:
            progress("correct biases", index, len(integer.nodes))
        if node.outputs[0] in ends:
            end = ends[node.outputs[0]]
            bias = _correct(working, node, end, wanted[end.outputs[0]], samples)
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


def _end(graph: Graph, node: Node) -> Node:
    """Where the mean counts: behind the function that alone reads the node's result, else (or if it has poles) at the node itself."""
    users = graph.users(node.outputs[0])
    if len(users) != 1 or node.outputs[0] in graph.outputs or not isinstance(function := users[0].attributes, Table):
        return node
    return users[0] if np.isfinite(scalar.evaluate(function.expression, EVERYWHERE)).all() else node


def _float_means(graph: Graph, places: Sequence[tuple[Node, str]], feeds: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    """Per tensor (the end of a node) and per sample: the mean of each of the node's output channels."""
    means: dict[str, list[Array]] = {name: [] for _, name in places}
    run = tensor_runner(graph, list(means))
    for feed in feeds if places else ():
        values = run(feed)
        for node, name in places:
            means[name].append(_channel_means(values[name], node))
    return means


def _channel_axis(node: Node) -> int:
    return -1 if node.op == "matmul" else 1


def _channel_means(value: Array, node: Node) -> Array:
    axis = _channel_axis(node) % value.ndim
    return np.asarray(value.mean(axis=tuple(i for i in range(value.ndim) if i != axis), dtype=np.float64))


def _correct(graph: Graph, node: Node, end: Node, wanted: Sequence[Array], samples: Sequence[dict[str, Array]]) -> Tensor:
    """The node's bias plus what its result lacks on average, as a constant of the node's own; its result goes into the samples."""
    scale = (np.float32(graph.quant(node.inputs[0]).scale) * graph.quant(node.inputs[1]).scale).astype(np.float32)
    sums = [reference.sums(graph, node, stored).astype(np.int32) for stored in samples]
    means, slopes = zip(*(_means_and_slopes(each, scale, node, end) for each in sums), strict=True)
    slope = np.mean(slopes, axis=0)
    known = np.isfinite(wanted).all(axis=0) & np.isfinite(means).all(axis=0) & np.isfinite(slope)  # else it keeps its bias
    gaps, slope = np.where(known, wanted, 0) - np.where(known, means, 0), np.where(known, slope, 0)
    lacking = shrunk_mean(gaps) * slope / np.maximum(slope, SMALLEST_SLOPE) ** 2
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


def _means_and_slopes(sums: Array, scale: Array, node: Node, end: Node) -> tuple[Array, Array]:
    """Per channel: the mean of the real result at the end, and how much of a small change of the bias it takes over."""
    low, high = getattr(node.attributes, "clamp", None) or (-np.inf, np.inf)
    real = sums.astype(np.float32) * _along_channels(scale, node)
    through = (real > low) & (real < high)
    clamped = np.clip(real, low, high)
    if end.name == node.name or not isinstance(end.attributes, Table):
        return _channel_means(clamped, node), _channel_means(through, node)
    step = np.float32(NUDGE * max(float(np.abs(clamped).max()), 1e-30))
    values, nudged = (scalar.evaluate(end.attributes.expression, each) for each in (clamped, clamped + step))
    with np.errstate(invalid="ignore"):  # infinite values
        change = np.where(through, nudged - values, 0)
    return _channel_means(values, node), _channel_means(change, node) / float(step)


def shrunk_mean(samples: Array) -> Array:
    """Mean over the first dimension, pulled towards zero by how little the samples agree: m · m² / (m² + standard error²)."""
    mean = samples.mean(axis=0)
    if len(samples) < 2:
        return np.zeros_like(mean)
    error = DOUBT * samples.var(axis=0, ddof=1) / len(samples)
    return np.asarray(mean**3 / np.maximum(mean**2 + error, 1e-30))
