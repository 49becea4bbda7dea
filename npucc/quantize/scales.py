"""From what was seen to one scale per group of tensors.

The one big idea: a group's range is chosen from the histogram of all its values together; some tensors take theirs whole (inputs, masked
scores, integers), and some scales must have a certain form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from npucc.arithmetic import RANGES
from npucc.errors import QuantizeError
from npucc.graph import Graph, Node, Quant
from npucc.ops import OPS, Table
from npucc.quantize.bounds import known_ranges
from npucc.quantize.calibrate import Calibration, softmax_axis
from npucc.quantize.masks import Masks
from npucc.quantize.options import QuantizeOptions
from npucc.quantize.precision import group_histogram
from npucc.quantize.ranges import LARGEST, METHODS, SMALLEST, Fit, Histogram, Range, activation_quant, choose_range, merged
from npucc.quantize.share import Groups, group_range, moved_inputs
from npucc.scalar import Expression
from npucc.segments import raw_quant, untouched

INDEX = Quant("s32", np.asarray(1.0, np.float32), 0)
BOOLEAN = Quant("u8", np.asarray(1.0, np.float32), 0)
WHOLE = 2**15 - 1  # integers up to here are exact in 16 bits
EACH_DEFAULT: Mapping[str, str] = MappingProxyType({})
FAITHFUL = 1.5  # times the least squared error of the values is allowed to a range that errs less at the outputs
ROOM = {"s16": 1.1, "s32": 2.0}  # times the range seen: other samples need not be clipped, and steps are plenty
CLIPPING_MUST_PAY = 0.5  # a graph input is clipped only if that at least halves its squared error


@dataclass(frozen=True, slots=True)
class Scales:
    """How every activation is stored: per root of a group its range and quantization."""

    groups: Groups
    covered: Mapping[str, Range]
    quants: Mapping[str, Quant]
    raw: Mapping[str, Quant] = field(default_factory=dict)  # what only the host touches

    def of(self, graph: Graph, tensor: str) -> Quant:
        """The quantization of an activation of the graph."""
        if graph.tensors[tensor].dtype == "bool":
            return BOOLEAN
        return self.raw[tensor] if tensor in self.raw else self.quants[self.groups.root(tensor)]

    def range(self, tensor: str) -> Range:
        """The range that the tensor's group covers."""
        return self.covered.get(self.groups.root(tensor), Range())


def observed_ranges(graph: Graph, calibration: Calibration) -> dict[str, Range]:
    """Per tensor the range of the values seen, of constants that are moved, and of what padding adds."""
    observed = {name: histogram.observed for name, histogram in calibration.histograms.items()}
    for node in graph:
        if OPS[node.op].moves_data:
            observed |= _moved_constants(graph, node)
    return observed


def _moved_constants(graph: Graph, node: Node) -> dict[str, Range]:
    """Ranges that a moving node adds: its constant inputs, and the value it pads with."""
    added = {}
    for name in moved_inputs(node):
        tensor = graph.tensors[name]
        if tensor.data is not None and tensor.dtype != "bool":
            values = tensor.data[np.isfinite(tensor.data)]
            added[name] = Range(min(0.0, float(values.min(initial=0.0))), max(0.0, float(values.max(initial=0.0))))
    padding = getattr(node.attributes, "value", 0.0)
    if padding and np.isfinite(padding):
        added[node.outputs[0]] = Range(min(0.0, padding), max(0.0, padding))
    return added


