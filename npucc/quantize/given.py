"""What an already quantized model has fixed: its scales on every tensor that must share them, its integers in the constants.

The one big idea: given scales spread along what only moves data, up and down, before anything is calibrated. Where two of them meet, the values are
rescaled in between. So afterwards a scale is given for a whole group of tensors or for none, and the rest of the quantizer only asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npucc import scalar
from npucc.graph import Editor, Given, Graph, Node, Quant, Tensor
from npucc.ops import OPS, Table
from npucc.quantize.candidates import left_may_be_wide
from npucc.quantize.constants import MatrixConstants, axes_of, fits, source_of, stored_bias
from npucc.quantize.share import moved_inputs

Array = np.ndarray[Any, np.dtype[Any]]

COARSER = 65535 / 255  # steps of 8 bits that cover what 16 bits do
SAME_SCALE = 1e-5  # relative: scales of a bias and its accumulator this close are the same, but for rounding
#: whole numbers of 8 bits have no range to find out
WHOLE = {"int8": Given("s8", np.asarray(1.0, np.float32), 0), "uint8": Given("s8", np.asarray(1.0, np.float32), -128)}


def spread(graph: Graph) -> Graph:
    """The graph with given scales on all tensors that share them, rescaled where they differ."""
    known = {name: given for name, tensor in graph.tensors.items() if (given := _given(graph, name)) is not None and not tensor.is_constant}
    moves = [node for node in graph if OPS[node.op].moves_data]
    for node in graph:
        _spread_whole(node, known)
    for _ in range(2):  # first downwards: what is only moved stays as it is, whatever scale those want who read it
        for node in moves:
            _spread_down(graph, node, known)
        for node in reversed(moves):
            _spread_up(graph, node, known)
    editor = Editor(graph)
    for name, given in known.items():
        editor.add_tensor(replace(graph.tensors[name], given=given))
    for node in moves:
        _rescale(graph, editor, node, known)
    for node in graph:
        if node.op == "matmul" and not graph.tensors[node.inputs[1]].is_constant and not _fits_in_16_bits(editor, graph, node):
            _narrow(editor, node)
    return editor.freeze()


def _fits_in_16_bits(editor: Editor, graph: Graph, node: Node) -> bool:
    """Whether the left operand of a product of two activations can stay in 16 bits, if it has them. (The right one is multiplied in digits.)"""
    left = editor.tensors[node.inputs[0]].given
    return left is None or left.dtype != "s16" or left_may_be_wide(graph, node)


def _narrow(editor: Editor, node: Node) -> None:
    """Operands of a product of two activations in 8 bits, where the model gives 16: the same range in coarser steps."""
    node, copies = editor.nodes[node.name], {}
    for name in dict.fromkeys(node.inputs[:2]):
        tensor = editor.tensors[name]
        if tensor.given is not None and tensor.given.dtype == "s16":
            given = Given("s8", (tensor.given.scale * np.float32(COARSER)).astype(np.float32), int(np.rint(tensor.given.zero / COARSER)))
            copies[name] = editor.add_tensor(replace(tensor, name=editor.fresh(f"{name}/narrow"), source="", given=given))
            editor.add_node(Node(editor.fresh(f"{copies[name]}:table"), "table", (name,), (copies[name],), Table("x"), node.sources), at=node.name)
    editor.add_node(replace(node, inputs=(*(copies.get(name, name) for name in node.inputs[:2]), *node.inputs[2:])))


def _given(graph: Graph, name: str) -> Given | None:
    tensor = graph.tensors[name]
    is_index = any(user.inputs[index] == name for user in graph.users(name) for index in OPS[user.op].indices)
    return tensor.given or (WHOLE.get(tensor.dtype) if not is_index else None)


def _spread_whole(node: Node, known: dict[str, Given]) -> None:
    """What cuts off all above or below zero leaves values on their steps; so does what cuts off the fractions of multiples of a whole number."""
    given = known.get(node.inputs[0]) if isinstance(node.attributes, Table) else None
    if given is None or not isinstance(node.attributes, Table):
        return
    whole = node.attributes == Table(("trunc", "x")) and float(given.scale).is_integer()
    if whole or scalar.is_clip(node.attributes.expression) in ((0.0, np.inf), (-np.inf, 0.0)):
        known.setdefault(node.outputs[0], given)


def _movable(graph: Graph, node: Node) -> Iterator[str]:
    """The moved inputs that are computed reals."""
    return (name for name in moved_inputs(node) if not graph.tensors[name].is_constant and graph.tensors[name].dtype == "float32")


def _spread_up(graph: Graph, node: Node, known: dict[str, Given]) -> None:
    given = known.get(node.outputs[0])
    if given is not None:
        for name in _movable(graph, node):
            known.setdefault(name, given)


def _spread_down(graph: Graph, node: Node, known: dict[str, Given]) -> None:
    """Of several scales the coarsest, which holds all values; that of a constant where nothing else is moved."""
    found = [known[name] for name in _movable(graph, node) if name in known]
    if not any(_movable(graph, node)):
        found = [given for name in moved_inputs(node) if (given := graph.tensors[name].given) is not None and given.quant is not None]
    if found:
        known.setdefault(node.outputs[0], max(found, key=lambda given: float(given.scale)))


def _rescale(graph: Graph, editor: Editor, node: Node, known: Mapping[str, Given]) -> None:
    """A single input is moved on its own scale and rescaled afterwards; of several each is rescaled before."""
    wanted = known.get(node.outputs[0])
    differing = [name for name in _movable(graph, node) if wanted is not None and _key(known.get(name, wanted)) != _key(wanted)]
    if not differing:
        return
    current = editor.nodes[node.name]
    if len(moved_inputs(node)) == 1:
        output = editor.tensors[node.outputs[0]]
        moved = replace(output, name=editor.fresh(f"{output.name}/moved"), source="", given=known[differing[0]])
        editor.add_tensor(moved)
        editor.add_node(replace(current, outputs=(moved.name,)))
        editor.add_node(Node(editor.fresh(f"{node.name}/rescale"), "table", (moved.name,), node.outputs, Table("x"), node.sources), at=node.name)
        return
    copies = {}
    for name in dict.fromkeys(differing):
        copy = replace(editor.tensors[name], name=editor.fresh(f"{name}/rescaled"), source="", given=wanted)
        copies[name] = editor.add_tensor(copy)
        editor.add_node(Node(editor.fresh(f"{copy.name}:table"), "table", (name,), (copy.name,), Table("x"), node.sources), at=node.name)
    editor.add_node(replace(current, inputs=tuple(copies.get(name, name) for name in current.inputs)))


def _key(given: Given) -> tuple[str, bytes, int]:
    return (given.dtype, given.scale.tobytes(), given.zero)


# ---- constants


def kept_matrix(node: Node, graph: Graph, source: Quant) -> MatrixConstants | str | None:
    """A matrix operator's own integers; the reason where they can't be kept, None where there are none."""
    weights = graph.tensors[node.inputs[1]]
    if weights.given is None or weights.given.stored is None:
        return None
    axes = axes_of(node, weights.given.stored.ndim)
    axis = axes.output
    scale = _per_channel(weights.given, axis)
    if scale is None:
        return "its scales do not lie along the output channels"
    steps = weights.given.stored.astype(np.int32) - weights.given.zero
    if steps.min(initial=0) < -128 or steps.max(initial=0) > 127:
        return f"its integers less their zero point go from {steps.min()} to {steps.max()}, beyond 8 bits"
    accumulator = (np.float32(source.scale) * scale).astype(np.float32)
    shared = 0 if scale.ndim else None
    bias = graph.tensors[node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] else None
    stored = None if bias is None else own_bias(bias, accumulator)
    if stored is None and bias is not None and bias.data is not None:
        stored = stored_bias(bias.data, accumulator)
    if not sums_in_32_bits(graph.tensors[node.inputs[0]], bias, accumulator) and not np.all(fits(steps, stored, source, axes)):
        return "its sums would leave 32 bits"
    return MatrixConstants(
        steps.astype(np.int8), Quant("s8", scale, 0, axis if scale.ndim else None), stored, Quant("s32", accumulator, 0, shared)
    )  # fmt: skip


def _per_channel(given: Given, axis: int | None) -> Array | None:
    """The scale as () or (channels,); None where it changes along another dimension than `axis`."""
    if given.scale.size == 1:
        return given.scale.reshape(())
    if axis is None:
        return None
    rows = np.moveaxis(given.scale, axis, 0).reshape(given.scale.shape[axis], -1)
    if not np.all(rows == rows[:, :1]):
        return None
    assert given.stored is not None
    return np.ascontiguousarray(np.broadcast_to(rows[:, 0], (given.stored.shape[axis],)))


def own_bias(bias: Tensor, accumulator: Array) -> Array | None:
    """The model's own integers, int32, where they are in steps of the accumulator."""
    given = bias.given
    if given is None or given.stored is None or given.dtype != "s32" or not np.allclose(given.scale, accumulator, rtol=SAME_SCALE, atol=0):
        return None
    return (given.stored.astype(np.int64) - given.zero).astype(np.int32)


