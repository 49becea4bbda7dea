"""One attempt: what to take away, the network that is left of it, and how much accuracy that costs.

The one big idea: everything that is known before stays the same for all attempts; an attempt is a set of labels to remove and a set of layers
with patterns. What it costs is measured on samples that the attempt was not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from isa.target import Target
from npucc.graph import Graph
from npucc.prune.channels import Curve, cut
from npucc.prune.compiled import Clock, Compiled
from npucc.prune.families import Statistics
from npucc.prune.measure import OutputMeter
from npucc.prune.moments import Stream, dense_moments, with_constants
from npucc.prune.options import PruneOptions
from npucc.prune.patterns import Pattern
from npucc.prune.price import PriceList
from npucc.prune.repair import Plan, Repaired, fit, repair
from npucc.sites import MOST_COLUMNS, find_sites

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]
Feeds = Sequence[Mapping[str, Array]]

FEWEST_HALVED = 4  # samples below which there are no halves to judge each other


@dataclass(frozen=True, slots=True)
class Job:
    """What every attempt shares: the graph as it came, the dense one without channels that are zero, what is known of it, and the samples.

    `judged`: those that measure one layer's error.
    """

    original: Graph
    dense: Graph
    statistics: Statistics
    curves: tuple[Curve, ...]
    prices: PriceList
    target: Target
    feeds: Feeds
    judged: Feeds
    options: PruneOptions
    clock: Clock
    progress: Progress | None

    @property
    def nothing(self) -> Array:
        """No label removed."""
        return np.zeros(self.statistics.slots.count, bool)


@dataclass(frozen=True, slots=True)
class Amount:
    """What to take away: labels, and the layers that get a pattern (None: all that the options say)."""

    removed: Array
    patterns: Mapping[str, Pattern] | None


@dataclass(frozen=True, slots=True)
class Attempt:
    graph: Graph
    removed: Array
    patterns: Mapping[str, Pattern]
    repaired: Mapping[str, Repaired]


def try_out(job: Job, amount: Amount, *, feeds: Feeds | None = None) -> Attempt:
    """Cut, then mend: channels first, then the patterns on what is left."""
    options, removed = job.options, amount.removed
    now = cut(job.statistics, removed, repair=options.repair) if removed.any() else job.dense
    plain = cut(job.statistics, removed, repair=False) if removed.any() else job.dense
    patterns = patterns_of(now, job)
    if amount.patterns is not None:
        patterns = {name: pattern for name, pattern in patterns.items() if name in amount.patterns}
    kept = {name: ~removed[result_labels(job.dense, job.statistics.slots.labels, name)] for name in find_sites(job.dense)}
    plan = Plan(kept, patterns, options.criterion, options.repair, options.rows)
    now, rows = repair(now, job.dense, plan, feeds or job.feeds, plain=plain, progress=job.progress)
    return Attempt(now, removed, patterns, rows)


def patterns_of(graph: Graph, job: Job) -> dict[str, Pattern]:
    """By layer: the pattern that the options want for it, if the layer is large enough."""
    found: dict[str, Pattern] = {}
    for name, site in find_sites(graph).items():
        pattern = job.options.pattern_of(site.node)
        pattern = pattern.on(job.target) if pattern else None
        if pattern is not None and pattern.fits(site):
            found[name] = pattern
    return found


def layer_errors(job: Job, patterns: Mapping[str, Pattern]) -> dict[str, float]:
    """Per layer: the error of the outputs with its pattern alone, fitted on one half of the samples, measured on the other."""
    fitted = job.feeds[::2]
    meter, stream = OutputMeter(job.dense, job.judged), Stream(job.dense, fitted)
    plan = Plan({}, patterns, job.options.criterion, job.options.repair, job.options.rows)
    errors = {}
    for index, name in enumerate(patterns):
        if job.progress:
            job.progress("sensitivity", index, len(patterns))
        site = find_sites(job.dense)[name]
        if site.depth > MOST_COLUMNS:
            errors[name] = math.inf
            continue
        halves = dense_moments(job.dense, site, stream, rows=-(-job.options.rows // len(fitted)))
        matrix, _ = fit(halves, site.matrix(job.dense), patterns[name], site.summing_order, plan)
        errors[name] = meter.error(with_constants(job.dense, site, matrix))
    return errors


class Judge:
    """What amounts cost in accuracy. In float each half of the samples judges what was fitted on the other; then what quantizing adds, beyond what
    it costs the `dense` network."""

    def __init__(self, job: Job, dense: Compiled) -> None:
        self.job = job
        halves = (job.feeds[::2], job.feeds[1::2])
        self.folds = (halves, halves[::-1]) if len(job.feeds) >= FEWEST_HALVED else ((job.feeds, job.feeds),)
        self.meters = [OutputMeter(job.dense, judged) for _, judged in self.folds]
        self.known: dict[tuple[object, ...], float] = {}
        self.whole = OutputMeter(job.dense, job.feeds)
        self.dense = fmean(self.whole.points_lost_in_integers(dense.integer))

    def loss(self, amount: Amount) -> float:
        """In float: points of accuracy lost."""
        key = (amount.removed.tobytes(), None if amount.patterns is None else frozenset(amount.patterns))
        if key not in self.known:
            graphs = (try_out(self.job, amount, feeds=fitted).graph for fitted, _ in self.folds)
            self.known[key] = fmean([each for meter, graph in zip(self.meters, graphs, strict=True) for each in meter.points_lost(graph)])
        return self.known[key]

    def added(self, attempt: Attempt, compiled: Compiled) -> float:
        """Points that this network loses more in integers than in float, less those that the dense one does; at least 0."""
        now = fmean(self.whole.points_lost_in_integers(compiled.integer)) - fmean(self.whole.points_lost(attempt.graph))
        return max(now - self.dense, 0.0)


def result_labels(graph: Graph, labels: Mapping[tuple[str, int], Array], node: str) -> Array:
    """The labels of a layer's outputs."""
    result = graph.nodes[node].outputs[0]
    return labels[result, len(graph.tensors[result].shape) - 1 if graph.nodes[node].op == "matmul" else 1]
