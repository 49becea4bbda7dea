"""Control flow written out: an If as both branches and a choice, a Loop as its steps.

The one big idea: a subgraph becomes nodes of the outer graph, in which its inputs and own tensors have got other names. Which steps a loop takes is
found while they are taken: its condition must then be a constant. The nodes are made one by one, as those before them are imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from onnx import GraphProto, NodeProto, helper

from npucc.errors import ImportModelError
from npucc.frontend.constants import Constants
from npucc.frontend.functions import rename
from npucc.frontend.prepare import captured

MOST_STEPS = 1024
#: control flow that comes down to the NPU
WRITTEN_OUT = {
    "If": "constant condition: its branch; else both branches, with results of the same shapes",
    "Loop": f"written out step by step, up to {MOST_STEPS}; trip count and condition are known when the model is compiled",
}


def branch(node: NodeProto, name: str, constants: Constants) -> tuple[list[NodeProto], list[str]]:
    """The nodes of a branch of an If, and the names of its results."""
    return _inlined(_subgraph(node, name), f"{node.name}/{name}/", {}, constants)


def chosen(node: NodeProto, results: Sequence[str]) -> list[NodeProto]:
    """Nodes that give an If the results of one branch."""
    pairs = zip(node.output, results, strict=True)
    return [helper.make_node("Identity", [result], [output], name=f"{node.name}/{output}") for output, result in pairs]


def both(node: NodeProto, results: Sequence[Sequence[str]], constants: Constants) -> list[NodeProto]:
    """Nodes that give an If the results of its first branch where its condition holds, else those of the second."""
    condition = f"{node.name}/condition"
    constants.set(f"{condition}/shape", np.zeros(0, np.int64))  # it may be [1], which must not add a dimension to the results
    nodes = [helper.make_node("Reshape", [node.input[0], f"{condition}/shape"], [condition], name=condition)]
    for output, then, other in zip(node.output, *results, strict=True):
        nodes.append(helper.make_node("Where", [condition, then, other], [output], name=f"{node.name}/{output}"))
    return nodes


def steps(node: NodeProto, constants: Constants) -> Iterator[NodeProto]:
    """The nodes of all steps of a Loop. Raises ImportModelError where their number depends on data, is none, or is too large."""
    body = _subgraph(node, "body")
    if node.input[0] and node.input[0] not in constants:
        raise ImportModelError("Loop: how often it runs depends on data", node=node.name)
    most = int(constants.value(node.input[0])) if node.input[0] else None
    condition, state, series = node.input[1], list(node.input[2:]), []
    count = 0
    while most is None or count < most:
        if condition and condition not in constants:
            raise ImportModelError("Loop: how often it runs depends on data", node=node.name)
        if condition and not np.all(constants.value(condition)):
            break
        if count == MOST_STEPS:
            raise ImportModelError(f"Loop: it has more than {MOST_STEPS} steps", node=node.name)
        prefix = f"{node.name}/{count}/"
        for name, value in ((f"{prefix}number", np.int64(count)), (f"{prefix}condition", np.bool_(True))):
            constants.set(name, np.asarray(value))
        bound = dict(zip((value.name for value in body.input), (f"{prefix}number", f"{prefix}condition", *state), strict=True))
        nodes, results = _inlined(body, prefix, bound, constants)
        yield from nodes
        condition, state = results[0], results[1 : 1 + len(state)]
        series.append(results[1 + len(state) :])
        count += 1
    yield from _results(node, state, series, constants)


def _results(node: NodeProto, state: Sequence[str], series: Sequence[Sequence[str]], constants: Constants) -> Iterator[NodeProto]:
    """A Loop's results: the last state, and what each step adds to the series."""
    outputs = list(node.output)
    for output, name in zip(outputs, state, strict=False):
        if output:
            yield helper.make_node("Identity", [name], [output], name=f"{node.name}/{output}")
    for output, parts in zip(outputs[len(state) :], zip(*series, strict=True), strict=False):
        if not output:
            continue
        axes = f"{node.name}/{output}/axes"
        constants.set(axes, np.zeros(1, np.int64))
        rows = [f"{node.name}/{output}/{index}" for index in range(len(parts))]
        for row, part in zip(rows, parts, strict=True):
            yield helper.make_node("Unsqueeze", [part, axes], [row], name=row)
        yield helper.make_node("Concat", rows, [output], axis=0, name=f"{node.name}/{output}")


def _subgraph(node: NodeProto, name: str) -> GraphProto:
    graph: GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == name)
    return graph


def _inlined(graph: GraphProto, prefix: str, bound: Mapping[str, str], constants: Constants) -> tuple[list[NodeProto], list[str]]:
    """A subgraph's nodes and the names of its results, with `bound` for its inputs and the prefix before its own tensors; stores its constants."""
    outer = captured(graph)

    def called(name: str) -> str:
        return bound[name] if name in bound else name if name in outer or not name else prefix + name

    for tensor in graph.initializer:
        stored = type(tensor)()
        stored.CopyFrom(tensor)
        stored.name = called(tensor.name)
        constants.store([stored])
    nodes = []
    for number, inner in enumerate(graph.node):
        copy = NodeProto()
        copy.CopyFrom(inner)
        copy.name = copy.name or f"{number}:{inner.op_type}"
        rename(copy, called, prefix)
        nodes.append(copy)
    return nodes, [called(value.name) for value in graph.output]
