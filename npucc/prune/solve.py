"""Least squares on Gram matrices: what the weights should be, and which of them to do without.

The one big idea: with H the Gram matrix of a layer's inputs, removing columns p and refitting the rest costs wₚᵀ ((H⁻¹)ₚₚ)⁻¹ wₚ (the optimal
brain surgeon). The same inverse tells what to remove, how to mend the rest, and its own value after the removal. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

RIDGE = 1e-3  # of the mean diagonal: keeps the solution near the given weights where the samples say little

FEW_ROWS = 10.0  # rows per column below which the ridge grows


def damped(gram: Array, ridge: float = RIDGE) -> Array:
    """The Gram matrix (…, k, k) with `ridge` times its mean diagonal added to the diagonal (not to that of the bias); more of it where
    there are few rows for so many columns. The last column is ones, so the last entry counts rows."""
    size = gram.shape[-1]
    ridge = ridge * max(1.0, FEW_ROWS * size / max(float(gram[..., -1, -1].min()), 1.0))
    level = np.einsum("...ii->...", gram[..., :-1, :-1]) / max(size - 1, 1)
    extra = np.ones(size)
    extra[-1] = 0.0
    return np.asarray(gram + (ridge * np.maximum(level, 1e-12))[..., None, None] * np.diag(extra) + 1e-9 * np.eye(size))


def refit(gram: Array, cross: Array, start: Array, *, mask: Array | None = None, ridge: float = RIDGE) -> Array:
    """The matrix W that minimizes |Y − XW|² + ridge·|W − start|², for (…, k, outputs); zero where bool[…, k, outputs] `mask` is not set."""
    mended = damped(gram, ridge)
    wanted = cross + (mended - gram) @ start
    if mask is None or mask.all():
        return np.asarray(np.linalg.solve(mended, wanted))
    result = np.zeros_like(start)
    for place in np.ndindex(start.shape[:-2]):
        for output in range(start.shape[-1]):
            chosen = np.flatnonzero(mask[place][:, output])
            part = mended[place][np.ix_(chosen, chosen)]
            result[place][chosen, output] = np.linalg.solve(part, wanted[place][chosen, output])
    return result


@dataclass(frozen=True, slots=True)
class Elimination:
    """Units in the order they go. `costs[i]`: squared error of the answers after the first i + 1 are gone and the rest is refitted."""

    order: Array
    costs: Array


def eliminate(grams: list[Array], matrices: list[Array], columns: list[Array], weights: list[float], keep: int = 1) -> Elimination:
    """Remove units one by one, the cheapest first, summed over several layers that read them.

    Per layer: `grams` (k + 1, k + 1), `matrices` (k + 1, outputs), `columns` int[units, m] the columns of each unit, `weights` its factor in the sum.
    """
    inverses = [np.linalg.inv(damped(gram)) for gram in grams]
    current = [matrix.copy() for matrix in matrices]
    units = len(columns[0])
    alive = np.ones(units, bool)
    order, costs, total = [], [], 0.0
    for _ in range(units - keep):
        candidates = np.flatnonzero(alive)
        prices = np.zeros(len(candidates))
        for inverse, matrix, own, weight in zip(inverses, current, columns, weights, strict=True):
            prices += weight * _prices(inverse, matrix, own[candidates])
        unit = int(candidates[prices.argmin()])
        total += float(prices.min())
        alive[unit] = False
        order.append(unit)
        costs.append(total)
        for inverse, matrix, own in zip(inverses, current, columns, strict=True):
            _remove(inverse, matrix, own[unit])
    return Elimination(np.array(order, int), np.array(costs))


def _prices(inverse: Array, matrix: Array, columns: Array) -> Array:
    """Per unit: wᵀ ((H⁻¹)ₚₚ)⁻¹ w, summed over outputs."""
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    rows = matrix[columns]
    return np.asarray(np.einsum("umo,umo->u", rows, np.linalg.solve(blocks, rows)))


def _remove(inverse: Array, matrix: Array, columns: Array) -> None:
    """Take columns out, in place: the rest is mended, their own rows become zero."""
    gain = np.linalg.solve(inverse[np.ix_(columns, columns)], np.concatenate([matrix[columns], inverse[columns]], axis=1))
    outputs = matrix.shape[1]
    side = inverse[:, columns].copy()
    matrix -= side @ gain[:, :outputs]
    inverse -= side @ gain[:, outputs:]
    matrix[columns] = 0.0
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0


def sweep_pattern(gram: Array, matrix: Array, *, keep: int, of: int, groups: Array) -> Array:
    """bool[k + 1, outputs]: which weights stay when of each `of` neighbours in the order of `groups` (int[n, of]) only `keep` may.

    SparseGPT's sweep: groups of columns in turn, the weights with the least w² / diagonal² of the inverse's Cholesky factor go, and their error is
    passed on to the columns that are still to come.
    """
    order = np.concatenate([groups.ravel(), np.setdiff1d(np.arange(len(gram)), groups)])
    factor = np.linalg.cholesky(np.linalg.inv(damped(gram)[np.ix_(order, order)])).T  # upper
    work = matrix[order].copy()
    mask = np.ones(work.shape, bool)
    for start in range(0, groups.size, of):
        block = slice(start, start + of)
        scores = work[block] ** 2 / (np.diag(factor)[block, None] ** 2)
        gone = np.argsort(scores, axis=0, kind="stable")[: of - keep]
        chosen = np.ones((of, work.shape[1]), bool)
        np.put_along_axis(chosen, gone, False, axis=0)
        mask[block] = chosen
        for row in range(start, start + of):
            error = np.where(chosen[row - start], 0.0, work[row]) / factor[row, row]
            work[row + 1 :] -= factor[row, row + 1 :, None] * error
    result = np.empty_like(mask)
    result[order] = mask
    return result
