"""A matrix operator as a plain matrix product: columns of the input, matrix of the weights.

The one big idea: convolution, depthwise convolution and matrix product all are Y[g] = X[g] · W[g], one product per group, so that one
solver serves them all. X has a last column of ones, whose weights are the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import ops
from npucc.graph import Graph, Node
from npucc.ops import OPS

Array = np.ndarray[Any, np.dtype[Any]]

MOST_COLUMNS = 8192  # of a layer that is fitted: its Gram matrix then has half a GiB


@dataclass(frozen=True, slots=True)
class Site:
    """One matrix operator with constant weights: `groups` products of `depth` columns (and one of ones) with `outputs` results each.

    Each input channel has kernel height × width columns, next to each other.
    """

    node: Node
    groups: int
    depth: int
    outputs: int
    kernel: tuple[int, int]

    @property
    def taps(self) -> int:
        """Columns per input channel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def summing_order(self) -> Array:
        """int[depth]: the columns in the order in which the array sums: kernel row, kernel column, input channel."""
        return np.asarray(np.arange(self.depth).reshape(-1, self.taps).T.ravel())

    @property
    def input(self) -> str:
        return self.node.inputs[0]

    @property
    def weights(self) -> str:
        return self.node.inputs[1]

    @property
    def bias(self) -> str:
        """The name of the bias, or ""."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else ""

    def matrix(self, graph: Graph, values: Mapping[str, Array] | None = None) -> Array:
        """[groups, depth + 1, outputs] as float64, the bias in the last row. `values` go before the graph's constants."""
        weights, bias = (_value(graph, values, name) for name in (self.weights, self.bias))
        assert weights is not None
        columns = self.by_column(weights)
        last = np.zeros(self.groups * self.outputs) if bias is None else np.broadcast_to(bias, self.groups * self.outputs)
        return np.concatenate([columns.astype(np.float64), last.reshape(self.groups, 1, self.outputs)], axis=1)

    def constants(self, graph: Graph, matrix: Array) -> tuple[Array, Array]:
        """(weights, bias) as float32 in the operator's layout: the inverse of `matrix`."""
        weights = self.as_stored(matrix[:, :-1], graph.tensors[self.weights].shape)
        return np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(matrix[:, -1].reshape(-1), np.float32)

    def by_column(self, weights: Array) -> Array:
        """The operator's weights as [groups, depth, outputs]."""
        if self.node.op == "matmul":
            return np.asarray(weights[None])
        return np.asarray(weights.reshape(self.groups, self.outputs, self.depth).transpose(0, 2, 1))

    def as_stored(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `by_column`. `shape`: of the weights."""
        return np.asarray(matrix[0] if self.node.op == "matmul" else matrix.transpose(0, 2, 1).reshape(shape))

    def columns(self, value: Array, rows: int, seed: int) -> Array:
        """[groups, at most `rows`, depth + 1] float32: the input as the sums see it, at places that depend on the seed only."""
        found = value.reshape(1, -1, self.depth) if self.node.op == "matmul" else self._patches(value, rows, seed)
        if self.node.op == "matmul":
            found = found[:, _places(found.shape[1], rows, seed)]
        return np.concatenate([found, np.ones((*found.shape[:2], 1), found.dtype)], axis=2)

    def answers(self, value: Array, rows: int, seed: int) -> Array:
        """[groups, at most `rows`, outputs]: a tensor of the result's shape, at the same places as `columns`."""
        flat = value.reshape(-1, self.outputs) if self.node.op == "matmul" else np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])
        chosen = flat[_places(len(flat), rows, seed)]
        return np.asarray(chosen.reshape(len(chosen), self.groups, self.outputs).transpose(1, 0, 2))

    def _patches(self, value: Array, rows: int, seed: int) -> Array:
        a = self.node.attributes
        assert isinstance(a, ops.Conv)
        top, left, bottom, right = a.pads
        padded = np.pad(value, ((0, 0), (0, 0), (top, bottom), (left, right)))
        reach = tuple((size - 1) * step + 1 for size, step in zip(self.kernel, a.dilations, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
        windows = windows[:, :, :: a.strides[0], :: a.strides[1], :: a.dilations[0], :: a.dilations[1]]
        batch, channels, height, width = windows.shape[:4]
        places = _places(batch * height * width, rows, seed)
        n, i, j = np.unravel_index(places, (batch, height, width))
        chosen = windows[n, :, i, j]  # [rows, C, kh, kw]
        return np.ascontiguousarray(chosen.reshape(len(places), self.groups, channels // self.groups * self.taps).transpose(1, 0, 2))


def _places(count: int, rows: int, seed: int) -> Array:
    """At most `rows` of so many places, in order."""
    return np.arange(count) if count <= rows else np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))


def _value(graph: Graph, values: Mapping[str, Array] | None, name: str) -> Array | None:
    if not name:
        return None
    return graph.tensors[name].data if values is None else values.get(name, graph.tensors[name].data)


def find_sites(graph: Graph) -> dict[str, Site]:
    """By node name: every convolution, and every product with one constant matrix."""
    sites = {}
    for node in graph:
        constant = [graph.tensors[name].is_constant for name in node.inputs if name]
        if not OPS[node.op].matrix or constant[0] or not all(constant[1:]):
            continue
        shape = graph.tensors[node.inputs[1]].shape
        if isinstance(node.attributes, ops.Conv):
            groups = node.attributes.groups
            sites[node.name] = Site(node, groups, shape[1] * shape[2] * shape[3], shape[0] // groups, (shape[2], shape[3]))
        elif node.op == "matmul" and len(shape) == 2:
            sites[node.name] = Site(node, 1, shape[0], shape[1], (1, 1))
    return sites
