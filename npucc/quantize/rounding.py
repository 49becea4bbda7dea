"""Weights rounded so that the results stay right, rather than each weight by itself.

The one big idea: with X the integers that a layer reads on the samples, rounding errors E of its weights cost |XE|². Weights are rounded one
after another, those that matter most first, each making up for the errors of those before it; then each is looked at once more. XᵀX is a
matrix of integers and the weights are in fixed point, so every sum is exact in float64: the same integers on every machine, whatever the
order in which its BLAS adds. (Frantar et al., GPTQ, ICLR 2023, minimize the same error; Behdin et al., QuantEase, 2023, by the same steps.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import arithmetic
from npucc.graph import Graph
from npucc.quantize.calibrate import Progress, tensor_runner
from npucc.quantize.scales import Scales
from npucc.sites import Site, find_sites

Array = np.ndarray[Any, np.dtype[Any]]

ROWS = (256, 2048)  # of X per layer, fewest and most
ROWS_PER_COLUMN = 4
LARGEST_DEPTH = 6144  # columns of X; beyond, XᵀX takes more memory than it is worth
JUDGES = 4  # every fourth sample only judges
FRACTION = 10  # bits of a weight behind the point, in steps
REACH = 4  # steps that a weight may move away from its value
ERROR_BITS = 17  # of an error: FRACTION, REACH and a group factor of up to 18 steps
EXACT_BITS = 52  # of a sum of integers in float64
GRAM_BITS = 24
SHIFT_WIDE = 4  # bits of 16-bit activations that are left out
RIDGE = 0.1  # of the mean diagonal, times columns per row: keeps weights near their values where the samples say little
LARGEST_4_BIT = 7
LARGEST_FACTOR = 18  # 7 · 18 = 126, the largest stored weight
SWEEPS = 2
BLOCK = 64  # columns whose effect on the others is added at once
CHUNK = 1024  # outputs solved at once, so that a block stays in the cache


@dataclass(frozen=True, slots=True)
class Evidence:
    """What layers with the same weights read: integers [groups, rows, depth], those that propose and those that judge."""

    site: Site
    fit: Array
    judge: Array

    def joined(self, other: Evidence) -> Evidence:
        """That of both."""
        return Evidence(self.site, np.concatenate([self.fit, other.fit], axis=1), np.concatenate([self.judge, other.judge], axis=1))


def collect(graph: Graph, scales: Scales, feeds: Sequence[Mapping[str, Array]], *, progress: Progress | None = None) -> dict[str, Evidence]:
    """Per weights: what the layers that read them see. Empty with fewer samples than it takes to propose and to judge."""
    sites = {name: site for name, site in find_sites(graph).items() if site.depth <= LARGEST_DEPTH}
    if len(feeds) < JUDGES or not sites:
        return {}
    run = tensor_runner(graph, sorted({site.input for site in sites.values()}))
    parts: dict[str, tuple[list[Array], list[Array]]] = {name: ([], []) for name in sites}
    for index, feed in enumerate(feeds):
        values = run(feed)
        for name, site in sites.items():
            rows = -(-int(np.clip(ROWS_PER_COLUMN * site.depth, *ROWS)) // len(feeds))
            parts[name][index % JUDGES == JUDGES - 1].append(_integers(site, scales, graph, site.columns(values[site.input], rows, index)[..., :-1]))
        if progress:
            progress("inputs of layers", index + 1, len(feeds))
    found: dict[str, Evidence] = {}
    for name, site in sites.items():
        evidence = Evidence(site, *(np.concatenate(each, axis=1) for each in parts[name]))
        same = found.get(site.weights)
        if same is None or (same.site.groups, same.site.depth) == (site.groups, site.depth):
            found[site.weights] = same.joined(evidence) if same else evidence
    return found


def _integers(site: Site, scales: Scales, graph: Graph, columns: Array) -> Array:
    """Steps from the zero point, int16; of a 16-bit activation in units of 2^SHIFT_WIDE steps."""
    quant = scales.of(graph, site.input)
    steps = arithmetic.quantize(columns, quant) - quant.zero
    return np.asarray(np.rint(steps / 2**SHIFT_WIDE) if quant.dtype == "s16" else steps, np.int16)


def gram_matrix(rows: Array) -> Array:
    """[groups, depth, depth]: covariance of the columns as integers of at most GRAM_BITS, with the ridge on the diagonal.

    The mean is left out because the bias takes what it costs.
    """
    x = rows.astype(np.float64)
    count, depth = rows.shape[1:]
    sums = x.sum(axis=1)
    gram = np.matmul(x.swapaxes(1, 2), x)
    gram *= count
    gram -= sums[:, :, None] * sums[:, None, :]
    largest = float(np.einsum("gkk->gk", gram).max())
    bits = min(GRAM_BITS, EXACT_BITS - ERROR_BITS - math.ceil(math.log2(max(depth, 2))))
    gram *= math.ldexp(1.0, bits - math.frexp(max(largest, 1.0))[1])
    np.rint(gram, out=gram)
    level = np.einsum("gkk->g", gram) / depth
    ridge = np.ceil(RIDGE * min(1.0, depth / max(count, 1)) * level) + 1
    gram[:, np.arange(depth), np.arange(depth)] += ridge[:, None]
    return np.asarray(gram)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Where weights in steps [groups, depth, outputs] may go: multiples of `factor` (same shape, or one number) up to `limit` of them."""

    factor: Array
    limit: int

    def nearest(self, steps: Array) -> Array:
        """The nearest place."""
        return np.asarray(np.clip(np.rint(steps / self.factor), -self.limit, self.limit) * self.factor)


