"""Which activations are stored in 16 bits.

The one big idea: 16 bits are nearly free where the vector engine reads a tensor, and double the price of a matrix product. So what adds up
over a whole network (the residual stream into a layer normalization, attention scores, recurrent state) keeps 16 bits, and matrix
operators read a copy of it in 8. Powers under a root and faint probabilities keep 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from npucc import arithmetic, scalar
from npucc.graph import Editor, Graph, Node
from npucc.operations import node_macs
from npucc.ops import OPS, Table
from npucc.quantize.calibrate import Calibration
from npucc.quantize.ranges import STEPS, Histogram, least_error_range, merged
from npucc.quantize.share import Groups

Operand = tuple[str, str]  # (matrix operator, tensor that it reads)


@dataclass(frozen=True, slots=True)
class Widened:
    """The graph with its 8-bit copies, the roots of the groups that get 16 and those that get 32 bits, and the calibration with the copies in it.

    `copies`: of each copy, the tensor that it is one of.
    """

    graph: Graph
    wide: frozenset[str]
    long: frozenset[str]
    calibration: Calibration
    copies: Mapping[str, str]


def widen(graph: Graph, groups: Groups, calibration: Calibration, *, direct: Set[Operand]) -> Widened:
    """Store in 16 bits what the rules say and put 8-bit copies before the matrix operators that read it. `groups` gains the copies.

    `direct`: what is read in 16 bits itself.
    """
    faint = faint_outputs(graph, groups, calibration, STEPS)
    wide = wide_roots(graph, groups, outputs=faint)
    copies: dict[str, str] = {}
    first_copies: dict[tuple[str, ...], str] = {}  # of what is repeated
    editor = Editor(graph)
    for node in graph:
        for name in dict.fromkeys(_matrix_operands(graph, node)):
            if groups.root(name) not in wide or (node.name, name) in direct:
                continue
            if name not in copies:
                copies[name] = _copy(editor, groups, node, name)
                groups.join(first_copies.setdefault(groups.repeats.get(name, (name,)), copies[name]), copies[name])
            current = editor.nodes[node.name]
            editor.add_node(replace(current, inputs=tuple(copies[name] if each == name else each for each in current.inputs)))
    long = _powers(graph, groups, wide) | _faint_functions(graph, groups, wide, calibration)
    wide |= {groups.root(name) for _, name in direct}
    originals = {copy: name for name, copy in copies.items()}
    return Widened(editor.freeze(), frozenset(wide), frozenset(long), _with_copies(calibration, groups, copies), originals)


def wide_roots(graph: Graph, groups: Groups, *, outputs: Collection[str] = ()) -> set[str]:
    """The roots of the groups that keep 16 bits. `outputs`: those of the graph that do even where nothing else does."""
    members: dict[str, list[str]] = {}
    for name in graph.tensors:
        members.setdefault(groups.root(name), []).append(name)
    chosen: set[str] = set()
    for name, follow in _starts(graph):
        _mark(graph, groups, members, name, follow, chosen)
    for name in graph.outputs if chosen else outputs:
        _mark(graph, groups, members, name, SCORES | MEANS, chosen)
    return {root for root in chosen if not any(_is_fixed(graph, name) for name in members[root]) and not _is_softmax(graph, members[root])}


WIDE_STEPS = 65535
SMALL_OUTPUT = 1e-4  # elements for each multiply-accumulate of the network, at most
BULK = 0.99  # of the values
SMALLEST_BULK = 28.0  # dB; an even distribution without outliers has 45 and more, a normal one about 38
SUMS = frozenset({"add", "sub"})
PRODUCTS = frozenset({"add", "mul"})
MEANS = frozenset({"reduce_sum", "reduce_mean", "mul", "table"})
SCORES = frozenset({"add", "sub", "mul", "div", "where", "max", "min", "table"})


def _starts(graph: Graph) -> Iterator[tuple[str, frozenset[str]]]:
    """(tensor, operators through which what it is made of is followed) of everything that keeps 16 bits by itself."""
    for node in graph:
        if node.op == "layer_norm":
            yield node.inputs[0], SUMS
        elif node.op == "softmax" and _feeds_product(graph, node.outputs[0]):
            yield node.inputs[0], SCORES
        elif node.op == "div" and not any(graph.tensors[name].is_constant for name in node.inputs):
            yield node.inputs[0], MEANS
            yield node.inputs[1], MEANS
        elif isinstance(node.attributes, Table) and scalar.is_steep_at_zero(node.attributes.expression):
            yield node.inputs[0], SCORES | MEANS
    for name, tensor in graph.tensors.items():
        if tensor.wide:
            yield name, PRODUCTS


def _powers(graph: Graph, groups: Groups, wide: set[str]) -> set[str]:
    """Among the wide groups, those between squares and the root of their sum: 32 bits, as a square needs twice the bits of its root."""
    found: set[str] = set()
    for node in graph:
        if isinstance(node.attributes, Table) and arithmetic.DIRECT.get(node.attributes.expression) == "sqrt":
            chain = _chain(graph, groups, groups.root(node.inputs[0]), _summed_powers, _keeps_power)
            hidden = not any(name in graph.outputs for root in chain for name in groups.members(root))
            found |= chain if chain <= wide and hidden else set()
    return found


def _chain(
    graph: Graph, groups: Groups, start: str, made_of: Callable[[Graph, Node], list[str] | None], may_read: Callable[[Node], bool]
) -> set[str]:
    """The groups from `start` back through the operands that `made_of` names; empty where it refuses (None) what makes a member, or `may_read`
    what reads one."""
    chain: set[str] = set()
    waiting = [start]
    while waiting:
        root = waiting.pop()
        if root in chain:
            continue
        chain.add(root)
        for name in groups.members(root):
            producer = graph.producer(name)
            operands = None if producer is None else made_of(graph, producer)
            if operands is None or not all(map(may_read, graph.users(name))):
                return set()
            waiting += map(groups.root, operands)
    return chain


def _summed_powers(graph: Graph, node: Node) -> list[str] | None:
    """The operands of a sum of squares; none of a square itself."""
    if node.op == "add" and not any(graph.tensors[each].is_constant for each in node.inputs):
        return list(node.inputs)
    return [] if node.op in MOVES_LONG or (isinstance(node.attributes, Table) and _is_direct(node, "mul")) else None


MOVES_LONG = frozenset({"reshape", "transpose", "slice", "concat", "expand"})  # what moves data in 32 bits


def _keeps_power(node: Node) -> bool:
    return node.op in MOVES_LONG or node.op == "add" or (isinstance(node.attributes, Table) and _is_direct(node, "sqrt"))


def faint_outputs(graph: Graph, groups: Groups, calibration: Calibration, steps: int) -> list[str]:
    """Small outputs whose faint samples would be lost in so many steps, as small probabilities are."""
    few = max(1.0, SMALL_OUTPUT * sum(node_macs(graph, node) for node in graph))
    small = [name for name in graph.outputs if calibration.loudness.get(name) and math.prod(graph.tensors[name].shape) <= few]
    seen = {name: histogram for name in small if (histogram := group_histogram(calibration, groups, name)).observed.width}
    return [name for name, histogram in seen.items() if _quiet_ratio(histogram, calibration.loudness[name], steps) < SMALLEST_BULK]


def _faint_functions(graph: Graph, groups: Groups, wide: set[str], calibration: Calibration) -> set[str]:
    """Among the wide groups, functions (and what is chosen among their results) that are outputs too faint for 16 bits: 32 bits."""
    names = faint_outputs(graph, groups, calibration, WIDE_STEPS)
    chains = (_chain(graph, groups, groups.root(name), _chosen_functions, _only_chooses) for name in names)
    return {root for chain in chains if chain <= wide for root in chain}


def _chosen_functions(graph: Graph, node: Node) -> list[str] | None:
    """What a choice is made among; nothing for a function."""
    if node.op == "where":
        return [name for name in node.inputs[1:] if not graph.tensors[name].is_constant]
    return [] if node.op in MOVES_LONG or (isinstance(node.attributes, Table) and not _is_direct(node, "sqrt")) else None


def _only_chooses(node: Node) -> bool:
    return node.op in MOVES_LONG or node.op in ("compare", "where")


def _is_direct(node: Node, instruction: str) -> bool:
    return arithmetic.DIRECT.get(node.attributes.expression) == instruction  # type: ignore[attr-defined]


def uneven_operands(graph: Graph, groups: Groups, calibration: Calibration) -> set[Operand]:
    """Where outliers leave too little of 8 bits for the other values, beside what is stored in 16 bits by rule: for use without a measurement.

    Looked for where weights are multiplied in a matmul, behind roots, and in inputs of which some samples are faint. Attention's
    products of activations stay in 8 bits.
    """
    found: set[Operand] = set()
    if not wide_roots(graph, groups):
        return found
    for node in graph:
        name = node.inputs[0] if node.inputs else ""
        if not OPS[node.op].matrix or graph.tensors[name].is_constant or not graph.tensors[node.inputs[1]].is_constant:
            continue
        members = groups.members(name)
        if _is_softmax(graph, members) or any(_is_fixed(graph, each) for each in members):
            continue
        histogram = group_histogram(calibration, groups, name)
        uneven = _behind_root(graph, members) or (node.op == "matmul" and _bulk_ratio(histogram) < SMALLEST_BULK)
        if uneven or any(_quiet_ratio(histogram, calibration.loudness.get(each, [])) < SMALLEST_BULK for each in members):
            found.add((node.name, name))
    return found


def _quiet_ratio(histogram: Histogram, loudness: Sequence[float], steps: int = STEPS) -> float:
    """Energy of faint samples (a tenth is fainter) over that of rounding to so many steps, in dB."""
    heard = sorted(value for value in loudness if value > 0)
    if not heard:
        return np.inf
    step = least_error_range(histogram).width / steps
    return 10 * float(np.log10(heard[len(heard) // 10] ** 2 / max(step * step / 12, 1e-30)))


def _behind_root(graph: Graph, names: list[str]) -> bool:
    producers = [node for node in map(graph.producer, names) if node]
    return any(isinstance(node.attributes, Table) and scalar.is_steep_at_zero(node.attributes.expression) for node in producers)


def _bulk_ratio(histogram: Histogram) -> float:
    """Energy of all values but the largest hundredth over that of 8-bit rounding on the scale that holds nearly all, in dB."""
    centres, counts = histogram.values()
    if not counts.size or not histogram.observed.width:
        return np.inf
    order = np.argsort(np.abs(centres), kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(counts[order]), BULK * counts.sum())) + 1]
    energy = float(np.dot(centres[kept] ** 2, counts[kept]) / counts[kept].sum())
    step = least_error_range(histogram).width / STEPS
    return 10 * float(np.log10(max(energy, 1e-30) / max(step * step / 12, 1e-30)))


def _feeds_product(graph: Graph, name: str, depth: int = 8) -> bool:
    """Whether a product of two activations reads the tensor, moved or not: then a softmax is attention, and no classifier's last layer."""
    for user in graph.users(name):
        if user.op == "matmul" and not any(graph.tensors[each].is_constant for each in user.inputs[:2]):
            return True
        if depth and (OPS[user.op].moves_data or user.op == "where") and _feeds_product(graph, user.outputs[0], depth - 1):
            return True
    return False


