"""What a graph costs once labels are gone, before it is cut: multiply-accumulates, and cycles by the machine's own equations.

The one big idea: a layer's size is a count of labels that stay, so thousands of ways to prune can be priced without building any of them.
The cycles leave out transfers that tiling hides or not; the compiled program has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from isa.target import Target
from npucc import ops
from npucc.graph import Graph, Node
from npucc.lowering.cost import dma_cycles, vector_cycles
from npucc.ops import OPS
from npucc.prune.patterns import Pattern
from npucc.prune.shrink import kept_size
from npucc.prune.slots import Slots
from runtime.costs import Product, Windows, matrix_cost

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Price:
    macs: int
    cycles: float


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices of a graph, its labels given."""

    graph: Graph
    slots: Slots
    target: Target

    def of(self, removed: Array) -> Price:
        """The whole graph without the labels where bool[`removed`] is set."""
        return self.part(tuple(self.graph), removed)

    def part(self, nodes: Sequence[Node], removed: Array) -> Price:
        """These nodes only."""
        prices = [self._node(node, removed) for node in nodes]
        return Price(sum(price.macs for price in prices), sum(price.cycles for price in prices))

    def touched(self, labels: Array) -> tuple[Node, ...]:
        """The nodes whose price depends on these labels."""
        chosen = np.zeros(self.slots.count, bool)
        chosen[labels] = True
        sizes = ((name, axis) for name, tensor in self.graph.tensors.items() for axis in range(len(tensor.shape)))
        hit = {name for name, axis in sizes if chosen[self.slots.labels[name, axis]].any()}
        return tuple(node for node in self.graph if hit.intersection((*node.inputs, *node.outputs)))

    def _shape(self, tensor: str, removed: Array) -> tuple[int, ...]:
        return tuple(kept_size(self.slots, removed, tensor, axis) for axis in range(len(self.graph.tensors[tensor].shape)))

    def _node(self, node: Node, removed: Array) -> Price:
        if OPS[node.op].matrix:
            return self._matrix(self._product(node, removed), 1.0)
        if OPS[node.op].moves_data:
            return Price(0, 0.0)
        return Price(0, vector_cycles(self.target, math.prod(self._shape(node.outputs[0], removed))))

    def thinned(self, node: Node, pattern: Pattern) -> Price:
        """A whole layer with a pattern of zeros in its weights: packed, and skipped where the target skips them."""
        skips = self.target.skip in ("weights", "both") or (self.target.skip == "structured" and pattern.is_structured)
        return self._matrix(self._product(node, np.zeros(self.slots.count, bool)), 1 - pattern.zeros, skips=skips)

    def _matrix(self, product: Product, share: float, *, skips: bool = False) -> Price:
        """`share`: of the weights that are not zero; `skips`: whether the array leaves out the others."""
        weights = round(product.depth * product.outputs * product.groups * share)
        vector = vector_cycles(self.target, product.pixels * product.outputs * product.groups)
        worked = replace(product, depth=math.ceil(product.depth * share)) if skips else product
        cycles = max(_matrix_cycles(worked, self.target), vector, dma_cycles(self.target, weights, weights))
        return Price(round(product.macs * share), cycles)

    def _product(self, node: Node, removed: Array) -> Product:
        result, weights = self._shape(node.outputs[0], removed), self._shape(node.inputs[1], removed)
        if isinstance(node.attributes, ops.Conv):
            pixels, kernel = result[0] * result[2] * result[3], (weights[2], weights[3])
            windows = Windows(result[3], kernel, node.attributes.strides, node.attributes.dilations)
            if node.attributes.groups > 1 and weights[1] == 1:
                return Product(pixels, math.prod(kernel), 1, weights[0], depthwise=True, windows=windows)
            groups = node.attributes.groups
            return Product(pixels, weights[1] * math.prod(kernel), weights[0] // groups, groups, windows=windows)
        if isinstance(node.attributes, ops.ConvTranspose):
            pixels = math.prod(self._shape(node.inputs[0], removed)) // max(weights[0], 1)
            return Product(pixels, weights[0], math.prod(weights[1:]))
        return Product(result[-2], self._shape(node.inputs[0], removed)[-1], result[-1], math.prod(result[:-2]))


@lru_cache(maxsize=1 << 16)
def _matrix_cycles(product: Product, target: Target) -> int:
    return matrix_cost(product, target).cycles
