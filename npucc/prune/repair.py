"""Layer after layer: let it answer in the pruned network what it answered in the dense one.

The one big idea: a layer is fitted on the inputs that it now gets, those of the pruned and already mended layers before it, to the answers of
the dense layer. So each layer also takes back what is left of the errors before it. Half of the samples propose, the other half judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.graph import Graph
from npucc.prune.moments import Moments, site_moments, with_constants
from npucc.prune.options import PruneOptions
from npucc.prune.solve import refit, sweep_pattern
from npucc.sites import Site, find_sites

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class Repaired:
    """The relative error of a layer's answers before and after."""

    before: float
    after: float


def repair(
    now: Graph,
    dense: Graph,
    kept: Mapping[str, Array],
    feeds: Sequence[Mapping[str, Array]],
    options: PruneOptions,
    *,
    plain: Graph,
    sparse: bool,
    progress: Progress | None = None,
) -> tuple[Graph, dict[str, Repaired]]:
    """Go through the layers of `now` in order; `kept`: per layer, bool[outputs in the dense graph] of those that are left.

    `plain`: `now` with the dense network's weights, only cut, for the error before. `sparse`: also impose the options' N:M pattern.
    Layers whose inputs are still exact, and which get no pattern, stay as they are.
    """
    whole, rows = find_sites(dense), {}
    names = list(find_sites(now))
    places = -(-options.rows // len(feeds))
    for index, name in enumerate(names):
        if progress:
            progress("repair", index, len(names))
        site = find_sites(now)[name]
        groups = pattern_groups(site, options) if sparse else None
        if groups is None and not options.repair:
            continue
        halves = site_moments(now, site, dense, whole[name], kept[name], feeds, rows=places)
        start = site.matrix(now)
        both = halves[0] + halves[1]
        if groups is None and both.error(start) < 1e-10:
            continue
        matrix, mask = _fit(halves, start, groups, options)
        rows[name] = Repaired(both.error(find_sites(plain)[name].matrix(plain) * mask), both.error(matrix))
        now = with_constants(now, site, matrix)
    return now, rows


def pattern_groups(site: Site, options: PruneOptions) -> Array | None:
    """int[groups, M]: columns of neighbouring input channels at the same kernel position; None for a layer that is too small or to be left alone."""
    if options.pattern is None or site.groups != 1 or options.skips(site.node):
        return None
    of = options.pattern[1]
    blocks = site.depth // site.taps // of
    if not blocks:
        return None
    channels = np.arange(blocks * of).reshape(1, blocks, of)
    return (channels * site.taps + np.arange(site.taps)[:, None, None]).reshape(-1, of)


def _fit(halves: Sequence[Moments], start: Array, groups: Array | None, options: PruneOptions) -> tuple[Array, Array]:
    """(new matrix, bool of what of it may be other than zero)."""
    both = halves[0] + halves[1]
    mask = start != 0
    mask[:, -1] = True
    if groups is not None:
        mask &= _pattern(both, start, groups, options)[None]
    if not options.repair:
        return start * mask, mask
    dense_start = best_fit(halves, start, start != 0) if groups is not None else start
    return best_fit(halves, dense_start, mask), mask


def _pattern(moments: Moments, start: Array, groups: Array, options: PruneOptions) -> Array:
    assert options.pattern is not None
    keep, of = options.pattern
    gram, matrix = moments.gram[0], start[0]
    if options.criterion == "second_order":
        return sweep_pattern(gram, matrix, keep=keep, of=of, groups=groups)
    scores = np.abs(matrix)
    if options.criterion == "activation":
        scores = scores * np.sqrt(np.diag(gram))[:, None]
    mask = np.ones(matrix.shape, bool)
    for columns in groups:
        gone = np.argsort(scores[columns], axis=0, kind="stable")[: of - keep]
        part = np.ones((of, matrix.shape[1]), bool)
        np.put_along_axis(part, gone, False, axis=0)
        mask[columns] = part
    return mask


def best_fit(halves: Sequence[Moments], start: Array, mask: Array) -> Array:
    """Least squares with the ridge by which each half foresees the other best; `start` cut to the mask where no ridge does better."""
    unchanged = start * mask
    scores = []
    for ridge in RIDGES:
        crossed = ((halves[0], halves[1]), (halves[1], halves[0]))
        scores.append(sum(judge.error(refit(fit.gram, fit.cross, start, mask=mask, ridge=ridge)) for fit, judge in crossed))
    if min(scores) >= sum(half.error(unchanged) for half in halves):
        return unchanged
    both = halves[0] + halves[1]
    return refit(both.gram, both.cross, start, mask=mask, ridge=RIDGES[int(np.argmin(scores))])
