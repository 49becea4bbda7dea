"""Budgets: try, measure, correct, until the cycles or the accuracy are as asked for.

The one big idea: attempts come from a list in which the cheapest stands first, so that one number, how far to go in it, decides, and the line
between two attempts tells where to try next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.operations import node_macs
from npucc.prune.attempt import Amount, Attempt, Job, Judge, layer_errors, patterns_of, try_out
from npucc.prune.channels import choose, cut
from npucc.prune.price import Price
from npucc.prune.repair import masked

Array = np.ndarray[Any, np.dtype[Any]]

STEPS = 5
CLOSE = 0.01  # of all cycles: no need to estimate them better
USED_UP = 0.8  # of the drop: no need to look for an amount that uses more of it
NEAR = 0.05  # below the cycles asked for: no need to look for a program that uses them up


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
        amount, disagreement = _largest(
            judge, lambda n: Amount(_by_cycles(job, least ** (n / scale)), None), np.arange(scale + 1), disagreement, job.options.drop
        )
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
        far = np.sqrt(np.cumsum([0.0, *(min(errors[name], 1.0) for name in order)]))  # errors of layers add up, and rows are lost to their root
        amount, disagreement = _largest(judge, lambda n: Amount(removed, {name: patterns[name] for name in order[:n]}), far, disagreement, drop)
        stopped = "drop"
    return Found(try_out(job, amount), stopped, None, disagreement, errors)


def _by_cycles(job: Job, share: float) -> Array:
    whole = job.prices.of(job.nothing).cycles

    def enough(price: Price) -> bool:
        return price.cycles <= share * whole

    return choose(job.curves, job.prices, enough, by_cycles=True)


def _largest(judge: Judge, at: Callable[[int], Amount], far: Array, most: float, drop: float) -> tuple[Amount, float]:
    """Of the amounts 0 … n − 1 a large one that keeps the drop, and its disagreement; amount 0 if none does.

    `far`: [n + 1], ascending, what disagreement grows with, about in proportion; `most`: that of amount n, which is too much. Each place to try is
    where the straight line between the two nearest measured ones meets the drop.
    """
    low, high, found, disagreement = 0, len(far) - 1, at(0), 0.0
    for _ in range(STEPS):
        if high - low <= 1 or disagreement >= USED_UP * drop > 0:
            break
        aim = far[low] + (far[high] - far[low]) * (drop - disagreement) / (most - disagreement)
        middle = int(np.clip(np.searchsorted(far, aim, side="right") - 1, low + 1, high - 1))
        amount = at(middle)
        measured = judge.disagreement(amount)
        if measured > drop:
            high, most = middle, measured
        else:
            low, found, disagreement = middle, amount, measured
    return found, disagreement
