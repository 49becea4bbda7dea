"""Channels made equally loud where the network does not care: what makes a tensor may scale each channel, if what reads it scales back.

The one big idea: in each chain of tensors (`chains.py`) an estimate of the rounding noise of values and weights decides on a scale per channel. All
are powers of two, so the float network computes the same to the last bit. (Nagel et al., Data-Free Quantization, ICCV 2019; Xiao et al.,
SmoothQuant, ICML 2023: both are cases of this.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc.graph import Editor, Graph, Node
from npucc.quantize.calibrate import Progress, tensor_runner
from npucc.quantize.chains import Chain, Place, find_chains

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 16
BALANCES = (0.5, 0.75, 1.0)  # how much of the imbalance the weights take over
WORTH = 0.5  # of the estimated error at most, or nothing is done: less is within what the estimate does not see
QUIETEST = 1 / 64  # of the loudest channel: what was seen fainter may only not have been seen loud
FAINT = 1e-3  # of the median energy of a layer's results: an output below counts as that loud
STEPS = 255.0
WEIGHT_STEPS = 127.0


@dataclass(frozen=True, slots=True)
class ScaledChannels:
    """A tensor whose channel c, along dimension `axis`, is 2^powers[c] times as large as in the model."""

    tensor: str
    axis: int
    powers: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "axis": self.axis, "powers": list(self.powers)}


def equalize(
    graph: Graph, feeds: Sequence[Mapping[str, Array]], *, progress: Progress | None = None
) -> tuple[Graph, tuple[ScaledChannels, ...]]:
    """The graph with scaled channels in the chains where that pays, by an estimate of the rounding errors; and which those are."""
    chains = find_chains(graph)
    if not chains or not feeds:
        return graph, ()
    found: list[ScaledChannels] = []
    seen = _observe(graph, chains, feeds)
    for index, chain in enumerate(chains):
        powers = _best_powers(graph, chain, seen)
        if powers is not None:
            graph, seen = scaled(graph, chain, powers), seen.scaled(chain, np.exp2(powers))
            found += [ScaledChannels(name, axis, tuple(map(int, powers))) for name, axis in chain.places]
        if progress:
            progress("equalize", index + 1, len(chains))
    return graph, tuple(found)


# ---- by how much


@dataclass(frozen=True, slots=True)
class _Seen:
    """Per place the largest magnitude of each channel; per tensor the energy of each channel (of a matrix operator's input and result)."""

    largest: Mapping[Place, Array]
    energy: Mapping[Place, Array]

    def scaled(self, chain: Chain, factor: Array) -> _Seen:
        """What would be seen with the chain's channels so many times as large."""
        places = set(chain.places)
        return _Seen(
            {place: each * factor if place in places else each for place, each in self.largest.items()},
            {place: each * factor**2 if place in places else each for place, each in self.energy.items()},
        )


def _observe(graph: Graph, chains: Sequence[Chain], feeds: Sequence[Mapping[str, Array]]) -> _Seen:
    places = {place for chain in chains for place in chain.places}
    places |= {_result_place(graph, graph.nodes[name]) for chain in chains for name in chain.readers}
    run = tensor_runner(graph, sorted({name for name, _ in places}))
    largest = {place: np.zeros(graph.tensors[place[0]].shape[place[1]]) for place in sorted(places)}
    energy = {place: each.copy() for place, each in largest.items()}
    for feed in feeds:
        values = run(feed)
        for place in largest:
            value = values[place[0]]
            others = tuple(i for i in range(value.ndim) if i != place[1])
            largest[place] = np.maximum(largest[place], np.maximum(value.max(axis=others), -value.min(axis=others)))
            energy[place] += np.square(value).mean(axis=others, dtype=np.float64) / len(feeds)
    return _Seen(largest, energy)


def _result_place(graph: Graph, node: Node) -> Place:
    return node.outputs[0], 1 if node.op == "conv" else len(graph.tensors[node.outputs[0]].shape) - 1


def _best_powers(graph: Graph, chain: Chain, seen: _Seen) -> Array | None:
    """The exponent of two for each channel, or None where nothing pays."""
    loud = np.max([seen.largest[place] for place in chain.places], axis=0)
    weights = np.max([_reader_weights(graph, name, len(loud)).max(axis=0) for name in chain.readers], axis=0)
    alive = (loud > 0) & (weights > 0)
    if alive.sum() < 2:
        return None
    loud, weights = (np.maximum(each, QUIETEST * each.max()) for each in (loud, weights))
    best, least = None, WORTH * _estimate(graph, chain, seen, np.zeros(len(loud)))
    for balance in BALANCES:
        wanted = balance * np.log2(loud) - (1 - balance) * np.log2(weights)
        powers = np.where(alive, np.rint(wanted[alive].max() - wanted), 0)
        estimate = _estimate(graph, chain, seen, powers)
        if estimate < least and powers.any():
            best, least = powers, estimate
    return best


def _reader_weights(graph: Graph, name: str, channels: int) -> Array:
    """float64 [outputs, channels]: root of the sum of squares over the kernel; zero where a group does not see the channel."""
    node = graph.nodes[name]
    weights = graph.tensors[node.inputs[1]].data
    assert weights is not None
    if node.op == "matmul":
        return np.asarray(np.abs(weights.astype(np.float64)).T)
    own = np.sqrt((weights.astype(np.float64) ** 2).sum(axis=(2, 3)))
    groups = node.attributes.groups  # type: ignore[attr-defined]
    full = np.zeros((len(own), channels))
    for group in range(groups):
        rows, depth = slice(group * len(own) // groups, (group + 1) * len(own) // groups), own.shape[1]
        full[rows, group * depth : (group + 1) * depth] = own[rows]
    return full


def _estimate(graph: Graph, chain: Chain, seen: _Seen, powers: Array) -> float:
    """Energy of rounding noise over that of the signal in what the readers compute, averaged."""
    factor = np.exp2(powers)
    found = []
    for name in chain.readers:
        node = graph.nodes[name]
        place = next(each for each in chain.places if each[0] == node.inputs[0])
        weights = _reader_weights(graph, name, len(powers)) / factor
        step = float((seen.largest[place] * factor).max()) / STEPS
        weight_step = weights.max(axis=1) / WEIGHT_STEPS
        reach = (weights > 0) @ (seen.energy[place] * factor**2)
        noise = (step**2 * (weights**2).sum(axis=1) + weight_step**2 * reach) / 12
        signal = seen.energy[_result_place(graph, node)]
        found.append(float(np.mean(noise / np.maximum(signal, FAINT * float(np.median(signal)) + 1e-30))))
    return float(np.mean(found))


# ---- doing it


def scaled(graph: Graph, chain: Chain, powers: Array) -> Graph:
    """The graph with channel c of the chain 2^powers[c] times as large."""
    editor = Editor(graph)
    factor = np.exp2(powers)
    for name in chain.makers:
        node = editor.nodes[name]
        _replace_constants(editor, node, [_times(node, editor.tensors[each].data, factor, into=False) if each else None for each in node.inputs[1:]])
    for name in chain.readers:
        node = editor.nodes[name]
        _replace_constants(editor, node, [_times(node, editor.tensors[node.inputs[1]].data, 1 / factor, into=True)])
    for name in chain.tensors:  # they equal no tensor of the model any more
        editor.tensors[name] = replace(editor.tensors[name], source="")
    return editor.freeze()


def _times(node: Node, data: Array | None, factor: Array, *, into: bool) -> Array:
    """A constant of the node with its output channels scaled, or (`into`) its input channels."""
    assert data is not None
    if data.ndim == 1 or (data.ndim == 2 and not into):
        return np.asarray(data * factor, np.float32)
    if data.ndim == 2:
        return np.asarray(data * factor[:, None], np.float32)
    if not into:
        return np.asarray(data * factor[:, None, None, None], np.float32)
    groups = node.attributes.groups  # type: ignore[attr-defined]
    by_group = factor.reshape(groups, 1, -1).repeat(len(data) // groups, axis=1).reshape(len(data), -1)
    return np.asarray(data * by_group[:, :, None, None], np.float32)


def _replace_constants(editor: Editor, node: Node, values: Sequence[Array | None]) -> None:
    """Other data for the inputs from the second on; a constant that others read stays as it is for them."""
    names = list(node.inputs)
    for index, data in enumerate(values, start=1):
        old = names[index]
        if data is None:
            continue
        if editor.is_read_once(old):
            editor.tensors[old] = replace(editor.tensors[old], data=data)
        else:
            names[index] = editor.constant(old, data)
    editor.add_node(replace(node, inputs=tuple(names)))
