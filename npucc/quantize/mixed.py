"""16 bits for the few tensors that are worth it.

The one big idea: groups are taken one after the other, each time the one whose 16 bits raise the outputs' estimated signal-to-noise ratio
most per extra cycle; then the best point of that path is looked for. Which is best: the one with the most worth left after its price
(`auto`), or the first whose estimated loss of accuracy is small enough (`auto,drop=0.1`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.evaluate import score_rows
from npucc.graph import Graph, Node
from npucc.ops import OPS
from npucc.quantize.calibrate import measured
from npucc.quantize.constants import LARGEST_STEP as BYTE_STEP
from npucc.quantize.constants import LARGEST_SUM
from npucc.quantize.scales import Scales
from npucc.quantize.sensitivity import Sensitivity

Array = np.ndarray[Any, np.dtype[Any]]

QUIET = 1e-6  # error energy over signal energy that nobody asks to lower (60 dB)
POOR = 25.0  # dB: up to here what is gained counts `POOR_COUNTS` times
POOR_COUNTS = 3.0
GOOD = 45.0  # dB: up to here all that is gained counts, from here to `QUIET` half
PERCENT = 0.2  # dB that one percent of cycles has to gain
FREE = 0.02  # percent of cycles: what costs less is compared as if it cost that
SMALLEST_GAIN = 0.02  # dB: less is no reason to widen anything
LARGEST_STEP = 2**15  # of an s16 activation from its zero point
WEIGHT_BITS = 0.5  # that a reader may lose where its sums would leave 32 bits otherwise


@dataclass(frozen=True, slots=True)
class Wide:
    """One group that the measurement put into 16 bits: its tensors, the gain (dB, mean over outputs and samples) and the price (% of cycles)."""

    tensors: tuple[str, ...]
    gain: float
    price: float


@dataclass(frozen=True, slots=True)
class Mixed:
    """What was chosen. `before` and `after`: estimated signal-to-noise ratio in dB, mean over outputs and samples; `weights`: what 8-bit
    weights alone would leave; `loss`: estimated loss of accuracy in points; `spent`: percent more cycles, the prices of the chosen added;
    `price`: the same measured together."""

    chosen: tuple[Wide, ...] = ()
    before: float = 0.0
    after: float = 0.0
    weights: float = 0.0
    loss: float = 0.0
    spent: float = 0.0
    price: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, of as many digits as mean something."""
        figures = ("before", "after", "weights", "loss", "spent", "price")
        chosen = [{"tensors": list(each.tensors), "gain": round(each.gain, 2), "price": round(each.price, 3)} for each in self.chosen]
        return {"chosen": chosen, **{name: round(getattr(self, name), 3) for name in figures}}


def byte_groups(graph: Graph, scales: Scales) -> dict[str, tuple[str, ...]]:
    """Per group of real numbers in 8 bits, by its root: its activations."""
    groups: dict[str, list[str]] = {}
    for name, tensor in graph.tensors.items():
        if not tensor.is_constant and tensor.dtype != "bool":
            groups.setdefault(scales.groups.root(name), []).append(name)
    roots = {scales.groups.root(name) for name in measured(graph)}
    stored = {root: names for root, names in groups.items() if root in roots and root in scales.quants and scales.quants[root].dtype == "s8"}
    return {root: tuple(names) for root, names in stored.items() if all(graph.tensors[name].dtype == "float32" for name in names)}


def candidates(graph: Graph, integer: Graph, scales: Scales) -> dict[str, tuple[str, ...]]:
    """The groups that 16 bits may go to. Left out is what would cost its readers too many weight bits, and what the model has fixed itself."""
    refused = {scales.groups.root(name) for node in graph for name in _refused_operands(graph, integer, node)}
    refused |= {scales.groups.root(name) for name, tensor in graph.tensors.items() if tensor.given is not None}
    return {root: names for root, names in byte_groups(graph, scales).items() if root not in refused}


def _refused_operands(graph: Graph, integer: Graph, node: Node) -> tuple[str, ...]:
    """Activations that must stay in 8 bits because of this node: right operands of products of activations, those whose sums would be
    too large, and what the host reads or makes."""
    record = OPS[node.op]
    if record.host or record.indices:
        return tuple(name for name in (*node.inputs, *node.outputs) if name)
    if not record.matrix:
        return ()
    weights = integer.tensors[integer.nodes[node.name].inputs[1]]
    if weights.data is None or graph.tensors[node.inputs[1]].data is None:
        return node.inputs[1:2] if left_may_be_wide(graph, node) else node.inputs[:2]
    axis = weights.quant.axis if weights.quant else None
    magnitude = np.abs(weights.data.astype(np.int64))
    others = tuple(i for i in range(magnitude.ndim) if i != axis) if axis is not None else tuple(range(1, magnitude.ndim))
    return node.inputs[:1] if float(magnitude.sum(axis=others).max(initial=0)) * LARGEST_STEP > LARGEST_SUM * 2**WEIGHT_BITS else ()


def left_may_be_wide(graph: Graph, node: Node) -> bool:
    """Whether a product of two activations stays within 32 bits: few products are summed, or probabilities weigh them."""
    left = graph.tensors[node.inputs[0]]
    producer = graph.producer(node.inputs[0])
    probabilities = producer is not None and producer.op == "softmax" and producer.attributes.axis % len(left.shape) == len(left.shape) - 1  # type: ignore[attr-defined]
    return probabilities or left.shape[-1] * LARGEST_STEP * BYTE_STEP < LARGEST_SUM


