"""The stage: dense float graph in, smaller float graph out, with a report of every layer.

The one big idea: remove what is zero, decide by the dense network's statistics, cut for real, then mend layer after layer. Each step takes a
graph and returns one; nothing is trained, no label is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from isa.target import Target
from npucc.errors import PruneError
from npucc.graph import Editor, Graph, Node
from npucc.operations import node_macs
from npucc.ops import OPS
from npucc.prune.arrange import arrange
from npucc.prune.attempt import Job
from npucc.prune.channels import Curve, draw_curves
from npucc.prune.compiled import Clock
from npucc.prune.families import Family, Statistics, find_families
from npucc.prune.measure import OutputMeter
from npucc.prune.moments import input_moments
from npucc.prune.options import PruneOptions
from npucc.prune.patterns import NeighbourPattern
from npucc.prune.price import PriceList
from npucc.prune.report import FamilyRow, LayerRow, PruneReport
from npucc.prune.search import Found, search
from npucc.prune.ties import find_slots
from npucc.prune.zeros import remove_zero_channels
from npucc.quantize import QuantizeOptions
from npucc.sites import MOST_COLUMNS, find_sites

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]
Feed = Mapping[str, Any]

METER_SAMPLES = (8, 32)  # for the sensitivity of each family: fewest and most
METER_MACS = 1 << 33  # of all these samples together, between the two


@dataclass(frozen=True, slots=True)
class Pruned:
    """The float graph that remains."""

    graph: Graph
    report: PruneReport


def prune(
    graph: Graph,
    feeds: Iterable[Feed],
    *,
    target: Target,
    options: PruneOptions,
    quant: QuantizeOptions | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Prune a float graph. Deterministic. `feeds`: calibration samples, of which the first `options.samples` are used.

    `quant`: how what is left will be quantized, which a budget of cycles depends on. Raises PruneError.
    """
    samples = list(islice(feeds, options.samples))
    if not samples:
        raise PruneError("there are no calibration samples", hint="give at least one, better some hundreds")
    clock = Clock(graph, target, samples if iter(feeds) is feeds else feeds, quant or QuantizeOptions())
    dense, zero_channels = remove_zero_channels(_with_own_constants(graph))
    if neighbours := _neighbour_patterns(dense, options):
        dense = arrange(dense, neighbours, samples)
    job = _prepare(graph, dense, samples, clock, options, progress)
    found = search(job)
    return Pruned(found.attempt.graph, _report(job, found, zero_channels))


