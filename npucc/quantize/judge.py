"""What a quantized network does on samples that nothing was fitted to.

The one big idea: estimates add up, networks don't. So what was chosen by estimate is measured on the integer network itself, run by onnxruntime
in the operators that it is exported in: the same integers that the NPU computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.evaluate import score_rows
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.quantize.calibrate import float_session, tensor_runner
from npucc.quantize.sensitivity import NOTHING, Outputs, error_ratio, has_signal, spread, work

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 16  # at most so many are judged with
FEWEST = 8  # held samples: with fewer, those that were fitted to must do
WORK = 4e9  # multiply-accumulates to spend on a verdict, with more samples than `FEWEST`
QUIET = 1e-6  # error energy over signal energy that nobody asks to lower (60 dB)
INAUDIBLE = 1e-8  # what is not told apart from no error in reports
GOOD = 45.0  # dB: up to here all that is gained counts, from here to `QUIET` half
CONFIDENCE = 1.645  # standard errors: the mean is below in 95 of 100 cases


def worth(outputs: Sequence[str], ratios: Array) -> float:
    """Decibels of the mean relative error of an output over the samples (poor ones count more than in a mean of decibels); those above `GOOD`
    half, those beyond `QUIET` not at all; mean over the outputs. `outputs` names that of each ratio."""
    several = [np.sqrt(ratios[[index for index, each in enumerate(outputs) if each == name]] + QUIET) for name in dict.fromkeys(outputs)]
    decibels = [-20 * math.log10(float(np.mean(errors))) for errors in several]
    return math.fsum(each - max(each - GOOD, 0) / 2 for each in decibels) / max(len(decibels), 1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """About a network in integers. `decibels`: signal over error, mean over outputs and samples; `worth`: see there; `loss`: points of accuracy
    lost, the upper end of a confidence interval."""

    decibels: float
    worth: float
    loss: float


@dataclass(frozen=True, slots=True)
class Judge:
    """The samples and the float model's outputs; `rows`: the (output, sample) that have a signal."""

    samples: Sequence[Mapping[str, Array]]
    wanted: Sequence[Outputs]
    rows: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, graph: Graph, integer: Graph, feeds: Sequence[Mapping[str, Array]], *, fitted: int) -> Judge:
        """For the outputs that have an error in this integer form of the graph; of the feeds the first `fitted` should rather not be used."""
        held = feeds[fitted:] if len(feeds) >= fitted + FEWEST else feeds
        samples = spread(held, int(np.clip(WORK / max(work(graph), 1), FEWEST, SAMPLES)))
        run = tensor_runner(graph, graph.outputs)
        wanted = [run(feed) for feed in samples]
        rows = tuple((name, index) for index, each in enumerate(wanted) for name in graph.outputs if has_signal(each[name]))
        every = cls(samples, wanted, rows)
        ratios = every._ratios(every._run(integer)).tolist()
        erring = {name for (name, _), ratio in zip(rows, ratios, strict=True) if ratio > NOTHING}
        return cls(samples, wanted, tuple(row for row in rows if row[0] in erring))

    @property
    def outputs(self) -> list[str]:
        """The output of each row."""
        return [name for name, _ in self.rows]

    def verdict(self, integer: Graph) -> Verdict:
        """About one way to store the network."""
        found = self._run(integer)
        ratios = self._ratios(found)
        decibels = float(np.mean(-10 * np.log10(ratios + INAUDIBLE))) if len(ratios) else 0.0
        loss = max((self._loss(name, found, ratios) for name in dict.fromkeys(self.outputs)), default=0.0)
        return Verdict(decibels, worth(self.outputs, ratios), loss)

    def _run(self, integer: Graph) -> list[Outputs]:
        weights: dict[str, Array] = {}
        session, names = float_session(to_onnx(integer, apart=weights), weights, x64quantprecision="1"), list(dict.fromkeys(self.outputs))
        return [dict(zip(names, session.run(names, dict(feed)) if names else [], strict=True)) for feed in self.samples]

    def _ratios(self, found: Sequence[Outputs]) -> Array:
        """Error energy over signal energy of each row."""
        return np.array([error_ratio(found[index][name], self.wanted[index][name]) for name, index in self.rows])

    def _loss(self, name: str, found: Sequence[Outputs], ratios: Array) -> float:
        """Points of accuracy, of one output: the upper end of the confidence interval of their mean over the samples.

        Of scores: where the error of the margin turns the first two over, how much more probable the float model thinks the first; of any
        output not less than its share of error in the energy.
        """
        energies = {index: ratio for (output, index), ratio in zip(self.rows, ratios.tolist(), strict=True) if output == name}
        scores = {index: (score_rows(self.wanted[index][name]), score_rows(found[index][name])) for index in energies}
        turned = {index: (wanted, given) for index, (wanted, given) in scores.items() if wanted is not None and given is not None}
        deviation = margin_deviation(list(turned.values()))
        losses = [min(ratio, 1.0) for ratio in energies.values()]
        several = [losses, [turned_over(wanted, deviation) for wanted, _ in turned.values()]]
        return max(100 * _upper_end(each) for each in several)


def _upper_end(values: Sequence[float]) -> float:
    """Of the one-sided confidence interval of the mean."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((each - mean) ** 2 for each in values) / max(len(values) - 1, 1)
    return mean + CONFIDENCE * math.sqrt(variance / len(values))


def _first_two(rows: Array) -> Array:
    """Positions of the largest score and the next [rows, 2]."""
    return np.argsort(-rows, axis=1, kind="stable")[:, :2]


def _margin(rows: Array, places: Array) -> Array:
    taken = np.take_along_axis(rows.astype(np.float64), places, axis=1)
    return np.asarray(taken[:, 0] - taken[:, 1])


def margin_deviation(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Root mean square error of the margin between the float model's first two scores, over all rows."""
    errors = [_margin(found, places) - _margin(wanted, places) for wanted, found in pairs for places in (_first_two(wanted),)]
    squares = [float(np.dot(each, each)) for each in errors]
    return math.sqrt(math.fsum(squares) / max(sum(each.size for each in errors), 1))


def turned_over(rows: Array, deviation: float) -> float:
    """Share of right answers lost in rows of scores [rows, classes] where margins err by a normal deviation.

    Per row: the chance that the largest two change places, times by how much the model thinks the first more probable than the second.
    Scores that are no probabilities are taken for logits.
    """
    probable = rows.astype(np.float64)
    if rows.min() < 0 or rows.max() > 1:
        probable = np.exp(probable - probable.max(axis=1, keepdims=True))
        probable = probable / probable.sum(axis=1, keepdims=True)
    places = _first_two(rows)
    chances = [math.erfc(each / (math.sqrt(2) * max(deviation, 1e-30))) / 2 for each in _margin(rows, places).tolist()]
    return float(np.dot(chances, _margin(probable, places)) / len(rows))
