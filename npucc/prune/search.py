"""Budgets: try, measure, correct, until the cycles or the accuracy are as asked for.

The one big idea: attempts come from a list in which the cheapest stands first, so that one number, how far to go in it, decides, and the line
between two attempts tells where to try next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.prune.attempt import Amount, Attempt, Job, Judge, layer_errors, patterns_of, try_out
from npucc.prune.channels import ASIDE, choose, cut
from npucc.prune.compiled import Compiled
from npucc.prune.patterns import Pattern
from npucc.prune.price import Price
from npucc.prune.repair import masked

Array = np.ndarray[Any, np.dtype[Any]]

STEPS = 5
CLOSE = 0.01  # of all cycles: no need to estimate them better
USED_UP = 0.8  # of the drop: no need to look for an amount that uses more of it
ROUNDS = 4  # of looking for a smaller amount, because integers lose more than floats; the last is without any
NEAR = 0.05  # below the cycles asked for: no need to look for a program that uses them up


@dataclass(frozen=True, slots=True)
class Found:
    """`stopped`: which limit ended the search; `cycles`: of the compiled programs before and after, and `loss`, points of accuracy, where they were
    asked for; `errors`: of the outputs, per layer with its pattern alone."""

    attempt: Attempt
    stopped: str
    cycles: tuple[int, int] | None = None
    loss: float | None = None
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
    dense = job.clock.compiled(job.original)
    attempt, compiled, stopped = _within_cycles(job, wanted, wanted * dense.cycles)
    if job.options.drop is None:
        return Found(attempt, stopped, (dense.cycles, compiled.cycles))
    judge, amount = Judge(job, dense), Amount(attempt.removed, None)
    added = judge.added(attempt, compiled)
    loss = judge.loss(amount) + added
    if loss > job.options.drop:
        steps, least = 1 << STEPS, job.prices.of(attempt.removed).cycles / job.prices.of(job.nothing).cycles
        path = _Path(np.arange(steps + 1), lambda n: amount if n == steps else Amount(_by_cycles(job, least ** (n / steps)), None))
        _, attempt, compiled, loss = _within_drop(judge, path, job.options.drop, added=added)
        stopped = "drop"
    return Found(attempt, stopped, (dense.cycles, compiled.cycles), loss)


def _within_cycles(job: Job, wanted: float, limit: float) -> tuple[Attempt, Compiled, str]:
    """(the attempt that takes away least of those whose program takes at most `limit` cycles, compiled, what ended the search).

    Where no program is so short: the shortest one. The share of estimated cycles is corrected by what each program takes: repaired weights have
    other ranges, and 16 bits go to other tensors.
    """
    smallest = _by_cycles(job, 0.0)
    share, enough, too_much = _estimated_share(job, wanted), 0.0, 1.0
    found: tuple[Attempt, Compiled, str] | None = None
    tried: set[bytes] = set()
    for number in range(2 * STEPS):
        attempt = try_out(job, Amount(_by_cycles(job, share), None))
        compiled = job.clock.compiled(attempt.graph)
        after = compiled.cycles
        is_enough, is_smallest = after <= limit, bool((attempt.removed == smallest).all())
        if found is None or (is_enough and after > found[1].cycles) or found[1].cycles > max(limit, after):
            found = attempt, compiled, "cycles" if is_enough else "every family is as small as allowed" if is_smallest else "attempts"
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
    """As many layers with patterns as the drop allows, those first that cost the outputs least for what they save."""
    removed = choose(job.curves, job.prices, lambda _: True)
    patterns = patterns_of(job.dense, job)
    errors = layer_errors(job, patterns)
    saved = _saved(job, patterns)
    order = sorted(patterns, key=lambda name: errors[name] / max(saved[name], 1e-12))
    far = np.sqrt(np.cumsum([0.0, *(min(errors[name], 1.0) for name in order)]))  # errors of layers add up, and answers are lost to their root
    path = _Path(far, lambda n: Amount(removed, {name: patterns[name] for name in order[:n]}))
    dense = job.clock.compiled(job.original)
    index, attempt, compiled, loss = _within_drop(Judge(job, dense), path, drop)
    return Found(attempt, "pattern" if index == path.end else "drop", (dense.cycles, compiled.cycles), loss, errors)


def _saved(job: Job, patterns: Mapping[str, Pattern]) -> dict[str, float]:
    """By layer what its pattern takes off: cycles on the target, and multiply-accumulates a little, as shares of the network's."""
    whole, saved = job.prices.of(job.nothing), {}
    for name, pattern in patterns.items():
        node = job.dense.nodes[name]
        before, after = job.prices.part((node,), job.nothing), job.prices.thinned(node, pattern)
        saved[name] = (before.cycles - after.cycles) / whole.cycles + ASIDE * (before.macs - after.macs) / max(whole.macs, 1)
    return saved


def _by_cycles(job: Job, share: float) -> Array:
    whole = job.prices.of(job.nothing).cycles

    def enough(price: Price) -> bool:
        return price.cycles <= share * whole

    return choose(job.curves, job.prices, enough, by_cycles=True)


@dataclass(frozen=True, slots=True)
class _Path:
    """Amounts 0 … n − 1, and `far` [n], ascending: what their loss grows with, about in proportion. Amount 0 has only what was told to go."""

    far: Array
    at: Callable[[int], Amount]

    @property
    def end(self) -> int:
        return len(self.far) - 1


def _within_drop(judge: Judge, path: _Path, drop: float, *, added: float = 0.0) -> tuple[int, Attempt, Compiled, float]:
    """A large amount that keeps the drop in integers, as its place on the path, fitted and compiled, and its loss; place 0 if none is found.

    `added`: what integers are known to lose more than floats.
    """
    measured = {0: judge.loss(path.at(0)) if path.at(0).removed.any() else 0.0}
    for left in reversed(range(ROUNDS)):
        place = _largest(judge, path, drop - added, measured) if left else 0
        attempt = try_out(judge.job, path.at(place))
        compiled = judge.job.clock.compiled(attempt.graph)
        added = judge.added(attempt, compiled) if attempt.removed.any() or attempt.patterns else 0.0
        if measured[place] + added <= drop or not place:
            break
    return place, attempt, compiled, measured[place] + added


def _largest(judge: Judge, path: _Path, allowed: float, measured: dict[int, float]) -> int:
    """The place of a large amount whose loss in float is allowed; 0 if none is found. `measured`: the loss by place, which is added to.

    Each place to try is where the straight line between the two nearest measured ones meets what is allowed.
    """
    if allowed > measured[0] and path.end not in measured:
        measured[path.end] = judge.loss(path.at(path.end))
    for _ in range(STEPS):
        low = max((place for place, loss in measured.items() if loss <= allowed), default=0)
        high = min((place for place in measured if place > low), default=low)
        if high - low <= 1 or not measured[low] < USED_UP * allowed:
            break
        share = (allowed - measured[low]) / (measured[high] - measured[low])
        aim = path.far[low] + (path.far[high] - path.far[low]) * share
        middle = int(np.clip(np.searchsorted(path.far, aim, side="right") - 1, low + 1, high - 1))
        measured[middle] = judge.loss(path.at(middle))
    return max((place for place, loss in measured.items() if loss <= allowed), default=0)
