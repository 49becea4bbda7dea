"""How long the program of a pruned graph takes, which only compiling it tells.

The one big idea: two clocks. The exact one quantizes and lowers as `compile` will, so that its cycles are those of the final report; it is slow,
since the choice of 16 bits is made anew. The plain one does so in int8 with one sample: quick, and in proportion near enough to aim by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from isa.target import Target
from npucc.graph import Graph
from npucc.lowering import lower
from npucc.quantize import QuantizeOptions, quantize
from runtime.timing import simulate

PLAIN = QuantizeOptions(scheme="int8", rounding="nearest", method="minmax", samples=1, bias_samples=0, equalize=False)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A float graph in integers, and what its program takes."""

    integer: Graph
    cycles: int


@dataclass(frozen=True, slots=True)
class Clock:
    """`dense`, `feeds` and `quant`: what quantization will be given."""

    dense: Graph
    target: Target
    feeds: Iterable[Mapping[str, Any]]
    quant: QuantizeOptions

    def compiled(self, graph: Graph) -> Compiled:
        """As `compile` will make it of the float graph."""
        return self._compiled(graph, self.feeds, self.quant)

    def plain_cycles(self, graph: Graph) -> int:
        """With 16 bits only where the rules ask for them."""
        return self._compiled(graph, list(islice(self.feeds, 1)), PLAIN).cycles

    def _compiled(self, graph: Graph, feeds: Iterable[Mapping[str, Any]], options: QuantizeOptions) -> Compiled:
        integer = quantize(graph, feeds, options=options, target=self.target, dense=self.dense).graph
        lowered = lower(integer, self.target)
        return Compiled(integer, simulate(lowered.program, lowered.constants).total_cycles)
