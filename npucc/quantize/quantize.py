"""The stage itself, step by step.

The one big idea: each step returns a value that the next one takes; the integer graph is built once all scales are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from isa.errors import TargetError
from isa.target import Target, load_target
from npucc.errors import QuantizeError
from npucc.graph import Editor, Graph
from npucc.ops import OPS
from npucc.quantize.calibrate import Calibration, calibrate, channel_axes, checked, measured
from npucc.quantize.candidates import candidates
from npucc.quantize.constants import source_of
from npucc.quantize.digits import in_digits
from npucc.quantize.equalize import SAMPLES as EQUALIZE_SAMPLES
from npucc.quantize.equalize import ScaledChannels, equalize
from npucc.quantize.given import narrowed, not_kept, spread
from npucc.quantize.judge import SAMPLES, Attempt, Judge, Verdict
from npucc.quantize.made_up import leave_room, made_up
from npucc.quantize.mixed import PERCENT, Mixed, Wide, mixed_precision
from npucc.quantize.network import Network, Rounded
from npucc.quantize.options import MEASURED, OWN, QuantizeOptions
from npucc.quantize.precision import uneven_operands
from npucc.quantize.repeats import Repeats, repeated
from npucc.quantize.scales import is_index, known_beforehand, observed_ranges
from npucc.quantize.share import share_scales
from npucc.quantize.taps import with_taps, without_idle

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
    dense: Graph | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """The integer form of a float graph, calibrated with `feeds` ({input: array}), or with made-up inputs if that is None.

    `imported`: the graph before normalizations were folded; made-up inputs are chosen by their statistics.
    Scales and integers that the model brings along are kept; where it brings all, nothing is calibrated.

    `dense`: the float graph before it was pruned, whose outputs count: 16 bits that only bring the pruned ones nearer are worth no cycles.
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
        keep = max(options.bias_samples, options.round_samples) + SAMPLES
        calibration = calibrate(ordered, samples, limit=options.samples, keep=keep, repeats=repeats, progress=progress)
        if feeds is None:
            leave_room(calibration, ordered)
            options = replace(options, method="minmax") if options.method == MEASURED else options
    shared, groups, rescaled = share_scales(ordered, observed_ranges(ordered, calibration), repeats)
    network = Network(shared, groups, calibration, options, feeds is not None and needs_samples, dense, progress)
    rounded, mixed = _stored(network, target)
    activations = (name for name, tensor in rounded.graph.tensors.items() if not tensor.is_constant)
    anew = (*not_kept(rounded.graph, {name: rounded.scales.of(rounded.graph, name) for name in activations}), *narrowed(spread_out))
    rows = tuple(_rows(rounded, options, mixed))
    report = QuantizeReport(calibration.samples, options.method, rows, rescaled, mixed, anew, equalized)
    return Quantized(rounded.integer, report, feeds is None and needs_samples)


def _stored(network: Network, target: Target | None) -> tuple[Rounded, Mixed]:
    """The way to store the network that the options ask for, and the account of 16 bits."""
    options, mixed = network.options, Mixed()
    measures = options.scheme == "auto" and network.learns
    direct = frozenset() if measures else frozenset(uneven_operands(network.graph, network.groups, network.calibration))
    rounded = network.rounded(direct=direct)
    if options.scheme == "int16":
        more = frozenset(candidates(rounded.graph, rounded.integer, rounded.scales))
        rounded = network.rounded(direct=direct, more=more)
    if not network.learns:
        rounded = network.with_corrected_biases(rounded)
        return rounded, mixed
    fitted = max(options.bias_samples, options.round_samples)
    judge = Judge.of(rounded.graph, rounded.integer, network.calibration.first, fitted=fitted, dense=network.dense)
    plain = network.with_corrected_biases(rounded)
    best = _Judged.of(judge, plain)
    ways = [network.without_corrections(plain)] * bool(network.corrections)
    if measures:
        wide, mixed = mixed_precision(network, plain, judge, _priced_on(options, target))
        mixed = replace(mixed, before=best.verdict.decibels)
        dear = _dearer(network, wide, mixed, judge) if wide is not plain else best
        if options.limits_drop or judge.surely_gains(dear.attempt, best.attempt, PERCENT * mixed.price):
            best, ways = dear, []
        else:
            mixed = mixed.in_vain
    best = max([best, *(_Judged.of(judge, each) for each in ways)], key=lambda each: each.verdict.worth)
    return best.way, replace(mixed, after=best.verdict.decibels, loss=best.verdict.loss, judged=judge.held)


