"""16 bits for the few tensors that are worth it.

The one big idea: a greedy choice. Each step takes the group whose 16 bits raise the outputs' estimated signal-to-noise ratio most per
extra cycle, until the budget is spent or a step is no longer worth its price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isa.target import Target
from npucc.graph import Graph, Node
from npucc.ops import OPS
from npucc.quantize.calibrate import measured
from npucc.quantize.constants import LARGEST_SUM
from npucc.quantize.scales import Scales
from npucc.quantize.sensitivity import Sensitivity, multiply_accumulates
from runtime.costs import Product, matrix_cost

Array = np.ndarray[Any, np.dtype[Any]]

QUIET = 1e-6  # error energy over signal energy that nobody asks to lower (60 dB)
LARGEST_STEP = 65535  # of an s16 activation from its zero point
WORTH = 0.5  # dB that one percent of cycles has to gain
SMALLEST_GAIN = 0.02  # dB: less is no reason to widen anything
VECTOR_WIDTH = 32  # elements a cycle, where no target is given
MEMORY_WIDTH = 8  # bytes a cycle, likewise
VECTOR_PASSES = 2  # that a reader of 16 bits needs more than one of 8: fewer fast forms, interpolated tables
ARRAY = 1024  # multiply-accumulates a cycle, likewise


@dataclass(frozen=True, slots=True)
class Wide:
    """One group that the measurement put into 16 bits: its tensors, the gain (dB, mean over outputs and samples) and the price (% of cycles)."""

    tensors: tuple[str, ...]
    gain: float
    price: float


@dataclass(frozen=True, slots=True)
class Mixed:
    """What was chosen. `before` and `after`: estimated signal-to-noise ratio in dB, mean over outputs and samples; `weights`: what 8-bit
    weights alone would leave."""

    chosen: tuple[Wide, ...] = ()
    before: float = 0.0
    after: float = 0.0
    weights: float = 0.0

    @property
    def price(self) -> float:
        """Percent of the estimated cycles."""
        return sum(each.price for each in self.chosen)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "price": self.price}


def candidates(graph: Graph, integer: Graph, scales: Scales) -> dict[str, tuple[str, ...]]:
    """Per group that 16 bits may go to: its activations. Left out are integers, what has 16 bits, and what would cost its readers weight bits."""
    groups: dict[str, list[str]] = {}
    refused = {scales.groups.root(name) for node in graph for name in _refused_operands(graph, integer, node)}
    float_roots = {scales.groups.root(name) for name in measured(graph) if graph.tensors[name].dtype == "float32"}
    for name, tensor in graph.tensors.items():
        if tensor.is_constant or tensor.dtype == "bool":
            continue
        root = scales.groups.root(name)
        if tensor.dtype != "float32":
            refused.add(root)
        groups.setdefault(root, []).append(name)
    return {
        root: tuple(names)
        for root, names in groups.items()
        if root in float_roots and root not in refused and root in scales.quants and scales.quants[root].dtype == "s8"
    }


def _refused_operands(graph: Graph, integer: Graph, node: Node) -> tuple[str, ...]:
    """Activations that must stay in 8 bits because of this node: operands of products of activations, those whose sums would leave 32
    bits, and what the host reads or makes."""
    record = OPS[node.op]
    if record.host or record.indices:
        return tuple(name for name in (*node.inputs, *node.outputs) if name)
    if not record.matrix:
        return ()
    weights = integer.tensors[integer.nodes[node.name].inputs[1]]
    if weights.data is None or graph.tensors[node.inputs[1]].data is None:
        return node.inputs[:2]
    axis = weights.quant.axis if weights.quant else None
    magnitude = np.abs(weights.data.astype(np.int64))
    others = tuple(i for i in range(magnitude.ndim) if i != axis) if axis is not None else tuple(range(1, magnitude.ndim))
    return node.inputs[:1] if float(magnitude.sum(axis=others).max(initial=0)) * LARGEST_STEP * 1.01 > LARGEST_SUM else ()


def prices(graph: Graph, groups: Mapping[str, tuple[str, ...]], target: Target | None) -> dict[str, float]:
    """Percent of extra cycles per group: its matrix readers a second time, more vector work next to it, and its bytes moved once more."""
    cycles = {node.name: _matrix_cycles(graph, node, target) for node in graph}
    lanes = target.vec_lanes if target else VECTOR_WIDTH
    bandwidth = target.dram_bytes_per_cycle if target else MEMORY_WIDTH
    total = sum(cycles.values()) + sum(_elements(graph, node.outputs[0]) / lanes for node in graph if not cycles[node.name] and not OPS[node.op].host)
    result = {}
    for root, names in groups.items():
        readers = {user.name for name in names for user in graph.users(name)}
        moved = sum(_elements(graph, name) for name in names)
        passes = sum(_elements(graph, name) * VECTOR_PASSES * len(graph.users(name)) for name in names)
        result[root] = 100 * (sum(cycles[name] for name in readers) + moved / bandwidth + passes / lanes) / max(total, 1.0)
    return result


def _elements(graph: Graph, name: str) -> int:
    return int(np.prod(graph.tensors[name].shape))


def _matrix_cycles(graph: Graph, node: Node, target: Target | None) -> float:
    """Of a node with the trait `matrix` on the target, or on a plain array; 0 of any other."""
    macs = multiply_accumulates(graph, node.name)
    if target is None or not macs:
        return macs / ARRAY
    groups = getattr(node.attributes, "groups", 1)
    shape = graph.tensors[node.inputs[1]].shape
    if node.op == "conv":
        outputs, depth = shape[0] // groups, int(np.prod(shape[1:]))
    elif node.op == "conv_transpose":
        outputs, depth = int(np.prod(shape[1:])), shape[0] // groups
    else:
        depth, outputs = shape[-2], shape[-1]
    pixels = max(macs // (groups * outputs * depth), 1)
    return float(matrix_cost(Product(pixels, depth, outputs, groups, depthwise=groups > 1 and outputs == 1), target).cycles)


def choose(sensitivity: Sensitivity, groups: Mapping[str, tuple[str, ...]], price: Mapping[str, float], *, budget: float) -> tuple[set[str], Mixed]:
    """The roots to widen and the account of it. `budget`: percent of cycles; what is nearly free is judged by its gain alone."""
    roots = [root for root in groups if root in sensitivity.groups]
    if not roots or not sensitivity.outputs:
        return set(), Mixed()
    noise = np.array([sensitivity.groups[root] for root in roots])
    cost = np.array([price[root] for root in roots])
    rest = sensitivity.weights + noise.sum(axis=0)
    chosen: dict[str, Wide] = {}
    before, spent = _decibels(rest), 0.0
    while len(chosen) < len(roots):
        gains = np.mean(10 * np.log10((rest + QUIET) / (np.maximum(rest - noise, 0) + QUIET)), axis=1)
        allowed = (gains >= SMALLEST_GAIN) & (gains >= WORTH * cost) & (spent + cost <= budget)
        allowed[[roots.index(root) for root in chosen]] = False
        if not allowed.any():
            break
        best = int(np.argmax(np.where(allowed, gains / np.maximum(cost, 0.05), -1)))
        chosen[roots[best]] = Wide(groups[roots[best]], float(gains[best]), float(cost[best]))
        rest, spent = np.maximum(rest - noise[best], 0), spent + float(cost[best])
    return set(chosen), Mixed(tuple(chosen.values()), before, _decibels(rest), _decibels(sensitivity.weights))


def _decibels(ratios: Array) -> float:
    return float(np.mean(-10 * np.log10(ratios + QUIET / 100)))
