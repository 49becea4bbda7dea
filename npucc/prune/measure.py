"""How far the outputs are from those of the dense network, on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from npucc.evaluate import score_rows
from npucc.graph import Graph
from npucc.prune.moments import cut_graph
from npucc.quantize.calibrate import tensor_runner

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
    """Holds the dense network's outputs for some samples; `error` and `disagreement` of other graphs against them."""

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

    def disagreement(self, graph: Graph) -> float:
        """Points (hundredths of the rows) in which the largest score is another one, in the first output that has scores; without any,
        the error in per cent."""
        scored = next((name for name in self.outputs if score_rows(self.wanted[0][name]) is not None), None)
        if scored is None:
            return 100.0 * self.error(graph)
        run = self._run(graph)
        rows = other = 0
        for feed, wanted in zip(self.feeds, self.wanted, strict=True):
            scores, have = (score_rows(values[scored]) for values in (wanted, run(feed)))
            assert scores is not None
            assert have is not None
            rows += len(scores)
            other += int((scores.argmax(axis=1) != have.argmax(axis=1)).sum())
        return 100.0 * other / rows