@dataclass(frozen=True, slots=True)
class _Judged:
    """A way to store the network with what was measured about it."""

    way: Rounded
    attempt: Attempt
    verdict: Verdict

    @classmethod
    def of(cls, judge: Judge, way: Rounded) -> _Judged:
        attempt = judge.attempt(way.integer)
        return cls(way, attempt, judge.verdict(attempt))


def _dearer(network: Network, wide: Rounded, mixed: Mixed, judge: Judge) -> _Judged:
    """The best of these, with 16 bits or other ranges: biases corrected in 8 bits, anew, or not."""
    several = [wide, *[network.without_corrections(wide)] * bool(network.corrections)]
    if mixed.chosen:
        several.insert(0, network.with_corrected_biases(wide))
    return max((_Judged.of(judge, each) for each in several), key=lambda each: each.verdict.worth)


def _unknown(graph: Graph) -> list[str]:
    """The tensors that only samples tell the range of."""
    return [name for name in measured(graph) if not known_beforehand(graph, (name,)) and not is_index(graph, name)]


def _equalized(
    graph: Graph, feeds: Iterable[Mapping[str, Any]], options: QuantizeOptions, progress: Progress | None
) -> tuple[Graph, tuple[ScaledChannels, ...], Iterable[Mapping[str, Any]]]:
    """The equalized graph, what was scaled in it, and the feeds, still whole."""
    rest = iter(feeds)
    first = list(islice(rest, min(EQUALIZE_SAMPLES, options.samples)))
    tapped, taps = with_taps(graph)
    scaled, found = equalize(tapped, list(checked(graph, first)), progress=progress)
    return without_idle(scaled, taps), found, feeds if rest is not feeds else chain(first, rest)


def _priced_on(options: QuantizeOptions, target: Target | None) -> Target:
    if options.priced_on == OWN:
        if target is None:
            raise QuantizeError("priced_on=own needs a target", hint="give one, or name the target in priced_on")
        return target
    try:
        return load_target(options.priced_on)
    except TargetError as error:
        raise QuantizeError(f"priced_on is {options.priced_on!r}: {error}", hint="expected a target's name or file, or own") from None


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


def _rows(rounded: Rounded, options: QuantizeOptions, mixed: Mixed) -> Iterator[TensorRange]:
    graph, calibration, scales = rounded.graph, rounded.calibration, rounded.scales
    bought, tried = ({name: each for each in several for name in each.tensors} for several in (mixed.chosen, mixed.taken_back))
    for name in measured(graph):
        quant, covered = scales.of(graph, name), scales.range(name)
        histogram = calibration.histograms.get(name)
        seen = histogram.observed if histogram else covered
        remedy = ""
        if name in bought:
            remedy = f"16 bits by measurement: {_estimate(bought[name])}"
        elif quant.dtype in ("s16", "s32"):
            remedy = f"{quant.dtype[1:]} bits by rule" if options.scheme != "int16" else "16 bits by the scheme"
        elif (root := scales.groups.root(name)) in rounded.methods:
            remedy = f"range by {rounded.methods[root]}"
        if name in tried:
            remedy += "; " * bool(remedy) + f"16 bits taken back: {_estimate(tried[name])}"
        yield TensorRange(name, (seen.low, seen.high), (covered.low, covered.high), quant.dtype, float(quant.scale), quant.zero, remedy)


def _estimate(wide: Wide) -> str:
    return f"{wide.gain:+.2f} dB for {wide.price:+.2f}% cycles"