def choose_scales(
    graph: Graph, groups: Groups, calibration: Calibration, options: QuantizeOptions, *,
    wide: frozenset[str] = frozenset(), long: frozenset[str] = frozenset(), methods: Mapping[str, str] = EACH_DEFAULT,
) -> Scales:  # fmt: skip
    """A range and a quantization for each group; roots in `wide` get s16, those in `long` s32. Raises QuantizeError for integers that do not fit.

    `methods`: by root, the range method that was measured to be better than the default.
    """
    moved = observed_ranges(graph, calibration)
    implied = known_ranges(graph, moved)
    covered: dict[str, Range] = {}
    quants: dict[str, Quant] = {}
    limits = Masks.find(graph, lambda name: group_histogram(calibration, groups, name))
    raw = {name: quant for name in untouched(graph) if (quant := raw_quant(graph.tensors[name].dtype)) is not None}
    for root, names in _members(graph, groups).items():
        if all(name in raw for name in names):
            continue
        given = next((given.quant for name in names if (given := graph.tensors[name].given) and not graph.tensors[name].is_constant), None)
        if given is not None:
            quants[root], covered[root] = given, _range_of(given)
            continue
        method = "minmax" if root in wide | long else methods.get(root, options.default_method)
        covered[root] = _covered(graph, names, calibration, moved, options, method)
        for name in names:
            covered[root] = covered[root].joined(implied.get(name, Range()))
        histogram, stored = group_histogram(calibration, groups, root), group_range(groups, moved, root)
        covered[root] = limits.of(names, covered[root], histogram.observed.joined(stored), infinite=bool(histogram.infinite))
        dtype = "s32" if root in long else "s16" if root in wide else ""
        quants[root] = _wide_quant(graph, names, covered[root], dtype) if dtype else _quant(graph, names, covered[root])
    return Scales(groups, covered, quants, raw)


def alternatives(graph: Graph, names: Sequence[str], calibration: Calibration, options: QuantizeOptions, *, used: Quant) -> dict[str, Quant]:
    """The quantization of a group's tensors by every range method that clips no more than the default one, or serves all values seen nearly as well:
    the few samples that outputs are measured with may lack what a range cuts off. None where more than values decide the one in use (a mask, say)."""
    moved = observed_ranges(graph, calibration)
    covered = {record.name: _covered(graph, names, calibration, moved, options, record.name) for record in METHODS}
    default = covered[options.default_method]
    if _quant(graph, names, default).key != used.key:
        return {}
    fit = Fit.of(_histogram(graph, names, calibration), _next_function(graph, names))
    most = FAITHFUL * fit.error(default)
    kept = {method: each for method, each in covered.items() if default.within(each.low, each.high) == default or fit.error(each) <= most}
    return {method: _quant(graph, names, each) for method, each in kept.items()}


def _range_of(quant: Quant) -> Range:
    """What a quantization covers."""
    low, high = ((limit - quant.zero) * float(quant.scale) for limit in RANGES[quant.dtype])
    return Range(min(low, 0.0), max(high, 0.0))


def _wide_quant(graph: Graph, names: Collection[str], covered: Range, dtype: str) -> Quant:
    """s16 around zero where a product reads it, which keeps its sums small, else over its range; s32 around zero."""
    covered = Range(covered.low * ROOM[dtype], covered.high * ROOM[dtype]).within(-LARGEST, LARGEST)
    if dtype == "s16" and not any(OPS[node.op].matrix for name in names for node in graph.users(name)):
        return activation_quant(covered, dtype)
    scale = max(-covered.low, covered.high, SMALLEST) / RANGES[dtype][1]
    return Quant(dtype, np.asarray(scale, np.float32), 0)


def _members(graph: Graph, groups: Groups) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for name, tensor in graph.tensors.items():
        if tensor.dtype != "bool":
            members.setdefault(groups.root(name), []).append(name)
    return members


def _covered(
    graph: Graph, names: Sequence[str], calibration: Calibration, moved: Mapping[str, Range], options: QuantizeOptions, method: str
) -> Range:
    histogram, extra = _histogram(graph, names, calibration), Range()
    for name in names:
        if name in moved and _source(graph, name, calibration) is None:
            extra = extra.joined(moved[name])
    if not calibration.samples:
        return next(iter(known_beforehand(graph, names)), Range()).joined(extra)
    if any(_is_taken_whole(graph, name) for name in names):
        return histogram.observed.joined(extra)
    chosen = choose_range(histogram, method, percentile=options.percentile, function=_next_function(graph, names))
    if any(name in graph.inputs for name in names) and not _clipping_pays(histogram, chosen):
        chosen = histogram.observed
    return chosen.joined(extra)


def _histogram(graph: Graph, names: Sequence[str], calibration: Calibration) -> Histogram:
    """Of all values of a group's tensors."""
    return merged(calibration.histograms[source] for source in filter(None, (_source(graph, name, calibration) for name in names)))


