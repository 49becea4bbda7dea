"""The rewrite engine: rules tried on one node after another, changes applied where they match.

The one big idea: a rule looks at a node and returns a value: nothing (not its business), a reason (a near-miss), or what stands in the node's
place. The engine makes the change, drops what became dead and looks again at the neighbours only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from npucc.graph import Editor, Graph, Node, Tensor
from npucc.ops import OPS, Attributes, Reshape, Transpose

MOST_STEPS = 100  # rewrites per node; more means that two rules undo each other


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rule whose root matched, but not its conditions."""

    rule: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.node!r}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Nodes (and new tensors between them) that take the place of the matched node and make its output."""

    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Alias:
    """The matched node's result equals `source`: its readers read that."""

    source: str


Result: TypeAlias = Rewrite | Alias | str | None


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply(editor, node)` is called for nodes of the operators `roots`. It reads the editor and may add constants to it, nothing else."""

    name: str
    roots: frozenset[str]
    apply: Callable[[Editor, Node], Result]
    why: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline: valid graph in, valid graph out."""

    name: str
    run: Callable[[Graph], tuple[Graph, tuple[Refusal, ...]]]
    why: str


def stage(name: str, rules: Sequence[Rule], why: str, *, report: bool = True) -> Stage:
    """A stage that applies these rules until none matches; where several match, the first one listed wins.

    Without `report` refusals are dropped, because a later stage tries the same rules again.
    """

    def run(graph: Graph) -> tuple[Graph, tuple[Refusal, ...]]:
        result, refusals = rewrite_graph(graph, rules)
        return result, refusals if report else ()

    return Stage(name, run, why)


def rewrite_graph(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, tuple[Refusal, ...]]:
    """The rewritten graph, and the refusals at nodes that are still there."""
    engine = _Engine(graph, rules)
    engine.run()
    result = engine.editor.freeze()
    return result, tuple(refusal for (_, node), refusal in engine.refusals.items() if node in result.nodes)


class _Engine:
    """A worklist of node names over one editor."""

    def __init__(self, graph: Graph, rules: Sequence[Rule]) -> None:
        self.editor = Editor(graph)
        self.by_root: dict[str, list[Rule]] = {}
        for rule in rules:
            for root in rule.roots:
                self.by_root.setdefault(root, []).append(rule)
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.queue: deque[str] = deque(graph.nodes)
        self.queued = set(graph.nodes)
        self.steps_left = MOST_STEPS * (len(graph.nodes) + 1)

    def run(self) -> None:
        while self.queue:
            name = self.queue.popleft()
            self.queued.discard(name)
            node = self.editor.nodes.get(name)
            if node is not None:
                self._visit(node)

    def _visit(self, node: Node) -> None:
        for rule in self.by_root.get(node.op, ()):
            self.refusals.pop((rule.name, node.name), None)
            result = rule.apply(self.editor, node)
            if isinstance(result, str):
                self.refusals[(rule.name, node.name)] = Refusal(rule.name, node.name, result)
            elif result is not None and self._change(rule, node, result):
                return

    def _change(self, rule: Rule, node: Node, result: Rewrite | Alias) -> bool:
        """Apply a result; False if it could not be (an alias between graph inputs and outputs)."""
        self.steps_left -= 1
        assert self.steps_left > 0, f"rule {rule.name} does not come to an end at {node.name}"
        if isinstance(result, Alias):
            return self._alias(node, result.source)
        for tensor in result.tensors:
            self.editor.add_tensor(tensor)
        self._remove(node)
        for new in result.nodes:
            self.editor.add_node(new, at=node.name)
            self._touch(new)
        self._drop_unread(node.inputs)
        return True

    def _alias(self, node: Node, source: str) -> bool:
        (output,) = node.outputs
        producer = self.editor.producer(source)
        if output in self.editor.outputs:
            if producer is None or source in self.editor.outputs:
                return False
            self._remove(node)
            kept = replace(producer, outputs=tuple(output if name == source else name for name in producer.outputs))
            self.editor.add_node(kept)
            self.editor.replace_input(source, output)
            self._touch(kept)
            return True
        readers = self.editor.readers(output)
        self._remove(node)
        self.editor.replace_input(output, source)
        for reader in readers:
            self._enqueue(reader.name)
        self._drop_unread(node.inputs)
        if producer is not None:
            self._enqueue(producer.name)
        return True

    def _remove(self, node: Node) -> None:
        if node.name in self.editor.nodes:
            self.editor.remove_node(node.name)

    def _drop_unread(self, tensors: Sequence[str]) -> None:
        """Remove producers that nothing reads any more, upwards; look again at those that lost a reader."""
        waiting = list(tensors)
        while waiting:
            producer = self.editor.producer(waiting.pop())
            if producer is None:
                continue
            if any(self.editor.readers(output) or output in self.editor.outputs for output in producer.outputs):
                self._touch(producer)
            else:
                self.editor.remove_node(producer.name)
                waiting.extend(producer.inputs)

    def _touch(self, node: Node) -> None:
        """Look again at a node, its producers and its readers."""
        self._enqueue(node.name)
        for tensor in node.inputs:
            producer = self.editor.producer(tensor)
            if producer is not None:
                self._enqueue(producer.name)
        for tensor in node.outputs:
            for reader in self.editor.readers(tensor):
                self._enqueue(reader.name)

    def _enqueue(self, name: str) -> None:
        if name not in self.queued:
            self.queued.add(name)
            self.queue.append(name)


def merged_sources(*nodes: Node) -> tuple[str, ...]:
    """The ONNX nodes behind all of these, each once."""
    return tuple(dict.fromkeys(source for node in nodes for source in node.sources))


class Replacement:
    """Builds a Rewrite of several nodes: shapes come from the operators' records, names are new, the last node gets the matched one's."""

    def __init__(self, editor: Editor, node: Node, matched: Sequence[Node] = ()) -> None:
        self._editor, self._node = editor, node
        self._sources = merged_sources(*reversed(matched), node)
        self._nodes: list[Node] = []
        self._tensors: dict[str, Tensor] = {}

    def shape(self, tensor: str) -> tuple[int, ...]:
        return (self._tensors.get(tensor) or self._editor.tensors[tensor]).shape

    def add(self, op: str, inputs: tuple[str, ...], attributes: Attributes, *, dtype: str = "float32") -> str:
        """A new node; its output's name."""
        shape = OPS[op].shape(attributes, [self.shape(name) if name else None for name in inputs])
        assert shape is not None
        tensor = Tensor(self._fresh(f"{self._node.outputs[0]}/{op}", self._tensors), shape, dtype)
        self._tensors[tensor.name] = tensor
        name = self._fresh(f"{self._node.name}/{op}", {node.name for node in self._nodes})
        self._nodes.append(Node(name, op, inputs, (tensor.name,), attributes, self._sources))
        return tensor.name

    def _fresh(self, stem: str, local: Container[str]) -> str:
        name, number = self._editor.fresh(stem), 1
        while name in local:
            number += 1
            name = self._editor.fresh(f"{stem}{number}")
        return name

    def reshape(self, tensor: str, shape: tuple[int, ...]) -> str:
        return tensor if shape == self.shape(tensor) else self.add("reshape", (tensor,), Reshape(shape))

    def transpose(self, tensor: str, permutation: tuple[int, ...]) -> str:
        return tensor if permutation == tuple(range(len(permutation))) else self.add("transpose", (tensor,), Transpose(permutation))

    def done(self, result: str, *, name: str = "") -> Rewrite:
        """The rewrite; `result`, made by the last node added, becomes the matched node's output. The last node takes its name too, or `name`."""
        last = self._nodes[-1]
        assert last.outputs == (result,)
        del self._tensors[result]
        final = replace(last, name=name or self._node.name, outputs=self._node.outputs)
        return Rewrite((*self._nodes[:-1], final), tuple(self._tensors.values()))
