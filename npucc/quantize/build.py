"""The integer graph, once all scales are known.

The one big idea: the graph keeps its nodes and names; activations get their quantization, constants become integers. A constant that two
nodes store differently becomes two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from npucc import arithmetic
from npucc.errors import QuantizeError
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS
from npucc.quantize.calibrate import summed_axis
from npucc.quantize.constants import (
    LARGEST_WEIGHT,
    MatrixConstants,
    axes_of,
    constant_quant,
    dequantized,
    finite_constant,
    nearest,
    quantize_matrix,
    source_of,
    with_bias,
)
from npucc.quantize.given import kept_matrix
from npucc.quantize.options import QuantizeOptions
from npucc.quantize.ranges import Range
from npucc.quantize.rounding import Evidence, Lattice, grouped_lattice, round_weights
from npucc.quantize.scales import BOOLEAN, INDEX, Scales
from npucc.sites import Site, find_sites

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Solved:
    """What was solved, kept from one call of `build` to the next: weights by their name and the digest of their steps, and the constants of
    matrix operators by their name and what they read."""

    weights: dict[tuple[str, bytes], Array] = field(default_factory=dict)
    constants: dict[tuple[str, Any], MatrixConstants] = field(default_factory=dict)


def build(
    graph: Graph,
    scales: Scales,
    means: Mapping[tuple[str, int], Array],
    options: QuantizeOptions,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    solved: Solved | None = None,
) -> Graph:
    """The integer graph. `means`: of the first operand of each matrix operator, per (tensor, axis).

    `evidence`: per weights what their layers read; weights without are rounded to the nearest. `solved` keeps what was rounded by evidence
    from one call to the next.
    """
    sites = {site.weights: site for site in find_sites(graph).values()}
    builder = _Builder(graph, scales, means, options, evidence or {}, sites, Editor(graph), solved or Solved())
    for name, tensor in graph.tensors.items():
        if not tensor.is_constant:
            builder.editor.tensors[name] = replace(tensor, quant=scales.of(graph, name), given=None, moments=None)
    for node in graph:
        builder.editor.add_node(replace(node, inputs=builder.inputs(node)))
    for name in graph.outputs:
        builder.store_output(name)
    return builder.editor.freeze()


@dataclass(slots=True)
class _Builder:
    """`stored`: what became of each constant."""

    graph: Graph
    scales: Scales
    means: Mapping[tuple[str, int], Array]
    options: QuantizeOptions
    evidence: Mapping[str, Evidence]
    sites: Mapping[str, Site]
    editor: Editor
    solved: Solved
    stored: dict[tuple[str, Any, bytes], str] = field(default_factory=dict)

    def inputs(self, node: Node) -> tuple[str, ...]:
        """The node's inputs in the integer graph."""
        if OPS[node.op].matrix and not self._is_constant(node.inputs[0]) and self._is_constant(node.inputs[1]):
            return self._matrix_inputs(node)
        return tuple(self._operand(node, index, name) if self._is_constant(name) else name for index, name in enumerate(node.inputs))

    def store_output(self, name: str) -> None:
        """A constant that is a graph output keeps its name."""
        tensor = self.graph.tensors[name]
        if tensor.data is not None and self.editor.tensors[name].quant is None:
            quant = BOOLEAN if tensor.dtype == "bool" else constant_quant(tensor.data.astype(np.float64))
            self._store(name, _integers(tensor.data, quant), quant)

    def _is_constant(self, name: str) -> bool:
        return bool(name) and self.graph.tensors[name].is_constant

    def _data(self, name: str) -> Array:
        data = self.graph.tensors[name].data
        assert data is not None
        return data

    def _store(self, name: str, values: Array, quant: Quant) -> str:
        """The name of the constant with these integers: its own, or a fresh one if that has others."""
        key = (name, quant.key, values.tobytes())
        if key not in self.stored:
            taken = any(other[0] == name for other in self.stored)
            chosen = self.editor.fresh(name) if taken else name
            tensor = replace(self.graph.tensors[name], name=chosen, shape=values.shape, data=values, quant=quant, given=None)
            self.editor.tensors[chosen] = tensor
            self.stored[key] = chosen
        return self.stored[key]

    # ---- matrix operators with constant weights

    def _matrix_inputs(self, node: Node) -> tuple[str, ...]:
        key = (node.name, self.scales.of(self.graph, node.inputs[0]).key)
        if key not in self.solved.constants:
            self.solved.constants[key] = self._matrix_constants(node)
        constants = self.solved.constants[key]
        stored = self._store(node.inputs[1], constants.weights, constants.weights_quant)
        if constants.bias is None:
            return (node.inputs[0], stored)
        return (node.inputs[0], stored, self._store_bias(node, constants.bias, constants.bias_quant))

    def _matrix_constants(self, node: Node) -> MatrixConstants:
        weights, bias = self._data(node.inputs[1]), self._bias(node)
        _refuse_not_finite(node, weights, bias)
        source = self.scales.of(self.graph, node.inputs[0])
        kept = kept_matrix(node, self.graph, source)
        if isinstance(kept, MatrixConstants):
            return kept
        axes = axes_of(node, weights.ndim, per_tensor=self.options.per_tensor)
        constants = quantize_matrix(weights, bias, source, axes, rounding=partial(self._rounded, node.inputs[1]))
        return self._corrected(node, weights, bias, source, constants) if self.options.bias_correction and self.means else constants

    def _rounded(self, name: str, steps: Array) -> Array:
        """Weights over their scale as integers; solved once for all layers that read them on the same scale."""
        site, evidence = self.sites.get(name), self.evidence.get(name)
        grouped = site is not None and self.options.weight_bits == 4 and site.depth >= self.options.group
        if site is None or (evidence is None and not grouped):
            return nearest(steps)
        key = (name, hashlib.sha256(np.ascontiguousarray(steps).data).digest())
        if key not in self.solved.weights:
            columns, lattice = site.by_column(steps.astype(np.float64)), Lattice(np.ones(()), LARGEST_WEIGHT)
            if grouped:
                lattice = grouped_lattice(columns, site, self.options.group, evidence)
            matrix = round_weights(columns, lattice, evidence) if evidence else lattice.nearest(columns)
            self.solved.weights[key] = site.as_stored(matrix, steps.shape)
        return self.solved.weights[key]

    def _bias(self, node: Node) -> Array | None:
        return self._data(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None

    def _store_bias(self, node: Node, bias: Array, quant: Quant) -> str:
        if len(node.inputs) > 2 and node.inputs[2]:
            return self._store(node.inputs[2], bias, quant)
        name = self.editor.fresh(f"{node.outputs[0]}/bias")
        return self.editor.add_tensor(Tensor(name, bias.shape, "float32", bias, quant))

    def _corrected(self, node: Node, weights: Array, bias: Array | None, source: Quant, constants: MatrixConstants) -> MatrixConstants:
        """Add to the bias what rounding the weights takes from the mean of each output channel: (w − stored w) · mean of x."""
        error = mean_error(node, weights.astype(np.float64) - dequantized(constants), self.means[node.inputs[0], summed_axis(self.graph, node)])
        if error is None or not error.any():
            return constants
        whole = error if bias is None else bias.astype(np.float64) + error
        axes = axes_of(node, weights.ndim, per_tensor=self.options.per_tensor)
        return with_bias(constants, weights, whole, source, axes) or quantize_matrix(
            weights, whole, source, axes, rounding=partial(self._rounded, node.inputs[1])
        )

    # ---- other constants

    def _operand(self, node: Node, index: int, name: str) -> str:
        """A constant operand stored as an activation is: on the shared scale where data moves, on its own otherwise."""
        if node.op == "layer_norm" and index:
            return name  # gamma and beta stay float32
        if OPS[node.op].host:
            return name
        data, result = self._data(name), node.outputs[0]
        if self.graph.tensors[name].dtype == "bool":
            return self._store(name, data.astype(np.uint8), BOOLEAN)
        if OPS[node.op].matrix and index == 2:
            return self._product_bias(node, name)
        if index in OPS[node.op].indices:
            return self._store(name, data.astype(np.int32), INDEX)
        given = self.graph.tensors[name].given
        if given and given.quant and given.stored is not None and given.dtype != "s32" and not OPS[node.op].moves_data:
            return self._store(name, given.stored, given.quant)
        values = finite_constant(node, name, data, self._reach(node))
        if node.op == "compare" and np.isinf(data).any() and not self._is_constant(other := node.inputs[1 - index]):
            quant = self.scales.of(self.graph, other)  # where all that is masked has the least integer
        elif OPS[node.op].moves_data:
            quant = self.scales.of(self.graph, result)
        else:
            quant = constant_quant(values, wide=any(self._is_wide(other) for other in (*node.inputs, result)))
        return self._store(name, _integers(values, quant), quant)

    def _reach(self, node: Node) -> float:
        """More than the largest magnitudes of the node's operands and result together."""
        names = [name for name in (*node.inputs, *node.outputs) if name and not self._is_constant(name)]
        ranges = [Range(0.0, 1.0) if self.graph.tensors[name].dtype == "bool" else self.scales.range(name) for name in names]
        return 2 * max(sum(max(-each.low, each.high) for each in ranges), 1.0)

    def _is_wide(self, name: str) -> bool:
        return not self._is_constant(name) and self.scales.of(self.graph, name).dtype in ("s16", "s32")

    def _product_bias(self, node: Node, name: str) -> str:
        """The bias of a product of two activations."""
        left, right = (np.float32(self._operand_scale(operand)) for operand in node.inputs[:2])
        quant = Quant("s32", np.asarray(left * right, np.float32), 0)
        return self._store(name, _integers(self._data(name).astype(np.float64), quant), quant)

    def _operand_scale(self, name: str) -> float:
        quant = constant_quant(self._data(name).astype(np.float64)) if self._is_constant(name) else self.scales.of(self.graph, name)
        return float(quant.scale)


TYPES = {"s8": np.int8, "u8": np.uint8, "s16": np.int16, "s32": np.int32}


def _integers(values: Array, quant: Quant) -> Array:
    """The stored form of real values."""
    return arithmetic.quantize(values.astype(np.float32), quant).astype(TYPES[quant.dtype])


def _refuse_not_finite(node: Node, weights: Array, bias: Array | None) -> None:
    for kind, values in (("weights", weights), ("bias", bias)):
        if values is not None and not np.isfinite(values).all():
            raise QuantizeError(f"the {kind} are not all finite numbers", node=source_of(node), hint="correct the model")


def mean_error(node: Node, error: Array, means: Array) -> Array | None:
    """Per output channel: the weight error times the mean input, summed. None where the operator has no channel-wise bias."""
    if node.op == "conv":
        groups = node.attributes.groups  # type: ignore[attr-defined]
        taps = error.sum(axis=(2, 3)).reshape(groups, -1, error.shape[1])
        return np.asarray(np.matmul(taps, means.reshape(groups, -1, 1)).reshape(-1))
    if node.op == "matmul" and error.ndim == 2:
        return np.asarray(means @ error)
    return None
