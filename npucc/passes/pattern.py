"""Patterns over the graph: a small language to say what a written-out operation looks like.

The one big idea: a pattern is a value that describes how a tensor was made. `find` tries it at a tensor, binding names to tensors, numbers and nodes;
a name that occurs twice must be the same tensor both times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from npucc import ops, scalar
from npucc.graph import Editor, Node

COMMUTATIVE = frozenset({"add", "mul", "max", "min"})


@dataclass(frozen=True, slots=True)
class Found:
    """What a pattern bound: tensor names, numbers that functions yielded, and nodes, by the pattern's names; and all nodes it covers."""

    tensors: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    covered: tuple[Node, ...] = ()

    def covering(self, node: Node) -> Found:
        return Found(self.tensors, self.numbers, self.nodes, (*self.covered, node))

    def with_node(self, name: str, node: Node) -> Found:
        return Found(self.tensors, self.numbers, {**self.nodes, name: node}, self.covered) if name else self


@dataclass(frozen=True, slots=True)
class Anything:
    """Any tensor, bound to `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """Any constant, bound to `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Op:
    """The result of an operator with these inputs (in either order where that does not matter); the node is bound to `name`."""

    op: str
    inputs: tuple[Pattern, ...]
    name: str = ""
    clamp_allowed: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """A table whose expression `test` accepts (it yields a number, bound to `name`, or None)."""

    test: Callable[[scalar.Expression], float | None]
    input: Pattern
    name: str = ""


@dataclass(frozen=True, slots=True)
class Either:
    """The first of several patterns that fits."""

    choices: tuple[Pattern, ...]


Pattern: TypeAlias = Anything | Constant | Op | Function | Either


def op(name: str, *inputs: Pattern, bind: str = "", clamp_allowed: tuple[float, float] | None = None) -> Op:
    """An `Op` pattern, written like a call."""
    return Op(name, inputs, bind, clamp_allowed)


def either(*choices: Pattern) -> Either:
    """An `Either` pattern, written like a call."""
    return Either(choices)


def find(editor: Editor, node: Node, pattern: Pattern) -> Found | None:
    """The first way in which the node's result fits the pattern."""
    return next(_matches(editor, node.outputs[0], pattern, Found()), None)


def _matches(editor: Editor, tensor: str, pattern: Pattern, found: Found) -> Iterator[Found]:
    if isinstance(pattern, Either):
        for choice in pattern.choices:
            yield from _matches(editor, tensor, choice, found)
    elif isinstance(pattern, Anything | Constant):
        known = found.tensors.get(pattern.name, tensor)
        if known == tensor and (isinstance(pattern, Anything) or editor.tensors[tensor].is_constant):
            yield Found({**found.tensors, pattern.name: tensor}, found.numbers, found.nodes, found.covered)
    else:
        node = editor.producer(tensor)
        if node is not None:
            yield from _function(editor, node, pattern, found) if isinstance(pattern, Function) else _operator(editor, node, pattern, found)


def _function(editor: Editor, node: Node, pattern: Function, found: Found) -> Iterator[Found]:
    if not isinstance(node.attributes, ops.Table):
        return
    number = pattern.test(node.attributes.expression)
    if number is None or (pattern.name and found.numbers.get(pattern.name, number) != number):
        return
    numbers = {**found.numbers, pattern.name: number} if pattern.name else found.numbers
    yield from _matches(editor, node.inputs[0], pattern.input, Found(found.tensors, numbers, found.nodes, found.covered).covering(node))


def _operator(editor: Editor, node: Node, pattern: Op, found: Found) -> Iterator[Found]:
    attributes: Any = node.attributes
    clamp = getattr(attributes, "clamp", None)
    if node.op != pattern.op or len(node.inputs) != len(pattern.inputs) or (clamp is not None and clamp != pattern.clamp_allowed):
        return
    orders = (node.inputs, node.inputs[::-1]) if node.op in COMMUTATIVE else (node.inputs,)
    for inputs in orders:
        yield from _all(editor, inputs, pattern.inputs, found.covering(node).with_node(pattern.name, node))


def _all(editor: Editor, tensors: tuple[str, ...], patterns: tuple[Pattern, ...], found: Found) -> Iterator[Found]:
    """Every way in which all tensors fit their patterns."""
    if not tensors:
        yield found
        return
    for first in _matches(editor, tensors[0], patterns[0], found):
        yield from _all(editor, tensors[1:], patterns[1:], first)
