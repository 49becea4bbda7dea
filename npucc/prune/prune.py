"""The stage: dense float graph in, smaller float graph out, with a report of every layer.

The one big idea: remove what is zero, decide by the dense network's statistics, cut for real, then mend layer after layer. Each step takes a
graph and returns one; nothing is trained, no label is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from isa.target import Target
from npucc.errors import PruneError
from npucc.graph import Editor, Graph
from npucc.lowering.lower import node_macs
from npucc.ops import OPS
from npucc.prune.channels import Curve, Statistics, choose, cut, draw_curves, find_families
from npucc.prune.measure import OutputMeter
from npucc.prune.moments import input_moments
from npucc.prune.options import PruneOptions
from npucc.prune.price import Price, PriceList
from npucc.prune.repair import Repaired, repair
from npucc.prune.report import FamilyRow, LayerRow, PruneReport
from npucc.prune.slots import find_slots
from npucc.prune.zeros import remove_zero_channels
from npucc.sites import find_sites

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]
Feed = Mapping[str, Any]

METER_SAMPLES = (8, 32)  # for the sensitivity of each family: fewest and most
METER_MACS = 1 << 33  # of all these samples together, between the two
SEARCH_STEPS = 5


@dataclass(frozen=True, slots=True)
class Pruned:
    """The float graph that remains."""

    graph: Graph
    report: PruneReport


@dataclass(frozen=True, slots=True)
class _Job:
    """What every attempt shares: the dense graph, what is known of it, and the samples."""

    dense: Graph
    statistics: Statistics
    curves: tuple[Curve, ...]
    prices: PriceList
    feeds: Sequence[Mapping[str, Array]]
    options: PruneOptions
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class _Result:
    graph: Graph
    removed: Array
    repaired: Mapping[str, Repaired]


def prune(graph: Graph, feeds: Iterable[Feed], *, target: Target, options: PruneOptions, progress: Progress | None = None) -> Pruned:
    """Prune a float graph. Deterministic. `feeds`: calibration samples, of which the first `options.samples` are used. Raises PruneError."""
    samples = list(islice(feeds, options.samples))
    if not samples:
        raise PruneError("there are no calibration samples", hint="give at least one, better some hundreds")
    dense, zero_channels = remove_zero_channels(_with_own_constants(graph))
    job = _prepare(dense, samples, target, options, progress)
    result, stopped, cycles = _search(job, target)
    return Pruned(result.graph, _report(job, result, zero_channels, stopped, cycles))


def _prepare(dense: Graph, samples: Sequence[Mapping[str, Array]], target: Target, options: PruneOptions, progress: Progress | None) -> _Job:
    slots, sites = find_slots(dense), find_sites(dense)
    statistics = Statistics(dense, slots, sites, {})
    curves: tuple[Curve, ...] = ()
    if options.channels is not None or options.cycles is not None:
        families = find_families(dense, slots, options)
        if not families:
            raise PruneError("no channel of this network can be removed", hint="skip fewer layers, or choose N:M")
        # what one half of the samples proposes, the other half judges; what is decided is done with all
        places = -(-options.rows // len(samples))
        halves = [input_moments(dense, sites, samples[start::2] or samples, rows=places) for start in (0, 1)]
        macs = sum(node_macs(dense, node) for node in dense)
        meter = OutputMeter(dense, (samples[1::2] or samples)[: int(np.clip(METER_MACS // max(macs, 1), *METER_SAMPLES))])
        curves = draw_curves(replace(statistics, grams=halves[0]), families, options, meter.error, progress=progress)
        statistics = replace(statistics, grams={name: gram + halves[1][name] for name, gram in halves[0].items()})
    return _Job(dense, statistics, curves, PriceList(dense, slots, target), samples, options, progress)


def _search(job: _Job, target: Target) -> tuple[_Result, str, tuple[float, float] | None]:
    """The pruned graph, which limit was met, and the cycles of compiled programs before and after, if they were asked for."""
    options = job.options
    if options.cycles is not None:
        return _search_cycles(job, target, options.cycles)
    nothing = np.zeros(job.statistics.slots.count, bool)
    if options.channels is None:
        return _attempt(job, nothing), "pattern", None
    wanted = (1 - options.channels) * job.prices.of(nothing).macs
    removed = choose(job.curves, job.prices, lambda price: price.macs <= wanted)
    reached = job.prices.of(removed).macs <= wanted
    return _attempt(job, removed), "channels" if reached else "every family is as small as allowed", None


def _search_cycles(job: _Job, target: Target, wanted: float) -> tuple[_Result, str, tuple[float, float]]:
    """Choose by estimated cycles, compile, correct the estimate; then step back while the drop is too large."""
    whole = compiled_cycles(job.dense, job.feeds, target)
    share, stopped = wanted, "cycles"
    for _ in range(SEARCH_STEPS):
        result = _attempt(job, _by_cycles(job, share), mended=False)
        reached = compiled_cycles(result.graph, job.feeds, target) / whole
        if reached <= wanted:
            break
        share *= wanted / reached
    else:
        stopped = "every family is as small as allowed"
    result = _attempt(job, _by_cycles(job, share))
    if job.options.drop is not None:
        meter = OutputMeter(job.dense, job.feeds)
        low, high = share, 1.0
        if meter.disagreement(result.graph) > job.options.drop:
            stopped, result = "drop", _attempt(job, np.zeros(job.statistics.slots.count, bool))
            for _ in range(SEARCH_STEPS):
                middle = math.sqrt(low * high)
                attempt = _attempt(job, _by_cycles(job, middle))
                if meter.disagreement(attempt.graph) > job.options.drop:
                    low = middle
                else:
                    high, result = middle, attempt
    return result, stopped, (whole, compiled_cycles(result.graph, job.feeds, target))


def _by_cycles(job: _Job, share: float) -> Array:
    whole = job.prices.of(np.zeros(job.statistics.slots.count, bool)).cycles

    def enough(price: Price) -> bool:
        return price.cycles <= share * whole

    return choose(job.curves, job.prices, enough)


def compiled_cycles(graph: Graph, feeds: Sequence[Mapping[str, Array]], target: Target) -> int:
    """Simulated cycles of the compiled program; they do not depend on the scales, so one sample does."""
    from npucc.lowering import lower
    from npucc.quantize import QuantizeOptions, quantize
    from runtime.timing import simulate

    quantized = quantize(graph, feeds[:1], options=QuantizeOptions(method="minmax", samples=1, bias_samples=0))
    return simulate(lower(quantized.graph, target).program).total_cycles


def _attempt(job: _Job, removed: Array, *, mended: bool = True) -> _Result:
    """Cut, then mend: channels first, then the pattern on what is left."""
    options, slots = job.options, job.statistics.slots
    now = cut(job.statistics, removed, repair=options.repair) if removed.any() else job.dense
    if not mended:
        return _Result(now, removed, {})
    kept = {name: ~removed[_result_labels(job.dense, slots.labels, name)] for name in job.statistics.sites}
    plain = cut(job.statistics, removed, repair=False)
    now, rows = repair(now, job.dense, kept, job.feeds, options, plain=plain, sparse=options.pattern is not None, progress=job.progress)
    return _Result(now, removed, rows)


def _result_labels(graph: Graph, labels: Mapping[tuple[str, int], Array], node: str) -> Array:
    result = graph.nodes[node].outputs[0]
    return labels[result, len(graph.tensors[result].shape) - 1 if graph.nodes[node].op == "matmul" else 1]


def _with_own_constants(graph: Graph) -> Graph:
    """Every layer with weights has a bias, and shares neither with another one."""
    editor = Editor(graph)
    for node in graph:
        if not OPS[node.op].matrix or not graph.tensors[node.inputs[1]].is_constant:
            continue
        names = list(node.inputs[:2])
        bias = node.inputs[2] if len(node.inputs) > 2 else ""
        if not editor.is_read_once(names[1]):
            names[1] = _copy(editor, names[1])
        if not bias:
            shape = graph.tensors[node.outputs[0]].shape
            bias = editor.constant(f"{node.name}/bias", np.zeros(shape[-1 if node.op == "matmul" else 1], np.float32))
        elif not editor.is_read_once(bias):
            bias = _copy(editor, bias)
        editor.add_node(replace(node, inputs=(*names, bias)))
    return editor.freeze()


def _copy(editor: Editor, name: str) -> str:
    data = editor.tensors[name].data
    return name if data is None else editor.constant(name, data)


def _report(job: _Job, result: _Result, zero_channels: int, stopped: str, cycles: tuple[float, float] | None) -> PruneReport:
    now = job.prices.of(result.removed)
    whole = job.prices.of(np.zeros_like(result.removed))
    before, after = cycles or (whole.cycles, now.cycles)
    meter = OutputMeter(job.dense, job.feeds)
    layers = tuple(_layer_row(job, result, name) for name in job.dense.nodes if OPS[job.dense.nodes[name].op].matrix and name in result.graph.nodes)
    families = tuple(_family_row(curve, result.removed) for curve in job.curves)
    return PruneReport(whole.macs, now.macs, before, after, meter.error(result.graph), zero_channels, families, layers, stopped)


def _family_row(curve: Curve, removed: Array) -> FamilyRow:
    gone = int(removed[curve.family.labels].sum())
    error = curve.error(curve.counts.index(gone) + 1) if gone else 0.0
    return FamilyRow(curve.family.name, len(curve.family.labels), len(curve.family.labels) - gone, curve.family.makers, error)


def _layer_row(job: _Job, result: _Result, name: str) -> LayerRow:
    old, new = job.dense.nodes[name], result.graph.nodes[name]
    weights = [_nonzero(graph, node.inputs[1]) for graph, node in ((job.dense, old), (result.graph, new))]
    macs = [node_macs(graph, node) for graph, node in ((job.dense, old), (result.graph, new))]
    repaired = result.repaired.get(name)
    errors = (repaired.before, repaired.after) if repaired else (None, None)
    return LayerRow(name, old.op, *weights, *macs, *errors)


def _nonzero(graph: Graph, name: str) -> int:
    data = graph.tensors[name].data
    return 0 if data is None else int(np.count_nonzero(data))
