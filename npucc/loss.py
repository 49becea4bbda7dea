"""Points of accuracy that a changed network loses, estimated without labels.

The one big idea: the dense float network's own scores say how probable each answer is, so another answer costs the difference of two
probabilities. Where few samples show hardly any other answer, it also tells by how little the right one wins: how often the first two change places
follows from how far margins are off. The larger of the two is taken: the second knows no third answer, and is too small where much is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from npucc.evaluate import score_rows

Array = np.ndarray[Any, np.dtype[Any]]

CONFIDENCE = 1.645  # standard errors: the mean is below in 95 of 100 cases
SURE_ANSWER = 0.25  # probability of the first class, on average: scores of less certain rows are no answers, but features

Outputs = Mapping[str, Array]


def points_lost(names: Iterable[str], wanted: Sequence[Outputs], found: Sequence[Outputs]) -> list[float]:
    """Per sample, of the dense float network's outputs and another's: hundredths of the answers that are lost in the output that loses most; where no
    output answers a question, of the energy that is error."""
    several = {name: ([each[name] for each in wanted], [each[name] for each in found]) for name in names}
    answers = {name: rows for name, (exact, _) in several.items() if (rows := _answers(exact)) is not None}
    lost = [_answers_lost(rows, several[name][1]) for name, rows in answers.items()]
    return max(lost or [_energy_lost(*pair) for pair in several.values()], key=math.fsum, default=[])


def _answers(outputs: Sequence[Array]) -> list[Array] | None:
    """The scores of each sample, [rows, classes], if they are sure enough to be some: features are even."""
    several = [rows for each in outputs if (rows := _rows(each)) is not None]
    largest = [float(probabilities(rows).max(axis=1).mean()) for rows in several]
    return several if len(several) == len(outputs) and math.fsum(largest) >= SURE_ANSWER * len(largest) else None


def _rows(output: Array) -> Array | None:
    """The output as rows of scores; a single probability as that of no and of yes."""
    if output.size == 1 and output.dtype.kind == "f":
        value = float(output.item())
        return np.array([[1 - value, value]]) if 0 <= value <= 1 else None
    return score_rows(output)


def _answers_lost(wanted: Sequence[Array], outputs: Sequence[Array]) -> list[float]:
    found = [_rows(np.clip(each, 0, 1) if each.size == 1 else each) for each in outputs]
    pairs = [(rows, have) for rows, have in zip(wanted, found, strict=True) if have is not None]
    deviation = margin_deviation(pairs)
    foreseen = [100 * turned_over(rows, deviation) for rows, _ in pairs]
    seen = [100 * _less_probable(rows, have) for rows, have in pairs]
    return max(foreseen, seen, key=math.fsum)


def _energy_lost(wanted: Sequence[Array], found: Sequence[Array]) -> list[float]:
    """Of each sample, in per cent of the energy that a sample has on average: a silent one is no great loss."""
    usable = [np.isfinite(exact) & np.isfinite(have) for exact, have in zip(wanted, found, strict=True)]
    energies = [float(np.square(exact[here], dtype=np.float64).sum()) for exact, here in zip(wanted, usable, strict=True)]
    errors = [
        float(np.square(have[here].astype(np.float64) - exact[here]).sum()) for exact, have, here in zip(wanted, found, usable, strict=True)
    ]
    mean = max(math.fsum(energies) / max(len(energies), 1), 1e-30)
    return [100 * min(each / mean, 1.0) for each in errors]


def _less_probable(wanted: Array, found: Array) -> float:
    """By how much the dense network thinks its answers more probable than those found, mean over rows."""
    probable, place = probabilities(wanted), np.arange(len(wanted))
    return float(np.mean(probable[place, wanted.argmax(axis=1)] - probable[place, found.argmax(axis=1)]))


def upper_end(values: Sequence[float]) -> float:
    """Of the one-sided confidence interval of the mean."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((each - mean) ** 2 for each in values) / max(len(values) - 1, 1)
    return mean + CONFIDENCE * math.sqrt(variance / len(values))


def margin_deviation(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Root mean square error of the margin between the float model's first two scores, over all rows."""
    margins = [(_margin(found, places), _margin(wanted, places)) for wanted, found in pairs for places in (_first_two(wanted),)]
    errors = [(found - wanted)[np.isfinite(found) & np.isfinite(wanted)] for found, wanted in margins]
    squares = [float(np.dot(each, each)) for each in errors]
    return math.sqrt(math.fsum(squares) / max(sum(each.size for each in errors), 1))


def turned_over(rows: Array, deviation: float) -> float:
    """Share of right answers lost in rows of scores [rows, classes] where margins err by a normal deviation.

    Per row: the chance that the largest two change places, times by how much the model thinks the first more probable than the second.
    """
    places = _first_two(rows)
    chances = [math.erfc(each / (math.sqrt(2) * max(deviation, 1e-30))) / 2 for each in _margin(rows, places).tolist()]
    return float(np.dot(chances, _margin(probabilities(rows), places)) / max(len(rows), 1))


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
    """Infinite where a row has fewer than two scores that are not masked."""
    taken = np.take_along_axis(rows.astype(np.float64), places, axis=1)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(taken[:, 0] - taken[:, 1], nan=np.inf, posinf=np.inf)
