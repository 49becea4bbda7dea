"""16 bits for the few tensors that are worth it.

The one big idea: by estimate first, then by measurement. Groups are taken one after the other, each time the one whose 16 bits raise the
outputs' estimated signal-to-noise ratio most per extra cycle; from the generous end of that path, blocks are taken back for as long as
the measured network is worth more without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from isa.target import Target
from npucc.graph import Quant
from npucc.quantize.candidates import byte_groups, candidates
from npucc.quantize.judge import QUIET, Attempt, Judge, worth
from npucc.quantize.network import Network, Rounded
from npucc.quantize.options import MEASURED
from npucc.quantize.price import IMPOSSIBLE, Prices, measure_prices, total_cycles
from npucc.quantize.scales import alternatives
from npucc.quantize.sensitivity import Sensitivity, measure

Array = np.ndarray[Any, np.dtype[Any]]
Way = TypeVar("Way")

PERCENT = 0.1  # dB that one percent of cycles has to gain
GENEROUS = 3.0  # times less is asked of an estimate than of the measurement that follows it
FREE = 0.02  # percent of cycles: what costs less is compared as if it cost that
SMALLEST_GAIN = 0.02  # dB: less is no reason to widen anything
BLOCKS = 6  # of about the same price, each looked at by itself
VERDICTS = 12  # about the network without a block, at most


@dataclass(frozen=True, slots=True)
class Wide:
    """One group in 16 bits: its tensors, the estimated gain (dB, mean over outputs and samples) and the price (% of cycles)."""

    tensors: tuple[str, ...]
    gain: float
    price: float

    def as_dict(self) -> dict[str, Any]:
        return {"tensors": list(self.tensors), "gain": round(self.gain, 2), "price": round(self.price, 3)}


@dataclass(frozen=True, slots=True)
class Mixed:
    """What was chosen by estimate, without what the measurement took back. `before` (as scheme int8: also without measured
    ranges) and `after`: measured signal-to-noise ratio in dB, mean over outputs and samples; `loss`: points of accuracy lost at most,
    measured (of a pruned network all three by the dense one's outputs); `price`: percent more cycles, all together. `judged`: samples."""

    chosen: tuple[Wide, ...] = ()
    taken_back: tuple[Wide, ...] = ()
    before: float = 0.0
    after: float = 0.0
    loss: float = 0.0
    price: float = 0.0
    judged: int = 0

    @property
    def in_vain(self) -> Mixed:
        """All taken back."""
        return replace(self, chosen=(), taken_back=(*self.chosen, *self.taken_back), price=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, of as many digits as mean something."""
        figures = {name: round(getattr(self, name), 3) for name in ("before", "after", "loss", "price", "judged")}
        return {"chosen": [each.as_dict() for each in self.chosen], "taken_back": [each.as_dict() for each in self.taken_back], **figures}


def mixed_precision(network: Network, plain: Rounded, judge: Judge, target: Target) -> tuple[Rounded, Mixed]:
    """The network with 16 bits where measured error is worth the target's cycles, and the account of it. `plain`: without."""
    if not candidates(plain.graph, plain.integer, plain.scales):
        return plain, Mixed()
    found = _sensitivity(network, plain)
    trial = _Trial.of(network, plain, found, target, judge)
    gains = propose(found, trial.price, budget=trial.allowed, all_that_gain=network.options.limits_drop)
    together = cache(trial.together)
    gains = dict(list(gains.items())[: most_within(list(gains), together, trial.allowed)])
    kept = take_back(list(gains), trial.price, trial.attempt, trial.misses)
    wide = {root: Wide(trial.groups[root], gain, trial.price[root]) for root, gain in gains.items()}
    chosen, taken_back = (tuple(each for root, each in wide.items() if (root in kept) == stays) for stays in (True, False))
    stored = trial.stored(kept) if kept or found.methods else plain
    return stored, Mixed(chosen, taken_back, price=together(kept))


def _sensitivity(network: Network, plain: Rounded) -> Sensitivity:
    """What 8 bits cost in each group, and better ranges for those that cost much."""
    groups = byte_groups(plain.graph, plain.scales)

    def others(root: str) -> Mapping[str, Quant]:
        if network.options.method != MEASURED:
            return {}
        return alternatives(plain.graph, groups[root], plain.calibration, network.options, used=plain.scales.quants[root])

    feeds = network.calibration.first
    return measure(
        plain.graph, plain.integer, plain.scales, feeds, groups, dense=network.dense, alternatives=others, progress=network.progress
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """To store the network: `spent` percent of cycles on 16 bits, `loss` points of accuracy (where that is limited)."""

    attempt: Attempt
    spent: float
    loss: float


@dataclass(frozen=True, slots=True)
class _Trial:
    """The network in 8 bits and all that tells what 16 bits do to it: per group (by its root) tensors and price in percent."""

    network: Network
    plain: Rounded
    found: Sensitivity
    groups: Mapping[str, tuple[str, ...]]
    price: Mapping[str, float]
    prices: Prices
    target: Target
    judge: Judge

    @classmethod
    def of(cls, network: Network, plain: Rounded, found: Sensitivity, target: Target, judge: Judge) -> _Trial:
        important = set(found.important())
        groups = {root: names for root, names in candidates(plain.graph, plain.integer, plain.scales).items() if root in important}
        prices = measure_prices(plain.integer, groups, target)
        return cls(network, plain, found, groups, {root: prices.percent(root) for root in groups}, prices, target, judge)

    @property
    def allowed(self) -> float:
        """Percent of cycles."""
        return math.inf if self.network.options.limits_drop else self.network.options.budget

    def stored(self, roots: Set[str]) -> Rounded:
        """With 16 bits in these groups."""
        return self.network.widened(self.plain, roots, self.found.methods)

    def attempt(self, roots: Set[str]) -> _Way:
        """With 16 bits in these groups, ready to be judged."""
        attempt = self.judge.attempt(self.stored(roots).integer)
        loss = self.judge.verdict(attempt).loss - self.judge.unavoidable if self.network.options.limits_drop else 0.0
        return _Way(attempt, sum(max(self.price[root], 0.0) for root in roots), loss)

    def misses(self, fewer: _Way, more: _Way) -> bool:
        """Whether `more` has something worth its cycles that `fewer` has not; under a limited drop, whether only `more` keeps it, or both miss
        it and `more` by less."""
        if self.network.options.limits_drop:
            return min(self.network.options.drop - fewer.loss, 0.0) < min(self.network.options.drop - more.loss, 0.0)
        return self.judge.gains(more.attempt, fewer.attempt, PERCENT * (more.spent - fewer.spent))

    def together(self, roots: Set[str]) -> float:
        """Percent more cycles with all of these groups in 16 bits."""
        if not roots:
            return 0.0
        cycles = total_cycles(self.plain.integer, [name for root in roots for name in self.groups[root]], self.target)
        return 100 * (cycles / max(self.prices.cycles, 1) - 1)


def most_within(roots: Sequence[str], together: Callable[[frozenset[str]], float], allowed: float) -> int:
    """How many of the groups, from the first on, have an allowed price together: it may be higher than that of each alone."""
    enough, too_many = 0, len(roots) + 1
    middle = len(roots)
    while too_many - enough > 1:
        price = together(frozenset(roots[:middle]))
        enough, too_many = (middle, too_many) if price <= allowed and price < IMPOSSIBLE else (enough, middle)
        middle = (enough + too_many) // 2
    return enough


@dataclass(frozen=True, slots=True)
class _Point:
    """The path up to here: roots and their gains, error per row, percent of cycles."""

    taken: tuple[tuple[str, float], ...]
    rest: Array
    spent: float


def propose(sensitivity: Sensitivity, price: Mapping[str, float], *, budget: float, all_that_gain: bool = False) -> dict[str, float]:
    """By root, in the order of their worth, the estimated gain of the groups to widen. `price`: percent of cycles; `budget`: at most so many.

    A generous proposal: an estimate must gain a third of what a measurement must; `all_that_gain`: or anything at all.
    """
    sensitivity = sensitivity.heard()
    path = _path(sensitivity, {root: each for root, each in price.items() if root in sensitivity.groups}, budget)
    best = path[-1] if all_that_gain else max(path, key=lambda point: worth(sensitivity.outputs, point.rest) - PERCENT / GENEROUS * point.spent)
    return dict(best.taken)


def _path(sensitivity: Sensitivity, price: Mapping[str, float], budget: float) -> list[_Point]:
    """From nothing in 16 bits to all that the budget allows: each point has one group more than the one before."""
    roots = list(price)
    noise = np.array([sensitivity.groups[root] for root in roots]).reshape(len(roots), len(sensitivity.outputs))
    cost = np.array([price[root] for root in roots])
    point = _Point((), sensitivity.weights + sum(sensitivity.groups.values()), 0.0)
    points = [point]
    left = np.ones(len(roots), bool)
    while roots and sensitivity.outputs:
        gains = np.mean(10 * np.log10((point.rest + QUIET) / (np.maximum(point.rest - noise, 0) + QUIET)), axis=1)
        left &= (point.spent + cost <= budget) & (gains >= SMALLEST_GAIN)
        if not left.any():
            break
        best = int(np.argmax(np.where(left, gains / np.maximum(cost, FREE), -1)))
        left[best] = False
        rest = np.maximum(point.rest - noise[best], sensitivity.weights)
        point = _Point((*point.taken, (roots[best], float(gains[best]))), rest, point.spent + max(float(cost[best]), 0.0))
        points.append(point)
    return points


def take_back(
    roots: Sequence[str], price: Mapping[str, float], attempt: Callable[[Set[str]], Way], misses: Callable[[Way, Way], bool]
) -> frozenset[str]:
    """What is left of the groups (in the order of their worth) when blocks of them go that the network doesn't miss.

    First blocks of about the same price, the least worth first, then halves of those that had to stay. What costs nothing stays.
    """
    kept = frozenset(roots)
    waiting, verdicts = blocks([root for root in roots if price[root] > FREE], price), 0
    best = attempt(kept) if waiting else None
    while best is not None and waiting and verdicts < VERDICTS:
        block, verdicts = waiting.pop(), verdicts + 1
        if not misses(found := attempt(kept - set(block)), best):
            kept, best = kept - set(block), found
        elif len(block) > 1:
            waiting[:0] = [block[: len(block) // 2], block[len(block) // 2 :]]
    return kept


def blocks(roots: Sequence[str], price: Mapping[str, float]) -> list[list[str]]:
    """Neighbours together for as long as a block has no more than a sixth of the price of all."""
    most = sum(price[root] for root in roots) / BLOCKS
    found: list[list[str]] = []
    for root in roots:
        if not found or sum(price[each] for each in found[-1]) + price[root] > most:
            found.append([])
        found[-1].append(root)
    return found
