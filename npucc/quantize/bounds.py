"""Ranges that follow from the model, whatever the samples: of what is computed from integer inputs.

The one big idea: a mask is 0 or 1 in every sample, but how many ones there are is chance. So the range of a count is worked out by interval
arithmetic from the range of what is counted, not taken from the samples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping

import numpy as np

from npucc import scalar
from npucc.graph import Graph, Node
from npucc.ops import OPS, Reduce, Table
from npucc.quantize.ranges import Range

POINTS = 257  # at which a function's range is looked up
ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": max, "min": min}
LARGEST = 1e30  # beyond, a bound is that of a mask and says nothing


def known_ranges(graph: Graph, observed: Mapping[str, Range]) -> dict[str, Range]:
    """Per tensor that depends on integer inputs only, the range that their ranges imply. `observed`: what was seen of the inputs."""
    known = {name: observed[name] for name in graph.inputs if name in observed and np.dtype(graph.tensors[name].dtype).kind in "iu"}
    for node in graph:
        found = _range_of(graph, node, known)
        if found is not None:
            known[node.outputs[0]] = found
    return {name: each for name, each in known.items() if name not in graph.inputs and max(-each.low, each.high) < LARGEST}


def _range_of(graph: Graph, node: Node, known: Mapping[str, Range]) -> Range | None:
    source = known.get(node.inputs[0]) if node.inputs else None
    if node.op in ARITHMETIC:
        return _of_two(node.op, *(known.get(name) or _constant(graph, name) for name in node.inputs))
    if source is None:
        return None
    if isinstance(node.attributes, Table):
        return _through(node.attributes.expression, source)
    if node.op == "reduce_sum" and isinstance(node.attributes, Reduce):
        count = math.prod(graph.tensors[node.inputs[0]].shape[axis] for axis in node.attributes.axes)
        return Range(source.low * count, source.high * count)
    if OPS[node.op].moves_data and len(node.inputs) == 1 and not getattr(node.attributes, "value", 0.0):
        return source
    return None


def _constant(graph: Graph, name: str) -> Range | None:
    data = graph.tensors[name].data
    return None if data is None or not np.isfinite(data).all() else Range(min(0.0, float(data.min())), max(0.0, float(data.max())))


def _of_two(op: str, first: Range | None, second: Range | None) -> Range | None:
    """What an operation makes of two ranges."""
    if first is None or second is None:
        return None
    ends = [ARITHMETIC[op](a, b) for a in (first.low, first.high) for b in (second.low, second.high)]
    return Range(min(0.0, *ends), max(0.0, *ends))


def _through(expression: scalar.Expression, source: Range) -> Range | None:
    """What a function makes of a range, looked up at evenly spaced points; None where that is not finite."""
    values = scalar.evaluate(expression, np.linspace(source.low, source.high, POINTS, dtype=np.float32))
    values = np.broadcast_to(np.asarray(values, np.float64), (POINTS,))
    if not np.isfinite(values).all():
        return None
    return Range(min(0.0, float(values.min())), max(0.0, float(values.max())))
