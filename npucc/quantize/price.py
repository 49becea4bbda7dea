"""What 16 bits cost, in cycles of the target.

The one big idea: prices are measured, not modelled. Cycles do not depend on values, so the integer graph is compiled with some of its
activations declared s16; the groups that no layer has in common are declared together, and each layer's extra cycles are its group's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from isa.target import Target
from npucc.errors import CompileError
from npucc.graph import Graph
from npucc.lowering import layer_cycles
from npucc.ops import OPS
from npucc.quantize.share import moved_inputs

IMPOSSIBLE = float("inf")


@dataclass(frozen=True, slots=True)
class Prices:
    """Cycles of the graph as it is, and per group (by its root) the extra cycles of 16 bits; `IMPOSSIBLE` where that has no program."""

    cycles: int
    extra: Mapping[str, float]

    def percent(self, root: str) -> float:
        """The extra cycles in percent of the whole."""
        return 100 * self.extra[root] / max(self.cycles, 1)


def measure_prices(integer: Graph, groups: Mapping[str, tuple[str, ...]], target: Target) -> Prices:
    """The price of 16 bits in each group of activations of an integer graph."""
    before = layer_cycles(integer, target)
    touched = {root: _layers_at(names, before) for root, names in groups.items()}
    extra: dict[str, float] = {}
    for together in _apart(touched):
        after = _layer_cycles_with(integer, (name for root in together for name in groups[root]), target)
        for root in together:
            extra[root] = IMPOSSIBLE if after is None else sum(after[layer] - before[layer][1] for layer in touched[root])
    return Prices(sum(cycles for _, cycles in before), extra)


def total_cycles(integer: Graph, names: Iterable[str], target: Target) -> float:
    """The cycles with these activations in 16 bits; `IMPOSSIBLE` if there is no such program."""
    after = _layer_cycles_with(integer, names, target)
    return IMPOSSIBLE if after is None else sum(after)


def _layer_cycles_with(integer: Graph, names: Iterable[str], target: Target) -> list[int] | None:
    tensors, wide = dict(integer.tensors), set(names)
    moves = (node for node in integer if OPS[node.op].moves_data and node.outputs[0] in wide)
    wide |= {name for node in moves for name in moved_inputs(node) if tensors[name].is_constant}  # they are stored as what they become part of
    for name in sorted(wide):
        data = tensors[name].data
        data = None if data is None else data.astype(np.int16)
        tensors[name] = replace(tensors[name], quant=replace(integer.quant(name), dtype="s16"), data=data)
    try:
        return [cycles for _, cycles in layer_cycles(replace(integer, tensors=tensors), target)]
    except CompileError:
        return None


def _layers_at(names: Iterable[str], layers: list[tuple[tuple, int]]) -> set[int]:  # type: ignore[type-arg]
    """The layers that read or write one of the tensors."""
    wanted = set(names)
    return {index for index, (nodes, _) in enumerate(layers) if any(wanted.intersection((*node.inputs, *node.outputs)) for node in nodes)}


def _apart(touched: Mapping[str, set[int]]) -> list[list[str]]:
    """The groups in as few lists as first fit makes, no two groups of a list at the same layer."""
    lists: list[tuple[list[str], set[int]]] = []
    for root, layers in touched.items():
        for members, taken in lists:
            if not taken & layers:
                members.append(root)
                taken |= layers
                break
        else:
            lists.append(([root], set(layers)))
    return [members for members, _ in lists]
