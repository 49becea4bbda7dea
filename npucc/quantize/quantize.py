"""The stage itself, step by step.

The one big idea: each step returns a value that the next one takes; the integer graph is built once all scales are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from isa.target import Target
from npucc.errors import QuantizeError
from npucc.feeds import Port, synthetic_feeds
from npucc.graph import Editor, Graph
from npucc.ops import OPS
from npucc.quantize.build import build
from npucc.quantize.calibrate import Calibration, calibrate, channel_axes, measured
from npucc.quantize.constants import source_of
from npucc.quantize.correct import correct_biases
from npucc.quantize.given import not_kept, spread
from npucc.quantize.mixed import Mixed, candidates, choose, prices
from npucc.quantize.options import QuantizeOptions
from npucc.quantize.precision import widen
from npucc.quantize.rounding import collect
from npucc.quantize.scales import Scales, choose_scales, known_beforehand, observed_ranges
from npucc.quantize.sensitivity import SAMPLES, measure
from npucc.quantize.share import share_scales

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]

SYNTHETIC_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class TensorRange:
    """One activation: what was seen, what is covered, how it is stored."""

    name: str
    seen: tuple[float, float]
    covered: tuple[float, float]
    dtype: str
    scale: float
    zero: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seen": list(self.seen), "covered": list(self.covered)}


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """`rescaled`: tensors that a Concat reads on another scale than the rest of the graph does;
    `mixed`: which got 16 bits by measurement, and what for; `quantized_anew`: integers of an already quantized model that could not be kept."""

    samples: int
    method: str
    tensors: tuple[TensorRange, ...]
    rescaled: tuple[str, ...]
    mixed: Mixed = field(default_factory=Mixed)
    quantized_anew: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        tensors = [each.as_dict() for each in self.tensors]
        return {
            "samples": self.samples, "method": self.method, "rescaled": list(self.rescaled), "mixed": self.mixed.as_dict(), "tensors": tensors,
            "quantized_anew": list(self.quantized_anew),
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
    progress: Progress | None = None,
) -> Quantized:
    """The integer form of a float graph, calibrated with `feeds` ({input: array}), or with made-up inputs if that is None.

    Scales and integers that the model brings along are kept; where it brings all, nothing is calibrated.

    `target`: whose cycles 16-bit tensors are priced in.

    Deterministic. Raises QuantizeError for feeds that do not fit, for NaN, and for what has no 8-bit form.
    """
    options = options or QuantizeOptions()
    _refuse_unsupported(graph)
    ordered = spread(_in_operand_order(graph))
    needs_samples = bool(_unknown(ordered)) or (feeds is not None and bool(channel_axes(ordered)))
    calibration = Calibration({}, {}, 0)
    if needs_samples:
        samples = _made_up(graph) if feeds is None else feeds
        keep = max(options.bias_samples, options.round_samples, SAMPLES)
        calibration = calibrate(ordered, samples, limit=options.samples, keep=keep, progress=progress)
    shared, groups, rescaled = share_scales(ordered, observed_ranges(ordered, calibration), ratio=options.concat_ratio)
    widened = widen(shared, groups, calibration)
    shared, calibration = widened.graph, widened.calibration
    scales = choose_scales(shared, groups, calibration, options, wide=widened.wide, long=widened.long)
    integer = build(shared, scales, calibration.means, options)
    more: set[str] = set()
    mixed = Mixed()
    if options.scheme != "int8" and feeds is not None and needs_samples:
        more, mixed = _more_bits(shared, integer, scales, calibration, options, target, progress)
        scales = choose_scales(shared, groups, calibration, options, wide=widened.wide | more, long=widened.long)
    if options.rounding == "second_order" and feeds is not None and needs_samples:
        evidence = collect(shared, scales, calibration.first[: options.round_samples], progress=progress)
        integer = build(shared, scales, calibration.means, options, evidence=evidence)
    elif more:
        integer = build(shared, scales, calibration.means, options)
    if options.bias_samples:
        integer = correct_biases(shared, integer, calibration.first[: options.bias_samples], progress=progress)
    anew = not_kept(shared, {name: scales.of(shared, name) for name in shared.tensors if not shared.tensors[name].is_constant})
    report = QuantizeReport(calibration.samples, options.method, tuple(_rows(shared, calibration, scales)), rescaled, mixed, anew)
    return Quantized(integer, report, feeds is None and needs_samples)


def _unknown(graph: Graph) -> list[str]:
    """The tensors that only samples tell the range of."""
    return [name for name in measured(graph) if not known_beforehand(graph, (name,))]


def _more_bits(
    graph: Graph,
    integer: Graph,
    scales: Scales,
    calibration: Calibration,
    options: QuantizeOptions,
    target: Target | None,
    progress: Progress | None,
) -> tuple[set[str], Mixed]:
    """The roots of the groups that get 16 bits: all that can, or those that are worth their price."""
    groups = candidates(graph, integer, scales)
    if options.scheme == "int16":
        return set(groups), Mixed()
    found = measure(graph, integer, scales, calibration.first, groups, progress=progress)
    return choose(found, groups, prices(graph, groups, target), budget=options.budget)


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


def _made_up(graph: Graph) -> list[dict[str, Array]]:
    ports = [Port(name, graph.tensors[name].shape, graph.tensors[name].dtype) for name in graph.inputs]
    return list(synthetic_feeds(ports, count=SYNTHETIC_SAMPLES))


def _rows(graph: Graph, calibration: Calibration, scales: Scales) -> Iterator[TensorRange]:
    for name in measured(graph):
        quant, covered = scales.of(graph, name), scales.range(name)
        histogram = calibration.histograms.get(name)
        seen = histogram.observed if histogram else covered
        yield TensorRange(name, (seen.low, seen.high), (covered.low, covered.high), quant.dtype, float(quant.scale), quant.zero)
