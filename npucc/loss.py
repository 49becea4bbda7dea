"""Points of accuracy that a changed network loses, estimated without labels.

The one big idea: the dense float network's own scores say how probable each answer is, so another answer costs the difference of two
probabilities. Where few samples show hardly any other answer, it also tells by how little the right one wins: how often the first two change places
follows from how far margins are off. The larger of the two is taken: the second knows no third answer, and is too small where much is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from npucc.evaluate import score_rows

Array = np.ndarray[Any, np.dtype[Any]]

CONFIDENCE = 1.645  # standard errors: the mean is below in 95 of 100 cases
SURE = 0.25  # probability of the first class, on average: scores of less certain rows are no answers, but features


def points_lost(wanted: Sequence[Array], found: Sequence[Array]) -> list[float]:
    """Per sample, from one output of the dense float network and of another: hundredths of the answers that are lost; where the output answers
    no question, of the energy that is error."""
    rows, other = ([each for output in several if (each := _rows(output)) is not None] for several in (wanted, found))
    if len(rows) < len(wanted) or len(other) < len(found) or not _are_answers(rows):
        return [100 * min(_error_share(have, exact), 1.0) for have, exact in zip(found, wanted, strict=True)]
    deviation = margin_deviation(list(zip(rows, other, strict=True)))
    foreseen = [100 * turned_over(each, deviation) for each in rows]
    seen = [100 * _less_probable(each, have) for each, have in zip(rows, other, strict=True)]
    return max(foreseen, seen, key=math.fsum)


def _less_probable(wanted: Array, found: Array) -> float:
    """By how much the dense network thinks its answers more probable than those found, mean over rows."""
    probable, place = probabilities(wanted), np.arange(len(wanted))
    return float(np.mean(probable[place, wanted.argmax(axis=1)] - probable[place, found.argmax(axis=1)]))


def _are_answers(several: Sequence[Array]) -> bool:
    """Whether rows of scores are sure enough to be some: features are even."""
    largest = [float(probabilities(rows).max(axis=1).mean()) for rows in several]
    return math.fsum(largest) >= SURE * len(largest)


def _rows(output: Array) -> Array | None:
    """The output as [rows, classes] of scores; a single probability as that of no and of yes."""
    if output.size == 1 and output.dtype.kind == "f":
        value = float(output.item())
        return np.array([[1 - value, value]]) if 0 <= value <= 1 else None
    return score_rows(output)


def _error_share(found: Array, wanted: Array) -> float:
    """Energy of the error over that of the signal, what is not finite left out."""
    usable = np.isfinite(wanted) & np.isfinite(found)
    exact = np.where(usable, wanted, 0).astype(np.float64)
    error = np.where(usable, found, 0) - exact
    return float(np.sum(error * error) / max(np.sum(exact * exact), 1e-30))


def upper_end(values: Sequence[float]) -> float:
    """Of the one-sided confidence interval of the mean."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((each - mean) ** 2 for each in values) / max(len(values) - 1, 1)
    return mean + CONFIDENCE * math.sqrt(variance / len(values))


def margin_deviation(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Root mean square error of the margin between the float model's first two scores, over all rows."""
    errors = [_margin(found, places) - _margin(wanted, places) for wanted, found in pairs for places in (_first_two(wanted),)]
    squares = [float(np.dot(each, each)) for each in errors]
    return math.sqrt(math.fsum(squares) / max(sum(each.size for each in errors), 1))


def turned_over(rows: Array, deviation: float) -> float:
    """Share of right answers lost in rows of scores [rows, classes] where margins err by a normal deviation.

    Per row: the chance that the largest two change places, times by how much the model thinks the first more probable than the second.
    """
    places = _first_two(rows)
    chances = [math.erfc(each / (math.sqrt(2) * max(deviation, 1e-30))) / 2 for each in _margin(rows, places).tolist()]
    return float(np.dot(chances, _margin(probabilities(rows), places)) / len(rows))


def probabilities(rows: Array) -> Array:
    """Of scores [rows, classes]; those that are no probabilities are taken for logits."""
    probable = rows.astype(np.float64)
    if rows.min() >= 0 and rows.max() <= 1:
        return probable
    exponentials = np.exp(probable - probable.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _first_two(rows: Array) -> Array:
    """Positions of the largest score and the next [rows, 2]."""
    return np.argsort(-rows, axis=1, kind="stable")[:, :2]


def _margin(rows: Array, places: Array) -> Array:
    taken = np.take_along_axis(rows.astype(np.float64), places, axis=1)
    return np.asarray(taken[:, 0] - taken[:, 1])