def sums_in_32_bits(source: Tensor, bias: Tensor | None, accumulator: Array) -> bool:
    """Whether onnxruntime adds up a product with integers of 8 bits in 32, which then wrap as the machine's do: the model gives all of it.

    Its quantizer gives nearly dead channels a bias just below 2^31, and so a sum that could wrap but does not.
    """
    given = source.given
    return given is not None and given.dtype == "s8" and (bias is None or own_bias(bias, accumulator) is not None)


def not_kept(graph: Graph, source: Mapping[str, Quant]) -> tuple[str, ...]:
    """One sentence for each weight whose own integers can't be kept. `source`: of the first operands of matrix operators."""
    found = []
    for node in graph:
        if OPS[node.op].matrix and node.inputs[0] in source and graph.tensors[node.inputs[1]].is_constant:
            reason = kept_matrix(node, graph, source[node.inputs[0]])
            if isinstance(reason, str):
                found.append(f"{source_of(node)}: the weight {node.inputs[1]!r} is quantized anew to 8 bits per channel: {reason}")
    return tuple(found)


def narrowed(graph: Graph) -> tuple[str, ...]:
    """One sentence for each operand of which `spread` made a narrow copy."""
    why = "is rounded from 16 to 8 bits: the sums of its product would leave 32 bits"
    return tuple(f"{source_of(node)}: {name!r} {why}" for node in graph if OPS[node.op].matrix for name in _narrowed(graph, node))


def _narrowed(graph: Graph, node: Node) -> Iterator[str]:
    """What `_narrow` made copies of for this node."""
    for name in dict.fromkeys(node.inputs[:2]):
        producer, given = graph.producer(name), graph.tensors[name].given
        if producer is None or given is None or producer.attributes != Table("x") or graph.tensors[name].source:
            continue
        origin = graph.tensors[producer.inputs[0]].given
        if origin is not None and (origin.dtype, given.dtype) == ("s16", "s8"):
            yield producer.inputs[0]
