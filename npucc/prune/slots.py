"""Which channels stand or fall together.

The one big idea: every index of every dimension of every tensor is a slot, and each operator says which slots of its inputs and results are
the same thing. Slots so tied carry one label; removing a label removes all its slots, and the graph fits together again by itself, whatever
lies between: residual sums, concatenations, depthwise convolutions, gates, slices, flattening into a matrix product. Label 0 is what can't
go: dimensions of inputs and outputs, pixels, whatever an operator mixes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.graph import Graph

Array = np.ndarray[Any, np.dtype[Any]]
Axis = tuple[str, int]  # a tensor and one of its dimensions

FIXED = 0


@dataclass(frozen=True, slots=True)
class Slots:
    """`labels`: per dimension of each tensor, the label of each index. Equal labels must be removed together; 0 stays."""

    labels: Mapping[Axis, Array]
    count: int

    def of(self, tensor: str, rank: int) -> Array:
        """Which labels the tensor has: bool[count]."""
        present = np.zeros(self.count, bool)
        for axis in range(rank):
            present[self.labels[tensor, axis]] = True
        present[FIXED] = False
        return present

    def families(self) -> tuple[Array, ...]:
        """Labels that lie in exactly the same dimensions equally often, so that any of them may go: arrays of at least two labels, ascending."""
        places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, labels in enumerate(self.labels.values()):
            for label, times in zip(*(part.tolist() for part in np.unique(labels[labels != FIXED], return_counts=True)), strict=True):
                places[label].append((index, times))
        families: defaultdict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for label, where in sorted(places.items()):
            families[tuple(where)].append(label)
        return tuple(np.array(members) for members in families.values() if len(members) > 1)


class Ties:
    """Collects which slots are one; `finish` merges them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids: dict[Axis, Array] = {}
        self.fixed: set[Axis] = set()
        self.pairs: list[tuple[Array, Array]] = []
        total = 1
        for name, tensor in graph.tensors.items():
            for axis, size in enumerate(tensor.shape):
                self.ids[name, axis] = np.arange(total, total + size)
                total += size
                if size <= 1:
                    self.fix(name, axis)
        self.total = total

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.graph.tensors[tensor].shape

    def fix(self, tensor: str, *axes: int) -> None:
        """These dimensions (all, if none is named) keep their size."""
        for axis in axes or range(len(self.shape(tensor))):
            self.fixed.add((tensor, axis))
            self.pairs.append((self.ids[tensor, axis], np.array([FIXED])))

    def tie(self, first: Axis, second: Axis) -> None:
        """Two dimensions are index for index the same."""
        self.tie_slots(first, self.ids[first], second, self.ids[second])

    def tie_slots(self, first: Axis, first_ids: Array, second: Axis, second_ids: Array) -> None:
        self.pairs.append((first_ids, second_ids))
        if first in self.fixed:
            self.fixed.add(second)

    def finish(self) -> Slots:
        """Labels: the smallest slot number among those tied, counted from 0."""
        label = np.arange(self.total)
        pairs = [np.broadcast_arrays(a, b) for a, b in self.pairs]
        changed = True
        while changed:
            before = label.copy()
            for a, b in (*pairs, *reversed(pairs)):
                np.minimum.at(label, a, label[b])
                np.minimum.at(label, b, label[a])
            changed = bool((label != before).any())
        _, dense = np.unique(label, return_inverse=True)
        return Slots({axis: dense[ids] for axis, ids in self.ids.items()}, int(dense.max()) + 1)