def _prepare(
    original: Graph, dense: Graph, samples: Sequence[Mapping[str, Array]], clock: Clock, options: PruneOptions, progress: Progress | None
) -> Job:
    slots = find_slots(dense)
    statistics = Statistics(dense, slots, {}, {})
    prices = PriceList(dense, slots, clock.target)
    macs = sum(node_macs(dense, node) for node in dense)
    judged = (samples[1::2] or samples)[: int(np.clip(METER_MACS // max(macs, 1), *METER_SAMPLES))]
    curves: tuple[Curve, ...] = ()
    if families := _families(dense, statistics, options):
        statistics = replace(statistics, sites={name: site for name, site in find_sites(dense).items() if site.depth <= MOST_COLUMNS})
        # what one half of the samples proposes, the other half judges; what is decided is done with all
        places = -(-options.rows // len(samples))
        halves = [input_moments(dense, statistics.sites, samples[start::2] or samples, rows=places) for start in (0, 1)]
        first = replace(statistics, grams=halves[0])
        curves = draw_curves(first, families, prices, options, OutputMeter(dense, judged).error, progress=progress)
        statistics = replace(statistics, grams={name: gram + halves[1][name] for name, gram in halves[0].items()})
    return Job(original, dense, statistics, curves, prices, clock.target, samples, judged, options, clock, progress)


def _neighbour_patterns(dense: Graph, options: PruneOptions) -> dict[str, NeighbourPattern]:
    """By layer, where channels may change places."""
    if not options.arrange:
        return {}
    wanted = {name: (options.pattern_of(site.node), site) for name, site in find_sites(dense).items()}
    return {name: pattern for name, (pattern, site) in wanted.items() if isinstance(pattern, NeighbourPattern) and pattern.fits(site)}


def _families(dense: Graph, statistics: Statistics, options: PruneOptions) -> tuple[Family, ...]:
    """Those that may lose channels; where only some layers are told to, theirs."""
    told = any(isinstance(amount, float) for _, amount in options.layers)
    everywhere = options.channels is not None or options.cycles is not None
    if not told and not everywhere:
        return ()
    families = find_families(dense, statistics.slots, options)
    if not everywhere:
        families = tuple(family for family in families if any(options.channels_of(dense.nodes[name]) is not None for name in family.makers))
    if not families:
        raise PruneError("no channel of this network can be removed", hint="skip fewer layers, or choose N:M")
    return families


def _with_own_constants(graph: Graph) -> Graph:
    """Every layer with weights has a bias, and shares weights and bias with others only if it shares both."""
    graph = _with_equal_weights_once(graph)
    editor = Editor(graph)
    biases: dict[str, str] = {}  # of weights that several layers share
    for node in graph:
        if not OPS[node.op].matrix or not graph.tensors[node.inputs[1]].is_constant:
            continue
        weights, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else ""
        if bias and not graph.tensors[bias].is_constant:
            continue
        if _share_all(graph, weights):
            bias = biases.setdefault(weights, _own_bias(editor, graph, node, bias, is_shared=True))
        else:
            weights = weights if editor.is_read_once(weights) else _copy(editor, weights)
            bias = _own_bias(editor, graph, node, bias, is_shared=False)
        editor.add_node(replace(node, inputs=(node.inputs[0], weights, bias)))
    return editor.freeze()


def _with_equal_weights_once(graph: Graph) -> Graph:
    """Constants that matrix operators read, equal ones under one name: a recurrent layer repeats them step by step."""
    editor, names = Editor(graph), dict[tuple[tuple[int, ...], str, bytes], str]()
    for node in graph:
        if OPS[node.op].matrix:
            found = {name: data for name in node.inputs[1:] if name and (data := graph.tensors[name].data) is not None}
            same = {
                name: names.setdefault((data.shape, str(data.dtype), hashlib.sha256(data.tobytes()).digest()), name) for name, data in found.items()
            }
            editor.add_node(replace(node, inputs=tuple(same.get(name, name) for name in node.inputs)))
    return editor.freeze()


def _share_all(graph: Graph, weights: str) -> bool:
    """Whether several layers do the same with these weights and have the same bias, as the steps of a recurrent layer."""
    users = graph.users(weights)
    return len(users) > 1 and weights not in graph.outputs and len({(user.op, *user.inputs[1:]) for user in users}) == 1


def _own_bias(editor: Editor, graph: Graph, node: Node, bias: str, *, is_shared: bool) -> str:
    if not bias:
        shape = graph.tensors[node.outputs[0]].shape
        return editor.constant(f"{node.name}/bias", np.zeros(shape[-1 if node.op == "matmul" else 1], np.float32))
    return bias if editor.is_read_once(bias) or is_shared else _copy(editor, bias)


def _copy(editor: Editor, name: str) -> str:
    data = editor.tensors[name].data
    return name if data is None else editor.constant(name, data)


def _report(job: Job, found: Found, zero_channels: int) -> PruneReport:
    removed = found.attempt.removed
    now, whole = job.prices.of(removed), job.prices.of(job.nothing)
    before, after = found.cycles or (whole.cycles, now.cycles)
    error = OutputMeter(job.dense, job.feeds).error(found.attempt.graph)
    graph = found.attempt.graph
    layers = tuple(_layer_row(job, found, name) for name in job.dense.nodes if OPS[job.dense.nodes[name].op].matrix and name in graph.nodes)
    families = tuple(_family_row(curve, removed) for curve in job.curves)
    return PruneReport(
        whole.macs, now.macs, before, after, error, found.loss, zero_channels, families, layers, found.stopped, found.cycles is not None
    )


def _family_row(curve: Curve, removed: Array) -> FamilyRow:
    gone = int(removed[curve.family.labels].sum())
    error = curve.error(curve.counts.index(gone) + 1) if gone else 0.0
    return FamilyRow(curve.family.name, len(curve.family.labels), len(curve.family.labels) - gone, curve.family.makers, error)


def _layer_row(job: Job, found: Found, name: str) -> LayerRow:
    attempt = found.attempt
    old, new = job.dense.nodes[name], attempt.graph.nodes[name]
    (weights, macs), (kept, macs_kept) = (
        (_nonzero(graph, node.inputs[1]), node_macs(graph, node)) for graph, node in ((job.dense, old), (attempt.graph, new))
    )
    repaired, alone = attempt.repaired.get(name), (found.errors or {}).get(name)
    errors = (repaired.before, repaired.after) if repaired else (None, None)
    pattern = attempt.patterns.get(name)
    return LayerRow(name, old.op, str(pattern) if pattern else "", weights, kept, macs, macs_kept, *errors, alone)


def _nonzero(graph: Graph, name: str) -> int:
    data = graph.tensors[name].data
    return 0 if data is None else int(np.count_nonzero(data))