def _source(graph: Graph, name: str, calibration: Calibration) -> str | None:
    """Whose values were counted. A rescaled copy was not there then; it has those of its original."""
    node = graph.producer(name)
    original = node.inputs[0] if node and node.attributes == Table("x") else name
    return next((each for each in (name, original) if each in calibration.histograms), None)


def known_beforehand(graph: Graph, names: Sequence[str]) -> list[Range]:
    """Ranges of tensors that an operator has whatever the data."""
    fixed = [OPS[node.op].fixed_range for node in map(graph.producer, names) if node]
    return [Range(*each) for each in fixed if each is not None]


def is_index(graph: Graph, name: str) -> bool:
    """Whether a look-up takes its positions from the tensor."""
    return any(name == node.inputs[index] for node in graph.users(name) for index in OPS[node.op].indices)


def _gives_index(graph: Graph, names: Sequence[str]) -> bool:
    """Whether an input of real numbers, moved or not, has its fractions dropped for a look-up: token numbers written as floats."""
    cut = (node.outputs[0] for name in names for node in graph.users(name) if node.attributes == Table(("trunc", "x")))
    return any(name in graph.inputs for name in names) and any(_becomes_index(graph, name) for name in cut)


def _becomes_index(graph: Graph, name: str) -> bool:
    """Whether a look-up takes its positions from the tensor, moved or not."""
    return is_index(graph, name) or any(OPS[user.op].moves_data and _becomes_index(graph, user.outputs[0]) for user in graph.users(name))


def _is_taken_whole(graph: Graph, name: str) -> bool:
    return _is_whole_number(graph, name) or softmax_axis(graph, name) is not None


def _is_whole_number(graph: Graph, name: str) -> bool:
    return np.dtype(graph.tensors[name].dtype).kind in "iu"


def _next_function(graph: Graph, names: Sequence[str]) -> Expression:
    """The table that all readers of a group's tensors compute, or "x"."""
    expressions = {node.attributes.expression if isinstance(node.attributes, Table) else "x" for name in names for node in graph.users(name)}
    alone = len(expressions) == 1 and not any(name in graph.outputs for name in names)
    return expressions.pop() if alone else "x"


def _clipping_pays(histogram: Histogram, chosen: Range) -> bool:
    fit = Fit.of(histogram)
    return fit.error(chosen) < CLIPPING_MUST_PAY * fit.error(histogram.observed)


def _quant(graph: Graph, names: Sequence[str], covered: Range) -> Quant:
    """In steps of one for integers; 1/n for a softmax, as onnxruntime's kernel assumes; else what covers the range."""
    if any(is_index(graph, name) for name in names):
        return INDEX
    if _gives_index(graph, names):
        return whole_steps(names[0], covered.joined(Range(-WHOLE, WHOLE)))  # all that fit: other samples have other tokens
    if any(_is_whole_number(graph, name) for name in names):
        fixed = any(name in graph.inputs or name in graph.outputs for name in names)
        return whole_steps(names[0], covered) if fixed or -covered.low <= WHOLE >= covered.high else activation_quant(covered, "s16")
    quant = activation_quant(covered)
    if not any(node.op == "softmax" for node in map(graph.producer, names) if node):
        return quant
    steps = max(int(1 / float(quant.scale)), 1)
    while int(np.float32(1) / np.float32(1 / steps)) != steps:
        steps -= 1
    return Quant(quant.dtype, np.asarray(1 / steps, np.float32), quant.zero)


def whole_steps(name: str, covered: Range) -> Quant:
    """Scale 1: in 8 bits if they hold the range, else in 16. Raises QuantizeError."""
    if covered.width <= RANGES["s8"][1] - RANGES["s8"][0]:
        return Quant("s8", np.asarray(1.0, np.float32), int(np.clip(-128 - covered.low, -128, 127)))
    low, high = RANGES["s16"]
    if covered.low < low or covered.high > high:
        raise QuantizeError(
            f"the integer tensor {name!r} takes values from {covered.low:.0f} to {covered.high:.0f}, expected {low} to {high}",
            hint="compute on it outside the model, or convert it to float and scale it first",
        )
    return Quant("s16", np.asarray(1.0, np.float32), 0)
