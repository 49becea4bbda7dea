"""How far the outputs are from those of the dense network, on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from npucc.graph import Graph
from npucc.loss import points_lost
from npucc.prune.moments import cut_graph
from npucc.quantize.calibrate import integer_session, tensor_runner

Array = np.ndarray[Any, np.dtype[Any]]


DECISIONS = frozenset({"softmax", "table", "where", "compare"})


def watched(graph: Graph) -> tuple[str, ...]:
    """The outputs; in place of probabilities and decisions the scores behind them, which tell more than values near 0 and 1."""
    names: dict[str, None] = {}
    waiting = list(reversed(graph.outputs))
    while waiting:
        name = waiting.pop()
        node = graph.producer(name)
        if node is not None and node.op in DECISIONS:
            waiting += [each for each in reversed(node.inputs) if not graph.tensors[each].is_constant and each not in graph.inputs]
        else:
            names[name] = None
    return tuple(names) or graph.outputs


class OutputMeter:
    """Holds the dense network's outputs for some samples; errors of other graphs against them, and what that costs."""

    def __init__(self, dense: Graph, feeds: Sequence[Mapping[str, Array]]) -> None:
        self.feeds = feeds
        self.names = watched(dense)
        self.outputs = dense.outputs
        self.wanted = list(map(self._run(dense), feeds))

    def _run(self, graph: Graph) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        names = tuple(dict.fromkeys((*self.names, *self.outputs)))
        return tensor_runner(cut_graph(graph, names), names)

    def error(self, graph: Graph) -> float:
        """Energy of the error over that of the outputs less their mean, averaged over the outputs."""
        run = self._run(graph)
        found = [run(feed) for feed in self.feeds]
        return float(np.mean([self._relative(name, found) for name in self.names]))

    def _relative(self, name: str, found: Sequence[Mapping[str, Array]]) -> float:
        wanted = np.stack([values[name] for values in self.wanted]).astype(np.float64)
        have = np.stack([values[name] for values in found]).astype(np.float64)
        usable = np.isfinite(wanted) & np.isfinite(have)
        spread = ((wanted - wanted.mean(axis=0))[usable] ** 2).sum() if len(wanted) > 1 else (wanted[usable] ** 2).sum()
        return float(((have - wanted)[usable] ** 2).sum() / max(spread, 1e-12))

    def points_lost(self, graph: Graph) -> list[float]:
        """Per sample: hundredths of the answers that a float graph loses (see npucc.loss)."""
        run = tensor_runner(cut_graph(graph, self.outputs), self.outputs)
        return points_lost(self.outputs, self.wanted, [run(feed) for feed in self.feeds])

    def points_lost_in_integers(self, integer: Graph) -> list[float]:
        """The same, of a graph in integers."""
        session, names = integer_session(integer), list(self.outputs)
        return points_lost(self.outputs, self.wanted, [dict(zip(names, session.run(names, dict(feed)), strict=True)) for feed in self.feeds])
