"""Additive masks: how far below its largest value a tensor still says something, where it ends up in a softmax.

The one big idea: a score 16 below the largest of its row is zero after softmax, whatever it is exactly. So of −10000, −3.4e38 or −∞ in what is
added to scores, only "low enough" need be stored, and the finite values next to it keep their steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from npucc import scalar
from npucc.graph import Graph, Node
from npucc.ops import OPS, Softmax, Table
from npucc.passes.infinities import may_be_infinite
from npucc.quantize.calibrate import SOFTMAX_DEPTH, softmax_axis, tests_for_masks
from npucc.quantize.ranges import Histogram, Range

MASKED = 5e3  # this far below the largest value lies no score, but a mask


@dataclass(frozen=True, slots=True)
class Masks:
    """`depths`: per tensor that is added to scores, how far below its largest value a mask begins."""

    graph: Graph
    depths: Mapping[str, float]

    @classmethod
    def find(cls, graph: Graph, histogram: Callable[[str], Histogram]) -> Masks:
        """`histogram`: the values seen of a tensor."""
        found: dict[str, float] = {}
        for node in reversed(list(graph)):
            for name in dict.fromkeys(node.inputs):
                depth = _through(graph, node, name, found, histogram)
                if depth is not None:
                    found[name] = max(depth, found.get(name, 0.0))
        return cls(graph, found)

    def of(self, names: Sequence[str], covered: Range, seen: Range, *, infinite: bool) -> Range:
        """The range of some tensors of one scale: with as much room below its top as their masks need, and no more if nothing else needs it.

        `infinite`: among what was seen of them.
        """
        depth = max((self.depths[name] for name in names if name in self.depths), default=0.0)
        infinite = infinite or self._may_mask(names)
        masks = infinite or seen.low < seen.high - MASKED
        if not depth or not masks or any(np.dtype(self.graph.tensors[name].dtype).kind in "iu" for name in names):
            return covered
        low = seen.high - depth
        if self._only_added(names):
            return Range(min(0.0, low if infinite else max(seen.low, low)), seen.high)
        return Range(min(covered.low, low), covered.high) if infinite else covered

    def _may_mask(self, names: Sequence[str]) -> bool:
        """Whether they can be −∞, in whatever sample. What softmax reads itself is counted from the top of each row, masks or not."""
        if any(softmax_axis(self.graph, name) is not None for name in names):
            return False
        return any(may_be_infinite(self.graph, name) for name in names if name in self.depths)

    def _only_added(self, names: Sequence[str]) -> bool:
        """Whether nothing needs more of these tensors than their depth."""
        users = [user for name in names for user in self.graph.users(name)]
        return not any(name in self.graph.outputs or name not in self.depths for name in names) and all(map(self._asks_for_depth, users))

    def _asks_for_depth(self, user: Node) -> bool:
        if tests_for_masks(self.graph, user) or _tests_for_infinity(self.graph, user):
            return True
        known = user.op in ("add", "where", "table") or OPS[user.op].moves_data
        return isinstance(user.attributes, Softmax) or (known and user.outputs[0] in self.depths)


def _through(graph: Graph, node: Node, name: str, found: Mapping[str, float], histogram: Callable[[str], Histogram]) -> float | None:
    """The depth that the node asks of an input; None where it asks for every value."""
    if isinstance(node.attributes, Softmax) or _tests_for_infinity(graph, node):
        return SOFTMAX_DEPTH
    if not name or not node.outputs or node.outputs[0] not in found or graph.tensors[name].dtype == "bool":
        return None
    after = found[node.outputs[0]]
    if node.op == "add":
        return after + sum(_width(graph, other, histogram) for other in node.inputs if other != name)
    if isinstance(node.attributes, Table):
        line = scalar.clipped_line(node.attributes.expression)
        return after / line.scale if line and line.scale > 0 else None
    return after if node.op == "where" or OPS[node.op].moves_data else None


def _tests_for_infinity(graph: Graph, node: Node) -> bool:
    """Whether the node compares with an infinite constant: below all else there must be room for what is masked, seen or not."""
    constants = [data for name in node.inputs if name and (data := graph.tensors[name].data) is not None]
    return node.op == "compare" and any(np.isinf(data).any() for data in constants)


def _width(graph: Graph, name: str, histogram: Callable[[str], Histogram]) -> float:
    """The spread of a tensor's values without what masks."""
    data = graph.tensors[name].data
    if data is not None:
        kept = data[np.isfinite(data) & (data > data.max() - MASKED)]
        return float(kept.max() - kept.min()) if kept.size else 0.0
    seen = histogram(name)
    centres, _ = seen.values()
    kept = centres[centres > seen.high - MASKED]
    return float(seen.high - kept.min() + seen.width) if kept.size else 0.0
