"""Ways to store one network: which activations get 16 bits, and by which method each range is chosen.

The one big idea: what all ways have in common (groups, calibration, the weights rounded by second order) is kept, so that another way costs
little more than its scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS
from npucc.quantize.build import Solved, build
from npucc.quantize.calibrate import Calibration, Progress
from npucc.quantize.constants import LARGEST_SUM
from npucc.quantize.correct import bias_samples, correct_biases
from npucc.quantize.options import QuantizeOptions
from npucc.quantize.precision import Operand, widen
from npucc.quantize.rounding import Evidence, collect
from npucc.quantize.scales import EACH_DEFAULT, Scales, choose_scales
from npucc.quantize.share import Groups

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Rounded:
    """One way to store the network: the float graph with its copies, and the same graph in integers.

    `copies`: of each 8-bit copy the tensor that it is one of; `methods`: of groups that have a range method of their own, by root.
    """

    graph: Graph
    calibration: Calibration
    scales: Scales
    integer: Graph
    copies: Mapping[str, str]
    methods: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Network:
    """`learns`: weights are rounded on what their layers read in the samples, which the first way decides (`evidence`); `solved`: those weights;
    `dense`: whose outputs count, if not the graph's own;
    `corrections`: per matrix operator what is added to its bias; `float_means`: see `correct_biases`."""

    graph: Graph
    groups: Groups
    calibration: Calibration
    options: QuantizeOptions
    learns: bool
    dense: Graph | None = None
    progress: Progress | None = None
    evidence: dict[str, Evidence] = field(default_factory=dict)
    solved: Solved = field(default_factory=Solved)
    corrections: dict[str, Array] = field(default_factory=dict)
    float_means: dict[str, list[Array]] = field(default_factory=dict)

    def rounded(
        self, *, direct: Set[Operand] = frozenset(), more: Set[str] = frozenset(), methods: Mapping[str, str] = EACH_DEFAULT
    ) -> Rounded:
        """With 16 bits where the rules say, where matrix operators read them (`direct`), and in the groups with the roots `more`."""
        widened = widen(self.graph, self.groups, self.calibration, direct=direct)
        graph, calibration, wide = widened.graph, widened.calibration, widened.wide | more
        scales = choose_scales(graph, self.groups, calibration, self.options, wide=wide, long=widened.long, methods=methods)
        if self.learns and not self.evidence and self.options.rounding == "second_order":
            self.evidence.update(collect(graph, scales, calibration.first[: self.options.round_samples], progress=self.progress))
        integer = build(graph, scales, calibration.means, self.options, evidence=self.evidence, solved=self.solved)
        return Rounded(graph, calibration, scales, with_bias_shifts(integer, self.corrections), widened.copies, methods)

    def with_corrected_biases(self, rounded: Rounded) -> Rounded:
        """The same with biases corrected on the first samples, if the options say so; ways that are made later have the same corrections."""
        if not self.options.bias_samples:
            return rounded
        few = self.calibration.first[: bias_samples(self.graph, self.options.bias_samples)]
        integer = correct_biases(
            rounded.graph, rounded.integer, few, repeats=self.groups.repeats, means=self.float_means, progress=self.progress
        )
        self.corrections.update(bias_shifts(rounded.integer, integer))
        return replace(rounded, integer=integer)

    def without_corrections(self, rounded: Rounded) -> Rounded:
        """The same without what the samples added to its biases."""
        return replace(rounded, integer=with_bias_shifts(rounded.integer, {name: -shift for name, shift in self.corrections.items()}))

    def widened(self, plain: Rounded, roots: Set[str], methods: Mapping[str, str]) -> Rounded:
        """As `plain`, but with 16 bits in these of its groups; where one is an 8-bit copy, the matrix operators read the original."""
        copied = {plain.copies[name] for root in roots for name in self.groups.members(root) if name in plain.copies}
        direct = {(node.name, name) for node in self.graph if OPS[node.op].matrix for name in node.inputs if name in copied}
        return self.rounded(direct=direct, more=frozenset(roots - set(plain.copies)), methods=methods)


def bias_shifts(before: Graph, after: Graph) -> dict[str, Array]:
    """Per matrix operator what was added to its bias, in real numbers."""
    biased = [node for node in after if OPS[node.op].matrix and len(node.inputs) > 2 and after.tensors[node.inputs[2]].is_constant]
    shifts = {node.name: (_bias(after, node) - _bias(before, before.nodes[node.name])) * _accumulator(after, node) for node in biased}
    return {name: shift for name, shift in shifts.items() if shift.any()}


def with_bias_shifts(integer: Graph, shifts: Mapping[str, Array]) -> Graph:
    """The integer graph with this added to the biases."""
    editor = Editor(integer)
    for name, shift in shifts.items():
        node, scale = integer.nodes[name], _accumulator(integer, integer.nodes[name])
        bias = np.clip(np.rint(_bias(integer, node) + shift / scale), -LARGEST_SUM, LARGEST_SUM).astype(np.int32)
        quant = Quant("s32", np.asarray(scale, np.float32), 0, None if scale.ndim == 0 else 0)
        stored = editor.add_tensor(Tensor(editor.fresh(f"{node.outputs[0]}/bias"), bias.shape, "float32", bias, quant))
        editor.add_node(replace(node, inputs=(*node.inputs[:2], stored)))
    return editor.freeze()


def _bias(integer: Graph, node: Node) -> Array:
    """The stored bias, float64; zero where there is none."""
    data = integer.tensors[node.inputs[2]].data if len(node.inputs) > 2 and node.inputs[2] else None
    return np.zeros(()) if data is None else data.astype(np.float64)


def _accumulator(integer: Graph, node: Node) -> Array:
    """Scale of the sums, per output channel."""
    return np.asarray(np.float32(integer.quant(node.inputs[0]).scale) * integer.quant(node.inputs[1]).scale, np.float64)