@dataclass(frozen=True, slots=True)
class _Point:
    """The path up to here: roots and their gains, error per row, percent of cycles, estimated loss."""

    taken: tuple[tuple[str, float], ...]
    rest: Array
    spent: float


def choose(
    sensitivity: Sensitivity, groups: Mapping[str, tuple[str, ...]], price: Mapping[str, float], *, budget: float, drop: float | None = None,
    most: int | None = None,
) -> tuple[tuple[str, ...], Mixed]:
    """The roots to widen and the account of it. `price`: percent of cycles; `budget`: at most so many of them together.

    `drop`: points of accuracy that may be lost; None: what is worth its price. `most`: at most so many groups.
    """
    sensitivity = sensitivity.heard()
    path = _path(sensitivity, {root: price[root] for root in groups if root in sensitivity.groups}, budget)
    path = path if most is None else path[: most + 1]
    if drop is None:
        best = max(path, key=lambda point: _worth(point.rest) - PERCENT * point.spent)
    else:
        good = [point for point in path if estimated_loss(sensitivity, point.rest) <= drop]
        best = min(good, key=lambda point: point.spent) if good else min(path, key=lambda point: estimated_loss(sensitivity, point.rest))
    chosen = tuple(Wide(groups[root], gain, price[root]) for root, gain in best.taken)
    return tuple(root for root, _ in best.taken), Mixed(
        chosen, _decibels(path[0].rest), _decibels(best.rest), _decibels(sensitivity.weights), estimated_loss(sensitivity, best.rest), best.spent
    )  # fmt: skip


def _path(sensitivity: Sensitivity, price: Mapping[str, float], budget: float) -> list[_Point]:
    """From nothing in 16 bits to all that the budget allows: each point has one group more than the one before."""
    roots = list(price)
    noise = np.array([sensitivity.groups[root] for root in roots]).reshape(len(roots), len(sensitivity.outputs))
    cost = np.array([price[root] for root in roots])
    point = _Point((), sensitivity.weights + sum(sensitivity.groups.values()), 0.0)
    points = [point]
    left = np.ones(len(roots), bool)
    while roots and sensitivity.outputs:
        gains = np.mean(10 * np.log10((point.rest + QUIET) / (np.maximum(point.rest - noise, 0) + QUIET)), axis=1)
        left &= (point.spent + cost <= budget) & (gains >= SMALLEST_GAIN)
        if not left.any():
            break
        best = int(np.argmax(np.where(left, gains / np.maximum(cost, FREE), -1)))
        left[best] = False
        rest = np.maximum(point.rest - noise[best], sensitivity.weights)
        point = _Point((*point.taken, (roots[best], float(gains[best]))), rest, point.spent + max(float(cost[best]), 0.0))
        points.append(point)
    return points


def _worth(ratios: Array) -> float:
    """Decibels, those below `POOR` counted more, those above `GOOD` half, those beyond `QUIET` not at all; mean over the rows."""
    decibels = -10 * np.log10(ratios + QUIET)
    counted = decibels + (POOR_COUNTS - 1) * np.minimum(decibels - POOR, 0) - np.maximum(decibels - GOOD, 0) / 2
    return float(np.mean(counted)) if len(ratios) else 0.0


def _decibels(ratios: Array) -> float:
    return float(np.mean(-10 * np.log10(ratios + QUIET / 100))) if len(ratios) else 0.0


def estimated_loss(sensitivity: Sensitivity, ratios: Array) -> float:
    """Points of accuracy lost with this error per row, mean over the samples; of the output that loses most.

    Error energy over signal energy, in percent; of an output of scores what `_turned_over` expects, if that is more.
    """
    losses: dict[str, list[float]] = {}
    for name, ratio, wanted in zip(sensitivity.outputs, ratios.tolist(), sensitivity.wanted, strict=True):
        rows = score_rows(wanted)
        expected = 0.0 if rows is None else _turned_over(rows.astype(np.float64), ratio)
        losses.setdefault(name, []).append(100 * max(min(ratio, 1.0), expected))
    return max((math.fsum(each) / len(each) for each in losses.values()), default=0.0)


def _turned_over(rows: Array, ratio: float) -> float:
    """Share of right answers lost in rows of scores [rows, classes] under normally distributed error of that energy.

    Per row, weighted by its energy: the chance that the largest two scores change places, times by how much the model thinks the first
    more probable than the second. Scores that are no probabilities are taken for logits.
    """
    energy = np.sum(rows * rows, axis=1)
    deviation = math.sqrt(max(ratio * float(energy.sum()), 1e-30) / rows.size)
    probable = rows
    if rows.min() < 0 or rows.max() > 1:
        probable = np.exp(rows - rows.max(axis=1, keepdims=True))
        probable = probable / probable.sum(axis=1, keepdims=True)
    margin, lost = (np.diff(np.sort(each, axis=1)[:, -2:], axis=1)[:, 0] for each in (rows, probable))
    chance = np.array([math.erfc(each / (2 * deviation)) / 2 for each in margin.tolist()])
    return float(np.sum(energy * chance * lost) / max(float(energy.sum()), 1e-30))
