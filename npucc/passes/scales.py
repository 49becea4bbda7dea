"""The rounding of an already quantized model: from `quantize` nodes to scales that stand on the tensors.

The one big idea: until the end, `quantize` is an operation like any other, so that no rule joins what the model rounds in between. What rounds
again what is rounded already goes; what is left sets the scale of the tensor it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc import ops, scalar
from npucc.arithmetic import RANGES
from npucc.graph import Editor, Given, Graph, Node, Tensor, as_quant
from npucc.passes.pattern import Anything, Constant, Function, Pattern, find, op
from npucc.passes.rewrite import Alias, Refusal, Replacement, Result, Rewrite, Rule, Stage, merged_sources, rewrite_graph
from npucc.passes.values import ARITHMETIC

MATRIX = tuple(name for name, record in ops.OPS.items() if record.matrix)
DEEPEST_MOVE = 16  # nodes that are followed upwards


def rounded_already(editor: Editor, node: Node) -> Result:
    """y = quantize(x); z = quantize(reshape(y)) with the same steps  →  z = reshape(y)   (whatever only moves data, Concat too)"""
    assert isinstance(node.attributes, ops.Quantize)
    return Alias(node.inputs[0]) if _has_steps(editor, node.inputs[0], node.attributes, DEEPEST_MOVE) else None


def _has_steps(editor: Editor, tensor: str, steps: ops.Quantize, depth: int) -> bool:
    """Whether all values of a tensor lie on these steps."""
    producer, given = editor.producer(tensor), editor.tensors[tensor].given
    if producer is None:
        quant = given.quant if given else None
        return quant is not None and quant.key == as_quant(steps).key
    if producer.op == "quantize":
        return producer.attributes == steps
    if depth == 0 or not ops.OPS[producer.op].moves_data or not _keeps_values(producer):
        return False
    values = [name for index, name in enumerate(producer.inputs) if index not in ops.OPS[producer.op].indices]
    return all(_has_steps(editor, name, steps, depth - 1) for name in values)


def _keeps_values(node: Node) -> bool:
    a = node.attributes
    return not (isinstance(a, ops.Pad) and a.mode == "constant" and a.value != 0)


def round_before_move(editor: Editor, node: Node) -> Result:
    """z = quantize(reshape(x))  →  z = reshape(quantize(x)), if nothing else reads the reshape; transpose alike"""
    move = editor.producer(node.inputs[0])
    if move is None or move.op not in ("reshape", "transpose") or not editor.is_read_once(node.inputs[0]):
        return None
    inner = Tensor(editor.fresh(f"{node.outputs[0]}/{move.op}"), editor.tensors[move.inputs[0]].shape)
    return Rewrite((replace(node, inputs=move.inputs, outputs=(inner.name,)), replace(move, inputs=(inner.name,), outputs=node.outputs)), (inner,))


def clip_before_rounding(editor: Editor, node: Node) -> Result:
    """y = quantize(conv(x)); z = quantize(clip(y)) with the same steps  →  z = quantize(conv(x) clamp=…)"""
    clip = editor.producer(node.inputs[0])
    limits = scalar.is_clip(clip.attributes.expression) if clip is not None and isinstance(clip.attributes, ops.Table) else None
    if clip is None or limits is None or not editor.is_read_once(node.inputs[0]):
        return None
    inner = editor.producer(clip.inputs[0])
    if inner is None or (inner.op, inner.attributes) != ("quantize", node.attributes) or not editor.is_read_once(clip.inputs[0]):
        return None
    producer = editor.producer(inner.inputs[0])
    if producer is None or producer.op not in (*MATRIX, *ARITHMETIC) or not editor.is_read_once(inner.inputs[0]):
        return None
    attributes: Any = producer.attributes
    low, high = attributes.clamp or (-np.inf, np.inf)
    clamp = tuple(min(max(float(limit), limits[0]), limits[1]) for limit in (low, high))
    sources = merged_sources(inner, clip, node)
    return Rewrite((replace(producer, attributes=replace(attributes, clamp=clamp)), replace(node, inputs=inner.inputs, sources=sources)))


LIMITS = tuple(float(np.float32(limit)) for limit in RANGES["s32"])  # of int32, as float32 holds them


def _is_long_clip(expression: scalar.Expression) -> float | None:
    return 0.0 if scalar.is_clip(expression) == LIMITS else None


def _is_rounding(expression: scalar.Expression) -> float | None:
    return 0.0 if expression == ("round", "x") else None


_ROUNDED = Function(_is_rounding, op("div", Anything("x"), Constant("scale")))
LONG_STEPS: Pattern = op("mul", Function(_is_long_clip, _ROUNDED), Constant("factor"))


def rounded_to_32_bits(editor: Editor, node: Node) -> Result:
    """clip(round(x / scale), −2^31, 2^31) · scale  →  quantize(x) to s32: what ONNX has no operator for"""
    found = find(editor, node, LONG_STEPS)
    if found is None:
        return None
    scale, factor = (editor.tensors[found.tensors[name]].data for name in ("scale", "factor"))
    if scale is None or factor is None or scale.size != 1 or not np.array_equal(scale.reshape(()), factor.reshape(-1)[0]) or factor.size != 1:
        return None
    steps = ops.Quantize("s32", float(scale.reshape(())), 0)
    return Rewrite((replace(node, op="quantize", inputs=(found.tensors["x"],), attributes=steps, sources=merged_sources(*found.covered)),))


ROUNDING_RULES: tuple[Rule, ...] = (
    Rule("rounded-to-32-bits", frozenset({"mul"}), rounded_to_32_bits, "a square needs twice the bits of its root"),
    Rule("rounded-already", frozenset({"quantize"}), rounded_already, "what lies on the steps of a scale stays as it is"),
    Rule("round-before-move", frozenset({"quantize"}), round_before_move, "the scale belongs to what computes the values"),
    Rule("clip-before-rounding", frozenset({"quantize"}), clip_before_rounding, "a clip costs nothing inside a convolution"),
)


def split_weights(editor: Editor, node: Node) -> Result:
    """conv(x, w) with integer weights of 9 bits (unsigned ones less their zero point)  →  conv(concat(x, x), concat(v, w − v)) of 8 bits each"""
    weights = editor.tensors[node.inputs[1]]
    if weights.given is None or weights.given.stored is None or weights.data is None or editor.tensors[node.inputs[0]].is_constant:
        return None
    steps = weights.given.stored.astype(np.int32) - weights.given.zero
    first = np.clip(steps, -128, 127)
    rest = steps - first
    if not rest.any() or np.abs(rest).max() > 127 or (node.op == "matmul" and steps.ndim != 2):
        return None
    groups = getattr(node.attributes, "groups", 1)
    axis = 1 if node.op == "conv" else 0
    stored = _beside(first, rest, axis, groups if axis == 0 else 1)
    scale = weights.given.scale
    if scale.size > 1:
        whole = np.broadcast_to(scale, steps.shape)
        scale = _beside(whole, whole, axis, groups if axis == 0 else 1)
    given = replace(weights.given, zero=0, scale=scale, stored=stored.astype(np.int8))
    halves = editor.constant(weights.name, np.asarray(stored * given.scale, np.float32), given)
    build = Replacement(editor, node)
    doubled = _twice(build, node.inputs[0], groups, is_matrix=node.op == "matmul")
    return build.done(build.add(node.op, (doubled, halves, *node.inputs[2:]), node.attributes))


def _beside(first: np.ndarray, rest: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """Both along an axis, within each group of channels."""
    shape = (*first.shape[:axis], groups, first.shape[axis] // groups, *first.shape[axis + 1 :])
    joined = np.concatenate([first.reshape(shape), rest.reshape(shape)], axis=axis + 1)
    return joined.reshape((*first.shape[:axis], 2 * first.shape[axis], *first.shape[axis + 1 :]))


def _twice(build: Replacement, tensor: str, groups: int, *, is_matrix: bool) -> str:
    """The tensor's channels, twice in each group; or the columns of a matrix."""
    shape = build.shape(tensor)
    if is_matrix:
        return build.add("concat", (tensor, tensor), ops.Concat(len(shape) - 1))
    if groups == 1:
        return build.add("concat", (tensor, tensor), ops.Concat(1))
    batch, channels, *size = shape
    grouped = build.reshape(tensor, (batch, groups, channels // groups, math.prod(size)))
    return build.reshape(build.add("concat", (grouped, grouped), ops.Concat(2)), (batch, 2 * channels, *size))


WEIGHT_RULES: tuple[Rule, ...] = (
    Rule("split-weights", frozenset(MATRIX), split_weights, "the matrix engine multiplies by 8 bits; unsigned weights less a zero point have 9"),
)


# ---- the stage


def _keep_integers(graph: Graph) -> tuple[Graph, tuple[Refusal, ...]]:
    split, _ = rewrite_graph(graph, WEIGHT_RULES)
    return give_scales(split)


def give_scales(graph: Graph) -> tuple[Graph, tuple[Refusal, ...]]:
    """The graph without `quantize` nodes: the tensor that one read has its scale, unless it has another already, from which it is rescaled."""
    work = _Giving(Editor(graph), [])
    for name in graph.inputs:
        _hold_all_steps(work.editor, graph, name)
    for node in graph:
        if isinstance(node.attributes, ops.Quantize):
            work.give(node, node.attributes)
    return work.editor.freeze(), tuple(work.refusals)


def _hold_all_steps(editor: Editor, graph: Graph, name: str) -> None:
    """An input of floats that the model rounds to several scales of 8 bits, moved before or not, has 16 that cover all of those."""
    source = editor.tensors[name]
    found = {as_quant(steps).key: as_quant(steps) for steps in _roundings(graph, name)}
    if source.dtype != "float32" or source.given is not None or len(found) < 2 or any(quant.dtype != "s8" for quant in found.values()):
        return
    reach = max(float(quant.scale) * max(abs(limit - quant.zero) for limit in RANGES["s8"]) for quant in found.values())
    scale = np.asarray(reach / RANGES["s16"][1], np.float32)
    editor.add_tensor(replace(source, given=Given("s16", scale, 0)))


def _roundings(graph: Graph, name: str) -> Iterator[ops.Quantize]:
    """How a tensor is rounded, by what reads it directly or after moving it."""
    for user in graph.users(name):
        if isinstance(user.attributes, ops.Quantize):
            yield user.attributes
        elif ops.OPS[user.op].moves_data and user.inputs[0] == name:
            yield from _roundings(graph, user.outputs[0])


@dataclass(slots=True)
class _Giving:
    editor: Editor
    refusals: list[Refusal]

    def give(self, node: Node, steps: ops.Quantize) -> None:
        node = self.editor.nodes[node.name]
        quant = as_quant(steps)
        given = Given(quant.dtype, quant.scale, quant.zero)
        (name,), (result,) = node.inputs, node.outputs
        source = self.editor.tensors[name]
        known = source.given.quant if source.given else None
        producer = self.editor.producer(name)
        if source.given is None and producer is not None and isinstance(producer.attributes, ops.Binary) and producer.op in ("add", "mul"):
            offset = steps.offset if quant.dtype == "s8" else producer.attributes.offset
            self.editor.add_node(replace(producer, attributes=replace(producer.attributes, offset=offset)))
        if source.given is None and not source.is_constant:
            self.editor.add_tensor(replace(source, given=given))
        elif known is None or known.key != quant.key:
            self.refusals.append(Refusal("give-scales", node.name, f"{name!r} has another scale already, so that this one rounds a second time"))
            self._rescale(node, given)
            return
        if result in self.editor.outputs:
            self._become(node, given)
        else:
            self.editor.remove_node(node.name)
            self.editor.replace_input(result, name)

    def _become(self, node: Node, given: Given) -> None:
        """The tensor takes the name of the output that it is; where it can't, a copy is made."""
        (name,), (result,) = node.inputs, node.outputs
        producer = self.editor.producer(name)
        if producer is None or name in self.editor.outputs:
            self._rescale(node, given)
            return
        self.editor.remove_node(node.name)
        self.editor.add_tensor(replace(self.editor.tensors[result], given=given))
        self.editor.add_node(replace(producer, outputs=tuple(result if each == name else each for each in producer.outputs)))
        self.editor.replace_input(name, result)

    def _rescale(self, node: Node, given: Given) -> None:
        self.editor.add_tensor(replace(self.editor.tensors[node.outputs[0]], given=given))
        self.editor.add_node(replace(node, op="table", attributes=ops.Table("x")))


SCALES_STAGE = Stage("scales", _keep_integers, "an already quantized model keeps its scales: they stand on its tensors")
