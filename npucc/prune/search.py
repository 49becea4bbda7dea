"""Budgets: try, measure, correct, until the cycles or the accuracy are as asked for.

The one big idea: an attempt is a set of labels to remove and a set of layers with patterns; both come from a list in which the cheapest
stands first, so that one number, how far to go in it, decides, and bisection finds it. Disagreement is measured on samples that the attempt
was not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from isa.target import Target
from npucc.graph import Graph
from npucc.operations import node_macs
from npucc.prune.channels import Curve, Statistics, choose, cut
from npucc.prune.compiled import Clock
from npucc.prune.measure import OutputMeter
from npucc.prune.moments import Stream, dense_moments, with_constants
from npucc.prune.options import PruneOptions
from npucc.prune.patterns import Pattern
from npucc.prune.price import Price, PriceList
from npucc.prune.repair import Plan, Repaired, fit, masked, repair
from npucc.sites import MOST_COLUMNS, find_sites

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]
Feeds = Sequence[Mapping[str, Array]]

STEPS = 5
CLOSE = 0.01  # of all cycles: no need to estimate them better
NEAR = 0.05  # below the cycles asked for: no need to look for a program that uses them up
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
class Attempt:
    graph: Graph
    removed: Array
    patterns: Mapping[str, Pattern]
    repaired: Mapping[str, Repaired]


@dataclass(frozen=True, slots=True)
class Found:
    """`stopped`: which limit ended the search; `cycles`: of the compiled programs before and after, and `disagreement` in points, where they were
    asked for; `errors`: of the outputs, per layer with its pattern alone."""

    attempt: Attempt
    stopped: str
    cycles: tuple[float, float] | None = None
    disagreement: float | None = None
    errors: Mapping[str, float] | None = None


def search(job: Job) -> Found:
    """The pruned graph within the budgets."""
    options = job.options
    if options.cycles is not None:
        return _search_cycles(job, options.cycles)
    if options.has_patterns and options.drop is not None:
        return _search_layers(job, options.drop)
    if options.channels is None:
        return Found(try_out(job, Amount(choose(job.curves, job.prices, lambda _: True), None)), "as told")
    wanted = (1 - options.channels) * job.prices.of(job.nothing).macs
    removed = choose(job.curves, job.prices, lambda price: price.macs <= wanted)
    reached = job.prices.of(removed).macs <= wanted
    return Found(try_out(job, Amount(removed, None)), "channels" if reached else "every family is as small as allowed")


def _search_cycles(job: Job, wanted: float) -> Found:
    """Choose by estimated cycles, compile as it will be, correct the estimate; then step back while the drop is too large."""
    whole = job.clock.cycles(job.original)
    attempt, after, stopped = _within_cycles(job, wanted, wanted * whole)
    if job.options.drop is None:
        return Found(attempt, stopped, (whole, after))
    judge, amount = Judge(job), Amount(attempt.removed, None)
    disagreement = judge.disagreement(amount)
    if disagreement > job.options.drop:
        scale, least = 1 << STEPS, job.prices.of(attempt.removed).cycles / job.prices.of(job.nothing).cycles
        amount, disagreement = judge.largest(lambda n: Amount(_by_cycles(job, least ** (n / scale)), None), scale, job.options.drop)
        stopped, attempt = "drop", try_out(job, amount)
        after = job.clock.cycles(attempt.graph)
    return Found(attempt, stopped, (whole, after), disagreement)


def _within_cycles(job: Job, wanted: float, limit: float) -> tuple[Attempt, int, str]:
    """(the attempt that takes away least of those whose program takes at most `limit` cycles, its cycles, what ended the search).

    Where no program is so short: the shortest one. The share of estimated cycles is corrected by what each program takes: repaired weights have
    other ranges, and 16 bits go to other tensors.
    """
    smallest = _by_cycles(job, 0.0)
    share, enough, too_much = _estimated_share(job, wanted), 0.0, 1.0
    found: tuple[Attempt, int, str] | None = None
    tried: set[bytes] = set()
    for number in range(2 * STEPS):
        attempt = try_out(job, Amount(_by_cycles(job, share), None))
        after = job.clock.cycles(attempt.graph)
        is_enough, is_smallest = after <= limit, bool((attempt.removed == smallest).all())
        if found is None or (is_enough and after > found[1]) or found[1] > max(limit, after):
            found = attempt, after, "cycles" if is_enough else "every family is as small as allowed" if is_smallest else "attempts"
        enough, too_much = (share, too_much) if is_enough else (enough, share)
        if (is_enough and (after > (1 - NEAR) * limit or number >= STEPS)) or (is_smallest and not is_enough):
            break
        tried.add(attempt.removed.tobytes())
        corrected = _other_share(job, share * limit / after * (1 - CLOSE), tried, enough, too_much, up=is_enough)
        if corrected is None:
            break
        share = corrected
    assert found is not None
    return found


def _other_share(job: Job, share: float, tried: Set[bytes], low: float, high: float, *, up: bool) -> float | None:
    """A share between the two, `share` if it is, at which something is removed that was not tried; None if there is none that way."""
    share = share if low < share < high else (low + high) / 2
    for _ in range(2 * STEPS):
        if _by_cycles(job, share).tobytes() not in tried:
            return share
        share = (share + (high if up else low)) / 2
    return None


def _estimated_share(job: Job, wanted: float) -> float:
    """The largest share of the estimated cycles whose program, in plain int8, takes no more than the share wanted."""
    whole = job.clock.plain_cycles(job.original)
    share, enough, too_much = wanted, 0.0, 1.0
    for _ in range(2 * STEPS):
        cut_only = cut(job.statistics, _by_cycles(job, share), repair=False)
        reached = job.clock.plain_cycles(masked(cut_only, patterns_of(cut_only, job))) / whole
        if reached <= wanted:
            enough = share
        else:
            too_much = share
        if too_much - enough < CLOSE:
            break
        share = (enough + too_much) / 2 if enough else share * wanted / reached
    return enough or share


def _search_layers(job: Job, drop: float) -> Found:
    """As many layers with patterns as the drop allows, those first that cost the outputs least for the multiply-accumulates they save."""
    removed = choose(job.curves, job.prices, lambda _: True)
    patterns = patterns_of(job.dense, job)
    errors = layer_errors(job, patterns)
    saved = {name: patterns[name].zeros * node_macs(job.dense, job.dense.nodes[name]) for name in patterns}
    order = sorted(patterns, key=lambda name: errors[name] / max(saved[name], 1.0))
    judge = Judge(job)
    amount, stopped = Amount(removed, patterns), "pattern"
    disagreement = judge.disagreement(amount)
    if disagreement > drop:
        amount, disagreement = judge.largest(lambda n: Amount(removed, {name: patterns[name] for name in order[:n]}), len(order), drop)
        stopped = "drop"
    return Found(try_out(job, amount), stopped, None, disagreement, errors)


def _by_cycles(job: Job, share: float) -> Array:
    whole = job.prices.of(job.nothing).cycles

    def enough(price: Price) -> bool:
        return price.cycles <= share * whole

    return choose(job.curves, job.prices, enough, by_cycles=True)


@dataclass(frozen=True, slots=True)
class Amount:
    """What to take away: labels, and the layers that get a pattern (None: all that the options say)."""

    removed: Array
    patterns: Mapping[str, Pattern] | None


class Judge:
    """How much amounts disagree with the dense network: each half of the samples judges what was fitted on the other."""

    def __init__(self, job: Job) -> None:
        self.job = job
        halves = (job.feeds[::2], job.feeds[1::2])
        self.folds = (halves, halves[::-1]) if len(job.feeds) >= FEWEST_HALVED else ((job.feeds, job.feeds),)
        self.meters = [OutputMeter(job.dense, judged) for _, judged in self.folds]

    def disagreement(self, amount: Amount) -> float:
        """In points, mean over the halves."""
        graphs = (try_out(self.job, amount, feeds=fitted).graph for fitted, _ in self.folds)
        return float(np.mean([meter.disagreement(graph) for meter, graph in zip(self.meters, graphs, strict=True)]))

    def largest(self, at: Callable[[int], Amount], most: int, drop: float) -> tuple[Amount, float]:
        """By bisection the last of the amounts 0 … most − 1 that keeps the drop, and its disagreement; amount 0 if none does."""
        low, high, found, disagreement = 0, most, at(0), 0.0
        for _ in range(STEPS):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            amount = at(middle)
            measured = self.disagreement(amount)
            if measured > drop:
                high = middle
            else:
                low, found, disagreement = middle, amount, measured
        return found, disagreement


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


def result_labels(graph: Graph, labels: Mapping[tuple[str, int], Array], node: str) -> Array:
    """The labels of a layer's outputs."""
    result = graph.nodes[node].outputs[0]
    return labels[result, len(graph.tensors[result].shape) - 1 if graph.nodes[node].op == "matmul" else 1]