def grouped_lattice(steps: Array, site: Site, size: int, evidence: Evidence | None) -> Lattice:
    """4-bit weights: whole numbers of −7 to 7 times a factor for each `size` weights of an output that lie next to each other in memory.

    The factor is the one with the least error, weighted by the energy of the input where it is known.
    """
    depth = steps.shape[1]
    places = np.arange(depth) % site.taps * (depth // site.taps) + np.arange(depth) // site.taps  # stored as [kernel, channels, outputs]
    order, starts = np.argsort(places), np.arange(0, depth, size)
    energy = np.ones((len(steps), depth))
    if evidence is not None:
        energy = np.einsum("grk,grk->gk", *2 * [evidence.fit.astype(np.float64)])
        energy = np.rint(np.ldexp(energy, 16 - math.frexp(float(energy.max()))[1])) + 1
    best, chosen = np.full((len(steps), len(starts), steps.shape[2]), np.inf), np.ones((len(steps), len(starts), steps.shape[2]))
    for factor in range(1, LARGEST_FACTOR + 1):
        error = np.rint(16 * (Lattice(np.float64(factor), LARGEST_4_BIT).nearest(steps) - steps))
        cost = np.add.reduceat((error**2 * energy[:, :, None])[:, order], starts, axis=1)
        chosen[cost < best] = factor
        best = np.minimum(best, cost)
    return Lattice(chosen[:, places // size], LARGEST_4_BIT)


def round_weights(steps: Array, lattice: Lattice, evidence: Evidence) -> Array:
    """`steps` [groups, depth, outputs] (weights over their scale) as whole numbers: by second order, or the nearest where that foresees better
    what the judging rows say."""
    nearest = lattice.nearest(steps)
    fixed = np.rint(np.ldexp(steps, FRACTION))
    solved = solve(fixed, lattice, gram_matrix(evidence.fit))
    return solved if _cost(evidence.judge, fixed, solved) < _cost(evidence.judge, fixed, nearest) else nearest


def solve(fixed: Array, lattice: Lattice, gram: Array) -> Array:
    """Whole numbers on the lattice for weights in fixed point, all [groups, depth, outputs]."""
    order = np.argsort(-np.einsum("gkk->gk", gram), axis=1, kind="stable")
    sorted_gram = np.stack([each[np.ix_(places, places)] for each, places in zip(gram, order, strict=True)])
    factor = np.broadcast_to(lattice.factor, fixed.shape)
    result = np.empty_like(fixed)
    for start in range(0, fixed.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        wanted, step = (np.take_along_axis(each[:, :, part], order[:, :, None], 1) for each in (fixed, factor))
        np.put_along_axis(result[:, :, part], order[:, :, None], _solve(wanted, Lattice(step, lattice.limit), sorted_gram), 1)
    return result


def _solve(fixed: Array, lattice: Lattice, gram: Array) -> Array:
    """Sweeps over the columns; in the first those not yet rounded count as exact."""
    error = np.zeros_like(fixed)
    slope = np.zeros_like(fixed)  # gram · error
    for sweep in range(SWEEPS):
        for start in range(0, fixed.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            still = slice(0 if sweep < SWEEPS - 1 else start + BLOCK, None)  # the columns whose slope is still looked at
            change = _solve_block(fixed[:, block], Lattice(lattice.factor[:, block], lattice.limit), gram[:, block, block], error, slope, start)
            slope[:, still] += gram[:, still, block] @ change
    return np.asarray(np.ldexp(fixed + error, -FRACTION))


def _solve_block(fixed: Array, lattice: Lattice, gram: Array, error: Array, slope: Array, start: int) -> Array:
    """Round the columns from `start` in turn, each to where it costs least; updates `error`, returns its change."""
    size = fixed.shape[1]
    own, change = slope[:, start : start + size].copy(), np.zeros_like(fixed)
    old = error[:, start : start + size]
    steps = 2.0**FRACTION * lattice.factor
    limits, reach = np.where(fixed == 0, 0.0, lattice.limit), REACH * steps  # pruned weights stay pruned
    # minimum and maximum: np.clip takes twice as long on arrays as small as a column
    for column in range(size):
        step, limit, wanted = steps[:, column], limits[:, column], fixed[:, column]
        best = old[:, column] - own[:, column] / gram[:, column, column, None]
        best = np.maximum(np.minimum(best, reach[:, column]), -reach[:, column])
        code = np.maximum(np.minimum(np.rint((wanted + best) / step), limit), -limit)
        change[:, column] = code * step - wanted - old[:, column]
        own[:, column:] += gram[:, column:, column, None] * change[:, column, None, :]
    old += change
    return change


def _cost(rows: Array, fixed: Array, rounded: Array) -> float:
    """Energy of what rounding does to the results, less its mean; exact sums of integers."""
    total = []
    for x, error in zip(rows, np.ldexp(rounded, FRACTION) - fixed, strict=True):
        answers = x.astype(np.float64) @ error
        centred = np.rint((answers * len(x) - answers.sum(axis=0)) / (2**FRACTION * len(x)))
        total += (centred**2).sum(axis=0).tolist()
    return math.fsum(total)
