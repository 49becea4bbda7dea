"""Which weights of a layer may stay: N of M neighbours, whole blocks of the array, or any.

The one big idea: a layer is a matrix K × N, K in the order in which the array sums (kernel row, kernel column, input channel), and a pattern
chooses from the costs of its entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isa.target import Target
from npucc.sites import Site
from runtime.packing import array_block

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class NeighbourPattern:
    """Of each `of` neighbours along K at most `keep` stay, output by output; the last neighbours of a column may be fewer."""

    keep: int
    of: int

    @property
    def zeros(self) -> float:
        """The share of the weights that goes."""
        return 1 - self.keep / self.of

    @property
    def is_structured(self) -> bool:
        """Whether an array that skips only structure skips its zeros."""
        return True

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def on(self, target: Target) -> NeighbourPattern:  # noqa: ARG002  the shape of every pattern
        """The pattern with the target's sizes filled in."""
        return self

    def fits(self, site: Site) -> bool:
        """Whether the layer has input channels enough to be neighbours."""
        return site.groups == 1 and site.depth // site.taps >= self.of

    def choose(self, costs: Array) -> Array:
        """bool[K, N]: what stays, by the cost of each entry."""
        depth, outputs = costs.shape
        groups = np.full((-(-depth // self.of) * self.of, outputs), -np.inf)
        groups[:depth] = costs
        groups = groups.reshape(-1, self.of, outputs)
        leave = np.argsort(-groups, axis=1, kind="stable")[:, self.keep :]
        stays = np.ones(groups.shape, bool)
        np.put_along_axis(stays, leave, False, axis=1)
        return np.asarray(stays.reshape(-1, outputs)[:depth])


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """`share` of the blocks of `rows` × `columns` weights goes (0: the sizes of the target's array); blocks of one weight are no structure at all."""

    share: float
    rows: int = 0
    columns: int = 0

    @property
    def zeros(self) -> float:
        """The share of the weights that goes."""
        return self.share

    @property
    def is_structured(self) -> bool:
        """Whether an array that skips only structure skips its zeros."""
        return not self.rows == 1 == self.columns

    def __str__(self) -> str:
        return f"{'block' if self.is_structured else 'unstructured'}={self.share:.0%}"

    def on(self, target: Target) -> BlockPattern:
        """The pattern with the target's sizes filled in."""
        rows, columns = array_block(target)
        return self if self.rows else replace(self, rows=rows, columns=columns)

    def fits(self, site: Site) -> bool:
        """Whether there is more than one block."""
        return site.groups == 1 and (site.depth > self.rows or site.outputs > self.columns)

    def choose(self, costs: Array) -> Array:
        """bool[K, N]: what stays, by the costs of the entries, which add up over a block."""
        blocks = block_sums(costs, self.rows, self.columns)
        stays = np.ones(blocks.size, bool)
        stays[np.argsort(blocks, axis=None, kind="stable")[: round(self.share * blocks.size)]] = False
        whole = np.repeat(np.repeat(stays.reshape(blocks.shape), self.rows, axis=0), self.columns, axis=1)
        return np.asarray(whole[: costs.shape[0], : costs.shape[1]])


Pattern = NeighbourPattern | BlockPattern


def block_sums(values: Array, rows: int, columns: int) -> Array:
    """Sums over blocks of a matrix; those at the edges are smaller."""
    if rows == columns == 1:
        return values
    partial = np.add.reduceat(values, np.arange(0, values.shape[0], rows), axis=0)
    return np.asarray(np.add.reduceat(partial, np.arange(0, values.shape[1], columns), axis=1))
