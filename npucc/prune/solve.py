"""Least squares on Gram matrices: what the weights should be, and which of them to do without.

The one big idea: with H the Gram matrix of a layer's inputs, removing columns p and refitting the rest costs wₚᵀ ((H⁻¹)ₚₚ)⁻¹ wₚ (the optimal
brain surgeon). The same inverse tells what to remove, how to mend the rest, and its own value after the removal. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.prune.patterns import Pattern

Array = np.ndarray[Any, np.dtype[Any]]

RIDGE = 1e-3  # of the mean diagonal: keeps the solution near the given weights where the samples say little
FEW_ROWS = 10.0  # rows per column below which the ridge grows
MOST_ITERATIONS = 24  # of conjugate gradients: the error is then within a per cent of the least, which is less than the samples tell
FIRST_PULL, GROWTH, PULLS = 0.003, 1.11, 48  # of ADMM, on a Gram matrix with ones on its diagonal; slower growth errs a little less
ENOUGH = 1e-6  # of the first residual's energy


def damped(gram: Array, ridge: float = RIDGE) -> Array:
    """The Gram matrix (…, k, k) with `ridge` times its mean diagonal added to the diagonal (not to that of the bias); more of it where
    there are few rows for so many columns. The last column is ones, so the last entry counts rows."""
    size = gram.shape[-1]
    ridge = ridge * max(1.0, FEW_ROWS * size / max(float(gram[..., -1, -1].min()), 1.0))
    level = np.einsum("...ii->...", gram[..., :-1, :-1]) / max(size - 1, 1)
    result = gram.copy()
    entries = np.einsum("...ii->...i", result)  # a view of the diagonals
    entries[..., :-1] += ridge * np.maximum(level, 1e-12)[..., None]
    entries += 1e-9
    return np.asarray(result)


def refit(gram: Array, cross: Array, start: Array, *, mask: Array | None = None, ridge: float = RIDGE, first: Array | None = None) -> Array:
    """The matrix W that minimizes |Y − XW|² + ridge·|W − start|², for (…, k, outputs); zero where bool[…, k, outputs] `mask` is not set.

    With a mask by conjugate gradients from `first` (default: start), all outputs at once.
    """
    mended = damped(gram, ridge)
    wanted = cross + mended @ start - gram @ start
    if mask is None or mask.all():
        return np.asarray(np.linalg.solve(mended, wanted))
    return _conjugate_gradients(mended, wanted, (start if first is None else first) * mask, mask)


def _conjugate_gradients(matrix: Array, wanted: Array, solution: Array, mask: Array) -> Array:
    """Solve matrix · x = wanted within the mask, each output by itself, preconditioned by the diagonal."""
    inverse = 1 / np.einsum("...ii->...i", matrix)[..., None]
    residual = (wanted - matrix @ solution) * mask
    direction = inverse * residual
    energy = (residual * direction).sum(axis=-2)
    enough = ENOUGH * (inverse * (wanted * mask) ** 2).sum(axis=-2)
    for _ in range(MOST_ITERATIONS):
        if (energy <= enough).all():
            break
        image = (matrix @ direction) * mask
        length = energy / np.maximum((direction * image).sum(axis=-2), 1e-300)
        solution = solution + length[..., None, :] * direction
        residual -= length[..., None, :] * image
        scaled = inverse * residual
        after = (residual * scaled).sum(axis=-2)
        direction = scaled + (after / np.maximum(energy, 1e-300))[..., None, :] * direction
        energy = after
    return solution


@dataclass(frozen=True, slots=True)
class Elimination:
    """Units in the order they go. `costs[i]`: squared error of the answers after the first i + 1 are gone and the rest is refitted.

    `mended[count]`: per layer the matrix when `count` units are gone, for the counts that were asked for.
    """

    order: Array
    costs: Array
    mended: dict[int, list[Array]]


def eliminate(
    grams: list[Array], matrices: list[Array], columns: list[Array], weights: list[float], *, keep: int = 1, at: Sequence[int] = ()
) -> Elimination:
    """Remove units one by one, the cheapest first, summed over several layers that read them.

    Per layer: `grams` (k + 1, k + 1), `matrices` (k + 1, outputs), `columns` int[units, m] the columns of each unit, `weights` its factor in
    the sum. `at`: counts of removed units at which to note the matrices.
    """
    inverses = [np.linalg.inv(damped(gram)) for gram in grams]
    current = [matrix.copy() for matrix in matrices]
    units = len(columns[0])
    alive = np.ones(units, bool)
    order, costs, total = [], [], 0.0
    mended: dict[int, list[Array]] = {}
    for count in range(1, units - keep + 1):
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
        if count in at:
            mended[count] = [matrix.copy() for matrix in current]
    return Elimination(np.array(order, int), np.array(costs), mended)


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


def thin_out(gram: Array, matrix: Array, pattern: Pattern, allowed: Array) -> tuple[Array, Array]:
    """(bool of the weights that stay, the mended matrix [K + 1, N]), the rows in the order in which the pattern counts, bias last.

    ADMM (Boyd et al., "Distributed optimization", 2011; for pruning: Boža, "Fast and effective weight update for pruned large language models",
    TMLR 2024): one copy of the weights minimizes the error, one keeps the pattern, and what pulls them together grows. Weights are counted in
    units of their inputs' energy. `allowed`: the weights that are not zero already.
    """
    mended = damped(gram)
    units = np.sqrt(np.diag(mended))[:, None]
    values, vectors = np.linalg.eigh(mended / units / units.T)
    values, vectors, free = values[:, None].astype(np.float32), vectors.astype(np.float32), (matrix * units).astype(np.float32)
    wanted = values * (vectors.T @ free)
    dual, kept, mask, pull = np.zeros_like(free), free, allowed.copy(), FIRST_PULL
    for _ in range(PULLS):
        both = free + dual
        mask[:-1] = pattern.choose(both[:-1].astype(np.float64) ** 2 * allowed[:-1]) & allowed[:-1]
        kept = both * mask
        dual = (both - kept) / np.float32(GROWTH)  # of the pull to come
        pull *= GROWTH
        free = vectors @ ((wanted + np.float32(pull) * (vectors.T @ (kept - dual))) / (values + np.float32(pull)))
    return mask, kept / units
