"""The stage itself, step by step.

The one big idea: each step returns a value that the next one takes; the integer graph is built once all scales are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from isa.errors import TargetError
from isa.target import Target, load_target
from npucc.errors import QuantizeError
from npucc.graph import Editor, Graph, Quant
from npucc.ops import OPS
from npucc.quantize.build import Solved, build
from npucc.quantize.calibrate import Calibration, calibrate, channel_axes, checked, measured
from npucc.quantize.constants import source_of
from npucc.quantize.correct import bias_samples, correct_biases
from npucc.quantize.digits import in_digits
from npucc.quantize.equalize import SAMPLES as EQUALIZE_SAMPLES
from npucc.quantize.equalize import ScaledChannels, equalize
from npucc.quantize.given import narrowed, not_kept, spread
from npucc.quantize.made_up import leave_room, made_up
from npucc.quantize.mixed import Mixed, byte_groups, candidates, choose
from npucc.quantize.options import MEASURED, OWN, QuantizeOptions
from npucc.quantize.precision import Operand, uneven_operands, widen
from npucc.quantize.price import measure_prices, total_cycles
from npucc.quantize.repeats import Repeats, repeated
from npucc.quantize.rounding import Evidence, collect
from npucc.quantize.scales import EACH_DEFAULT, Scales, alternatives, choose_scales, is_index, known_beforehand, observed_ranges
from npucc.quantize.sensitivity import SAMPLES, measure
from npucc.quantize.share import Groups, share_scales

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TensorRange:
    """One activation: what was seen, what is covered, how it is stored."""

    name: str
    seen: tuple[float, float]
    covered: tuple[float, float]
    dtype: str
    scale: float
    zero: int
    remedy: str = ""  # what was done for it beyond the default, and who decided

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seen": list(self.seen), "covered": list(self.covered)}


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """`rescaled`: tensors that a Concat reads on another scale than the rest of the graph does;
    `mixed`: which got 16 bits by measurement, and what for; `quantized_anew`: integers of an already quantized model that could not be kept;
    `equalized`: tensors that are scaled by channel, and back in the weights that read them."""

    samples: int
    method: str
    tensors: tuple[TensorRange, ...]
    rescaled: tuple[str, ...]
    mixed: Mixed = field(default_factory=Mixed)
    quantized_anew: tuple[str, ...] = ()
    equalized: tuple[ScaledChannels, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        tensors = [each.as_dict() for each in self.tensors]
        return {
            "samples": self.samples, "method": self.method, "rescaled": list(self.rescaled), "mixed": self.mixed.as_dict(), "tensors": tensors,
            "quantized_anew": list(self.quantized_anew), "equalized": [each.as_dict() for each in self.equalized],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantized:
    """The integer graph. `synthetic`: it was calibrated with made-up inputs."""

    graph: Graph
    report: QuantizeReport
    synthetic: bool


def quantize(
    graph: Graph,
    feeds: Iterable[Mapping[str, Any]] | None,
    *,
    options: QuantizeOptions | None = None,
    target: Target | None = None,
    imported: Graph | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """The integer form of a float graph, calibrated with `feeds` ({input: array}), or with made-up inputs if that is None.

    `imported`: the graph before normalizations were folded; made-up inputs are chosen by their statistics.
    Scales and integers that the model brings along are kept; where it brings all, nothing is calibrated.

    `target`: whose cycles 16-bit tensors are priced in if the options say `priced_on=own`.

    Deterministic. Raises QuantizeError for feeds that do not fit, for NaN, and for what has no 8-bit form.
    """
    options = options or QuantizeOptions()
    _refuse_unsupported(graph)
    spread_out = spread(_in_operand_order(graph))
    ordered = in_digits(spread_out)
    needs_samples = bool(_unknown(ordered)) or (feeds is not None and bool(channel_axes(ordered)))
    calibration = Calibration({}, {}, 0)
    repeats: Repeats = {}
    equalized: tuple[ScaledChannels, ...] = ()
    if needs_samples:
        samples = made_up(imported or graph) if feeds is None else feeds
        if options.equalize and not options.per_tensor and feeds is not None:
            ordered, equalized, samples = _equalized(ordered, feeds, options, progress)
        repeats = repeated(ordered)
        keep = max(options.bias_samples, options.round_samples, SAMPLES)
        calibration = calibrate(ordered, samples, limit=options.samples, keep=keep, repeats=repeats, progress=progress)
        if feeds is None:
            leave_room(calibration, ordered)
            options = replace(options, method="minmax") if options.method == MEASURED else options
    shared, groups, rescaled = share_scales(ordered, observed_ranges(ordered, calibration), repeats)
    network = _Network(shared, groups, calibration, options)
    mixed, learned = Mixed(), feeds is not None and needs_samples
    if options.scheme == "auto" and learned:
        rounded, mixed = _measured(network, _priced_on(options, target), progress)
    else:
        direct = frozenset(uneven_operands(shared, groups, calibration))
        rounded = network.rounded(direct=direct)
        if options.scheme == "int16":
            rounded = network.rounded(direct=direct, more=frozenset(candidates(rounded.graph, rounded.integer, rounded.scales)))
        rounded = network.second_order(rounded, progress) if learned else rounded
    integer = rounded.integer
    if options.bias_samples:
        few = calibration.first[: bias_samples(rounded.graph, options.bias_samples)]
        integer = correct_biases(rounded.graph, integer, few, repeats=repeats, progress=progress)
    activations = (name for name, tensor in rounded.graph.tensors.items() if not tensor.is_constant)
    anew = (*not_kept(rounded.graph, {name: rounded.scales.of(rounded.graph, name) for name in activations}), *narrowed(spread_out))
    rows = tuple(_rows(rounded, options, mixed))
    report = QuantizeReport(calibration.samples, options.method, rows, rescaled, mixed, anew, equalized)
    return Quantized(integer, report, feeds is None and needs_samples)


def _unknown(graph: Graph) -> list[str]:
    """The tensors that only samples tell the range of."""
    return [name for name in measured(graph) if not known_beforehand(graph, (name,)) and not is_index(graph, name)]


def _equalized(
    graph: Graph, feeds: Iterable[Mapping[str, Any]], options: QuantizeOptions, progress: Progress | None
) -> tuple[Graph, tuple[ScaledChannels, ...], Iterable[Mapping[str, Any]]]:
    """The equalized graph, what was scaled in it, and the feeds, still whole."""
    rest = iter(feeds)
    first = list(islice(rest, min(EQUALIZE_SAMPLES, options.samples)))
    return *equalize(graph, list(checked(graph, first)), progress=progress), feeds if rest is not feeds else chain(first, rest)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """One way to store the network: the float graph with its copies, and the same graph in integers."""

    graph: Graph
    calibration: Calibration
    scales: Scales
    integer: Graph
    copies: Mapping[str, str]
    methods: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Network:
    """What all ways to store a network have in common. `evidence`: what layers read; `solved`: weights rounded by it."""

    graph: Graph
    groups: Groups
    calibration: Calibration
    options: QuantizeOptions
    evidence: dict[str, Evidence] = field(default_factory=dict)
    solved: Solved = field(default_factory=dict)

    def rounded(
        self, *, direct: Set[Operand] = frozenset(), more: Set[str] = frozenset(), methods: Mapping[str, str] = EACH_DEFAULT
    ) -> _Rounded:
        """With 16 bits where the rules say, where matrix operators read them (`direct`), and in the groups with the roots `more`.

        `methods`: of the groups that have a range method of their own, by root.
        """
        widened = widen(self.graph, self.groups, self.calibration, direct=direct)
        graph, calibration, wide = widened.graph, widened.calibration, widened.wide | more
        scales = choose_scales(graph, self.groups, calibration, self.options, wide=wide, long=widened.long, methods=methods)
        integer = build(graph, scales, calibration.means, self.options, evidence=self.evidence, solved=self.solved)
        return _Rounded(graph, calibration, scales, integer, widened.copies, methods)

    def second_order(self, rounded: _Rounded, progress: Progress | None) -> _Rounded:
        """The same with weights rounded on what its layers read, if the options say so. What is stored in other ways later has those weights too."""
        if self.options.rounding != "second_order":
            return rounded
        self.evidence.update(collect(rounded.graph, rounded.scales, self.calibration.first[: self.options.round_samples], progress=progress))
        integer = build(rounded.graph, rounded.scales, rounded.calibration.means, self.options, evidence=self.evidence, solved=self.solved)
        return replace(rounded, integer=integer)


def _priced_on(options: QuantizeOptions, target: Target | None) -> Target:
    if options.priced_on == OWN:
        if target is None:
            raise QuantizeError("priced_on=own needs a target", hint="give one, or name the target in priced_on")
        return target
    try:
        return load_target(options.priced_on)
    except TargetError as error:
        raise QuantizeError(f"priced_on is {options.priced_on!r}: {error}", hint="expected a target's name or file, or own") from None


def _measured(network: _Network, target: Target, progress: Progress | None) -> tuple[_Rounded, Mixed]:
    """16 bits where measured error is worth measured cycles."""
    plain, options = network.second_order(network.rounded(), progress), network.options
    if not candidates(plain.graph, plain.integer, plain.scales):
        return plain, Mixed()
    all_groups = byte_groups(plain.graph, plain.scales)

    def others(root: str) -> Mapping[str, Quant]:
        if options.method != MEASURED:
            return {}
        return alternatives(plain.graph, all_groups[root], plain.calibration, options, used=plain.scales.quants[root])

    feeds = network.calibration.first
    found = measure(plain.graph, plain.integer, plain.scales, feeds, all_groups, alternatives=others, progress=progress)
    important = set(found.important())
    groups = {root: names for root, names in candidates(plain.graph, plain.integer, plain.scales).items() if root in important}
    prices = measure_prices(plain.integer, groups, target)
    percent = {root: prices.percent(root) for root in groups}
    drop = options.drop if options.drop >= 0 else None
    allowed = options.budget if drop is None else math.inf

    def attempt(most: int) -> tuple[tuple[str, ...], Mixed]:
        roots, mixed = choose(found, groups, percent, budget=allowed, drop=drop, most=most)
        cycles = total_cycles(plain.integer, (name for root in roots for name in groups[root]), target) if roots else prices.cycles
        return roots, replace(mixed, price=100 * (cycles / max(prices.cycles, 1) - 1))

    roots, mixed = dearest_within(attempt, allowed, len(groups))
    copied = {plain.copies[name] for root in roots for name in groups[root] if name in plain.copies}
    direct = {(node.name, name) for node in network.graph if OPS[node.op].matrix for name in node.inputs if name in copied}
    return network.rounded(direct=direct, more=set(roots) - set(plain.copies), methods=found.methods), mixed


def dearest_within(attempt: Callable[[int], tuple[tuple[str, ...], Mixed]], allowed: float, most: int) -> tuple[tuple[str, ...], Mixed]:
    """The attempt with the most groups whose price, measured together, is allowed: groups may cost more together than each alone."""
    best = attempt(most)
    if best[1].price <= allowed and best[1].price < math.inf:
        return best
    enough, too_many, best = 0, len(best[0]), attempt(0)
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        found = attempt(middle)
        if found[1].price <= allowed and found[1].price < math.inf:
            enough, best = middle, found
        else:
            too_many = middle
    return best


def _refuse_unsupported(graph: Graph) -> None:
    for tensor in graph.tensors.values():
        if tensor.quant is not None:
            raise QuantizeError(f"tensor {tensor.name!r} is quantized already", hint="give the float model")
    for node in graph:
        if not OPS[node.op].matrix:
            continue
        if node.op != "matmul" and not graph.tensors[node.inputs[1]].is_constant:
            raise QuantizeError("the weights are computed by the model", node=source_of(node), hint="8-bit weights must be constants")
        if len(node.inputs) > 2 and node.inputs[2] and not graph.tensors[node.inputs[2]].is_constant:
            raise QuantizeError("the bias is computed by the model", node=source_of(node), hint="a bias must be constant; add it with Add")


def _in_operand_order(graph: Graph) -> Graph:
    """add: the operand that is broadcast comes second, the order in which onnxruntime's kernel sums them."""
    editor = Editor(graph)
    for node in graph:
        if node.op == "add":
            first, second, result = (graph.tensors[name].shape for name in (*node.inputs, *node.outputs))
            if first != result and second == result:
                editor.add_node(replace(node, inputs=node.inputs[::-1]))
    return editor.freeze()


def _rows(rounded: _Rounded, options: QuantizeOptions, mixed: Mixed) -> Iterator[TensorRange]:
    graph, calibration, scales = rounded.graph, rounded.calibration, rounded.scales
    bought = {name: each for each in mixed.chosen for name in each.tensors}
    for name in measured(graph):
        quant, covered = scales.of(graph, name), scales.range(name)
        histogram = calibration.histograms.get(name)
        seen = histogram.observed if histogram else covered
        remedy = ""
        if name in bought:
            remedy = f"16 bits by measurement: {bought[name].gain:+.2f} dB for {bought[name].price:+.2f}% cycles"
        elif quant.dtype in ("s16", "s32"):
            remedy = f"{quant.dtype[1:]} bits by rule" if options.scheme != "int16" else "16 bits by the scheme"
        elif (root := scales.groups.root(name)) in rounded.methods:
            remedy = f"range by {rounded.methods[root]}"
        yield TensorRange(name, (seen.low, seen.high), (covered.low, covered.high), quant.dtype, float(quant.scale), quant.zero, remedy)
