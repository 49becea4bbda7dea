"""What a quantized network does on samples that nothing was fitted to.

The one big idea: estimates add up, networks don't. So what was chosen by estimate is measured on the integer network itself, run by onnxruntime
in the operators that it is exported in: the same integers that the NPU computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnxruntime import InferenceSession

from npucc.graph import Graph
from npucc.loss import CONFIDENCE, points_lost, upper_end
from npucc.quantize.calibrate import integer_session, tensor_runner
from npucc.quantize.sensitivity import NOTHING, Outputs, error_ratio, has_signal, spread, work

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 16  # held ones, at most so many
FEWEST = 8  # held samples: with fewer, those that were fitted to must do
WORK = 1.6e10  # multiply-accumulates to spend on a network, with more samples than `FEWEST`
SURE = 2.0  # standard errors of a difference: if it is farther from what is asked, more samples wouldn't tell more
QUIET = 1e-6  # error energy over signal energy that nobody asks to lower (60 dB)
INAUDIBLE = 1e-8  # what is not told apart from no error in reports
NUDGE = 1e-3  # dB: how far apart two are taken to be at least
POOR = 30.0  # dB: what is gained up to here counts twice
GOOD = 45.0  # dB: up to here all that is gained counts, from here to `QUIET` half


def worth(outputs: Sequence[str], ratios: Array) -> float:
    """Decibels of the mean relative error of an output over the samples (poor ones count more than in a mean of decibels); those below `POOR`
    twice, above `GOOD` half, beyond `QUIET` not at all; mean over the outputs. `outputs` names that of each ratio."""
    several = decibels(outputs, ratios)
    return math.fsum(map(_value, several.values())) / max(len(several), 1)


def decibels(outputs: Sequence[str], ratios: Array) -> dict[str, float]:
    """By output: signal over the mean relative error over the samples."""
    several = {name: np.sqrt(ratios[[index for index, each in enumerate(outputs) if each == name]] + QUIET) for name in dict.fromkeys(outputs)}
    return {name: -20 * math.log10(float(np.mean(errors))) for name, errors in several.items()}


def _value(each: float) -> float:
    """Of so many decibels."""
    return each - max(each - GOOD, 0) / 2 - max(POOR - each, 0)


def _slope(one: float, other: float) -> float:
    """What a decibel is worth between the two."""
    low, high = min(one, other) - NUDGE, max(one, other) + NUDGE
    return (_value(high) - _value(low)) / (high - low)


@dataclass(frozen=True, slots=True)
class Verdict:
    """About a network in integers. `decibels`: signal over error, mean over outputs and samples; `worth`: see there; `loss`: points of accuracy
    lost, the upper end of a confidence interval."""

    decibels: float
    worth: float
    loss: float


@dataclass(frozen=True, slots=True)
class Judge:
    """The samples, those that nothing was fitted to (`held`) first, and the outputs of the (dense) float model; `rows`: (output, sample) with a
    signal; `unavoidable`: points of accuracy that the float graph itself loses, having been pruned."""

    samples: Sequence[Mapping[str, Array]]
    held: int
    wanted: Sequence[Outputs]
    rows: tuple[tuple[str, int], ...]
    unavoidable: float = 0.0

    @classmethod
    def of(cls, graph: Graph, integer: Graph, feeds: Sequence[Mapping[str, Array]], *, fitted: int, dense: Graph | None = None) -> Judge:
        """For the outputs that have an error in this integer form of the graph. To the first `fitted` feeds weights and biases were fitted: that is
        the same for two ways that differ in their 16 bits, so these feeds join the others where those say too little. `dense`: the graph before it
        was pruned, whose outputs count."""
        fitted = fitted if len(feeds) >= fitted + FEWEST else 0
        most = int(np.clip(WORK / max(work(graph), 1), FEWEST, len(feeds)))
        held = spread(feeds[fitted:], min(most, SAMPLES))
        samples = [*held, *spread(feeds[:fitted], most - len(held))]
        run = tensor_runner(dense or graph, graph.outputs)
        wanted = [run(feed) for feed in samples]
        rows = tuple((name, index) for index, each in enumerate(wanted) for name in graph.outputs if has_signal(each[name]))
        every = cls(samples, len(held), wanted, rows)
        ratios = every.attempt(integer).ratios(len(held)).tolist()
        erring = {name for (name, _), ratio in zip(rows, ratios, strict=False) if ratio > NOTHING}
        judge = cls(samples, len(held), wanted, tuple(row for row in rows if row[0] in erring))
        if dense is None:
            return judge
        pruned = tensor_runner(graph, graph.outputs)
        return replace(judge, unavoidable=judge._loss([pruned(feed) for feed in held]))

    def outputs(self, count: int) -> list[str]:
        """The output of each row of the first `count` samples."""
        return [name for name, index in self.rows if index < count]

    def attempt(self, integer: Graph) -> Attempt:
        """One way to store the network, ready to run."""
        return Attempt(self, integer_session(integer))

    def verdict(self, attempt: Attempt) -> Verdict:
        """About one way to store the network, on held samples."""
        found = [attempt.run(index) for index in range(self.held)]
        ratios, names = attempt.ratios(self.held), self.outputs(self.held)
        mean = float(np.mean(-10 * np.log10(ratios + INAUDIBLE))) if len(ratios) else 0.0
        return Verdict(mean, worth(names, ratios), self._loss(found))

    def _loss(self, found: Sequence[Outputs]) -> float:
        """Points of accuracy that these outputs of the held samples lose: the upper end of the confidence interval of their mean."""
        return upper_end(points_lost(dict.fromkeys(self.outputs(self.held)), self.wanted[: self.held], found))

    def gains(self, more: Attempt, fewer: Attempt, asked: float) -> bool:
        """Whether `more` is worth over `asked` dB more than `fewer`: on as many samples as it takes to be sure, or on all."""
        count = FEWEST
        while True:
            samples = [index for _, index in self.rows if index < count]
            gain, error = paired_gain(self.outputs(count), samples, more.ratios(count), fewer.ratios(count))
            if abs(gain - asked) > SURE * error or count >= len(self.samples):
                return gain > asked
            count *= 2

    def surely_gains(self, more: Attempt, fewer: Attempt, asked: float) -> bool:
        """Whether, by all samples, `more` is worth over `asked` dB more than `fewer` and that is no chance."""
        count = len(self.samples)
        gain, error = paired_gain(self.outputs(count), [index for _, index in self.rows], more.ratios(count), fewer.ratios(count))
        return gain - asked > CONFIDENCE * error


@dataclass(frozen=True, slots=True)
class Attempt:
    """A way to store the network. `found`: the errors of the samples that were asked for up to now."""

    judge: Judge
    session: InferenceSession
    found: list[list[float]] = field(default_factory=list)

    def run(self, index: int) -> Outputs:
        """The outputs in one sample."""
        names = list(dict.fromkeys(self.judge.outputs(len(self.judge.samples))))
        outputs = dict(zip(names, self.session.run(names, dict(self.judge.samples[index])) if names else [], strict=True))
        if index == len(self.found):
            wanted = self.judge.wanted[index]
            self.found.append([error_ratio(outputs[name], wanted[name]) for name, each in self.judge.rows if each == index])
        return outputs

    def ratios(self, count: int) -> Array:
        """Error energy over signal energy of each row of the first `count` samples."""
        for index in range(len(self.found), min(count, len(self.judge.samples))):
            self.run(index)
        return np.array([ratio for each in self.found[:count] for ratio in each])


def paired_gain(outputs: Sequence[str], samples: Sequence[int], first: Array, second: Array) -> tuple[float, float]:
    """By how many dB the first errors are worth more than the second (per row, with its output and sample), and the standard error of that: the
    jackknife's, with one sample left out at a time. A decibel counts there as it does between the two on all samples, so that what moves both is
    no difference."""
    whole = [decibels(outputs, ratios) for ratios in (first, second)]
    slopes = {name: _slope(there, here) for (name, there), here in zip(whole[0].items(), whole[1].values(), strict=True)}

    def gain(rows: Sequence[int]) -> float:
        names = [outputs[row] for row in rows]
        there, here = (decibels(names, ratios[list(rows)]) for ratios in (first, second))
        return math.fsum(slopes[name] * (there[name] - here[name]) for name in there) / max(len(there), 1)

    without = [gain([row for row, sample in enumerate(samples) if sample != left_out]) for left_out in dict.fromkeys(samples)]
    mean = math.fsum(without) / max(len(without), 1)
    variance = math.fsum((each - mean) ** 2 for each in without) * (len(without) - 1) / max(len(without), 1)
    return gain(range(len(outputs))), math.sqrt(variance) if len(without) > 1 else math.inf