def _mark(graph: Graph, groups: Groups, members: Mapping[str, list[str]], name: str, follow: frozenset[str], chosen: set[str]) -> None:
    """Mark the tensor's group, and back through the given operators the groups of their operands."""
    waiting, seen = [groups.root(name)], set()
    while waiting:
        root = waiting.pop()
        if root in seen:
            continue
        seen.add(root)
        chosen.add(root)
        for producer in filter(None, map(graph.producer, members[root])):
            if producer.op in follow:
                computed = (each for each in producer.inputs if not graph.tensors[each].is_constant and graph.tensors[each].dtype != "bool")
                waiting += map(groups.root, computed)


def _is_fixed(graph: Graph, name: str) -> bool:
    """Whole numbers, and what the model has quantized itself."""
    return np.dtype(graph.tensors[name].dtype).kind in "iub" or graph.tensors[name].given is not None


def _is_softmax(graph: Graph, names: list[str]) -> bool:
    """Probabilities have a scale of their own and need no more than 8 bits."""
    return any(node.op == "softmax" for node in map(graph.producer, names) if node)


def _matrix_operands(graph: Graph, node: Node) -> list[str]:
    return [name for name in node.inputs[:2] if not graph.tensors[name].is_constant] if OPS[node.op].matrix else []


def _copy(editor: Editor, groups: Groups, reader: Node, name: str) -> str:
    copy = editor.fresh(f"{name}/s8")
    editor.add_tensor(replace(editor.tensors[name], name=copy, source="", wide=False))
    editor.add_node(Node(editor.fresh(f"{copy}:table"), "table", (name,), (copy,), Table("x"), reader.sources), at=reader.name)
    groups.root(copy)
    return copy


def _with_copies(calibration: Calibration, groups: Groups, copies: Mapping[str, str]) -> Calibration:
    """The copies take the values that their originals were seen with."""
    histograms, means = dict(calibration.histograms), dict(calibration.means)
    for name, copy in copies.items():
        histograms[copy] = group_histogram(calibration, groups, name)
        means |= {(copy, axis): values for (original, axis), values in calibration.means.items() if original == name}
    return replace(calibration, histograms=histograms, means=means)


def group_histogram(calibration: Calibration, groups: Groups, name: str) -> Histogram:
    """Of the tensor itself, else of all its group."""
    for known in (calibration.histograms, calibration.operands):
        if name in known:
            return known[name]
    return merged(calibration.histograms[member] for member in groups.members(name) if member in calibration.histograms)
