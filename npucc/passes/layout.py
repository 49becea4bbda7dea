"""Operations that move nothing, or that can be moved together and cancelled.

The one big idea: reshapes and transposes sink below elementwise operations, so that those from both sides of a 1-D convolution, or of a channels-last
island, meet and cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from npucc import ops, scalar
from npucc.graph import Editor, Node, Tensor
from npucc.passes.rewrite import Alias, Replacement, Result, Rewrite, Rule, merged_sources
from npucc.passes.values import ARITHMETIC, as_function

Shape = tuple[int, ...]
MOVES = ("reshape", "transpose")
MOST_READERS = 32  # of one tensor; above this equal ones are not looked for


def nothing_to_do(editor: Editor, node: Node) -> Result:
    """y = reshape(x) to its own shape  →  x   (transpose, slice, expand, concat of one, pad by nothing, table of "x" alike)"""
    source, output = editor.tensors[node.inputs[0]], editor.tensors[node.outputs[0]]
    a = node.attributes
    same = source.shape == output.shape
    if isinstance(a, ops.Table):
        useless = scalar.is_affine(a.expression) == (1.0, 0.0) and (source.dtype == "bool") == (output.dtype == "bool")
    elif isinstance(a, ops.Transpose):
        useless = a.permutation == tuple(range(len(a.permutation)))
    elif isinstance(a, ops.Slice):
        useless = same and all(step > 0 for step in a.steps)
    elif isinstance(a, ops.Pool):
        useless = a.kernel == a.strides == (1, 1) and not any(a.pads)
    else:
        useless = same
    return Alias(source.name) if useless else None


def computed_already(editor: Editor, node: Node) -> Result:
    """y = f(x); z = f(x)  →  z = y"""
    source = next((name for name in node.inputs if name and not editor.tensors[name].is_constant), "")
    readers = editor.readers(source)
    if not 1 < len(readers) <= MOST_READERS:
        return None
    for other in readers:
        if other.name != node.name and (other.op, other.inputs, other.attributes) == (node.op, node.inputs, node.attributes):
            same_type = (editor.tensors[other.outputs[0]].dtype == "bool") == (editor.tensors[node.outputs[0]].dtype == "bool")
            return Alias(other.outputs[0]) if same_type else None
    return None


def unit_transpose(editor: Editor, node: Node) -> Result:
    """y = transpose(x[1,C,1,L]) that only moves dimensions of size 1  →  y = reshape(x)"""
    assert isinstance(node.attributes, ops.Transpose)
    shape = editor.tensors[node.inputs[0]].shape
    moved = [axis for axis in node.attributes.permutation if shape[axis] != 1]
    if moved != sorted(moved):
        return None
    return Rewrite((replace(node, op="reshape", attributes=ops.Reshape(editor.tensors[node.outputs[0]].shape)),))


def merge_moves(editor: Editor, node: Node) -> Result:
    """z = reshape(reshape(x))  →  z = reshape(x); z = transpose(transpose(x))  →  z = transpose(x)"""
    producer = editor.producer(node.inputs[0])
    if producer is None or producer.op != node.op:
        return None
    attributes = node.attributes
    if isinstance(attributes, ops.Transpose):
        assert isinstance(producer.attributes, ops.Transpose)
        attributes = ops.Transpose(tuple(producer.attributes.permutation[axis] for axis in attributes.permutation))
    return Rewrite((replace(node, inputs=producer.inputs, attributes=attributes, sources=merged_sources(producer, node)),))


def sink_below_transpose(editor: Editor, node: Node) -> Result:
    """z = transpose(reshape(x)), where the reshape only adds or drops dimensions of 1  →  z = reshape(transpose(x))"""
    assert isinstance(node.attributes, ops.Transpose)
    move = editor.producer(node.inputs[0])
    if move is None or move.op != "reshape" or not editor.is_read_once(node.inputs[0]):
        return None
    before, after = editor.tensors[move.inputs[0]].shape, editor.tensors[node.inputs[0]].shape
    axes, new_axes = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (before, after))
    if [before[axis] for axis in axes] != [after[axis] for axis in new_axes]:
        return None
    moved = iter([axes[new_axes.index(axis)] for axis in node.attributes.permutation if after[axis] != 1])
    permutation = tuple(axis if size == 1 else next(moved) for axis, size in enumerate(before))
    build = Replacement(editor, node, (move,))
    dtype = editor.tensors[node.outputs[0]].dtype
    transposed = build.add("transpose", move.inputs, ops.Transpose(permutation), dtype=dtype)
    return build.done(build.add("reshape", (transposed,), ops.Reshape(editor.tensors[node.outputs[0]].shape), dtype=dtype))


def sink_below_table(editor: Editor, node: Node) -> Result:
    """z = table(reshape(x))  →  z = reshape(table(x)), if nothing else reads the reshape; transpose alike"""
    move = editor.producer(node.inputs[0])
    if move is None or move.op not in MOVES or not editor.is_read_once(node.inputs[0]):
        return None
    return _sunk(editor, node, move, move.inputs)


def sink_below_arithmetic(editor: Editor, node: Node) -> Result:
    """z = add(reshape(x), reshape(y))  →  z = reshape(add(x, y)), if the reshapes are the same; an operand may be a constant"""
    moves = [editor.producer(name) for name in node.inputs]
    found = [move for move in moves if move is not None and move.op in MOVES]
    if not found or not all(editor.is_read_once(move.outputs[0]) for move in found):
        return None
    first = found[0]
    shape = editor.tensors[first.inputs[0]].shape
    output = editor.tensors[node.outputs[0]].shape
    inputs = []
    for name, move in zip(node.inputs, moves, strict=True):
        if move is not None and move.op == first.op and move.attributes == first.attributes and editor.tensors[move.inputs[0]].shape == shape:
            inputs.append(move.inputs[0])
        elif editor.tensors[name].is_constant and editor.tensors[first.outputs[0]].shape == output:
            constant = _moved_constant(editor, name, first, shape, output)
            if constant is None:
                return None
            inputs.append(constant)
        else:
            return None
    return _sunk(editor, node, first, tuple(inputs))


def _sunk(editor: Editor, node: Node, move: Node, inputs: Sequence[str]) -> Rewrite:
    """The node on the inputs before the move, then the move."""
    shape = editor.tensors[move.inputs[0]].shape
    result = editor.tensors[node.outputs[0]]
    inner = Tensor(editor.fresh(f"{result.name}/{move.op}"), shape, result.dtype)
    changed = replace(node, inputs=tuple(inputs), outputs=(inner.name,))
    moved = Node(move.name, move.op, (inner.name,), node.outputs, move.attributes, move.sources)
    return Rewrite((changed, moved), (inner,))


def _moved_constant(editor: Editor, name: str, move: Node, before: Shape, after: Shape) -> str | None:
    """The constant as an operand before the move; None if it can't be said there."""
    data = editor.tensors[name].data
    assert data is not None
    if data.size == 1:
        return name if data.ndim <= len(before) else editor.constant(name, data.reshape(()))
    full = data.reshape((1,) * (len(after) - data.ndim) + data.shape)
    given = editor.tensors[name].given
    whole = given and given.reshaped(full.shape)
    if isinstance(move.attributes, ops.Transpose):
        order = [int(axis) for axis in np.argsort(move.attributes.permutation)]
        moved, given = full.transpose(order), whole and whole.transposed(order)
    else:
        shape = _reshaped_operand(full.shape, before, after)
        if shape is None:
            return None
        moved, given = full.reshape(shape), whole and whole.reshaped(shape)
    return editor.constant(name, np.ascontiguousarray(moved), given)


def _reshaped_operand(operand: Shape, before: Shape, after: Shape) -> Shape | None:
    """The operand's shape when the reshape only adds or drops dimensions of 1."""
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    kept = iter([size for size, whole in zip(operand, after, strict=True) if whole != 1])
    return tuple(next(kept) if whole != 1 else 1 for whole in before)


def matmul_between_reshapes(editor: Editor, node: Node) -> Result:
    """z[a,b,N] = reshape(matmul(reshape(x), w[K,N]))  →  z[a,b,N] = matmul(reshape(x)[a,b,K], w), and often x has that shape"""
    product = editor.producer(node.inputs[0])
    if product is None or product.op != "matmul" or not editor.is_read_once(node.inputs[0]):
        return None
    first = editor.producer(product.inputs[0])
    weights = editor.tensors[product.inputs[1]]
    shape = editor.tensors[node.outputs[0]].shape
    if (
        first is None
        or first.op != "reshape"
        or not weights.is_constant
        or len(weights.shape) != 2
        or len(shape) < 2
        or shape[-1] != weights.shape[1]
    ):
        return None
    build = Replacement(editor, node, (product, first))
    merged = build.reshape(first.inputs[0], (*shape[:-1], weights.shape[0]))
    return build.done(build.add("matmul", (merged, *product.inputs[1:]), product.attributes), name=product.name)


def broadcast_by_itself(editor: Editor, node: Node) -> Result:
    """z = mul(x, expand(y))  →  z = mul(x, y), where the other operand alone gives the shape"""
    inputs = list(node.inputs)
    output = editor.tensors[node.outputs[0]].shape
    for index, name in enumerate(node.inputs):
        expand = editor.producer(name)
        if expand is not None and expand.op == "expand":
            inputs[index] = expand.inputs[0]
            if np.broadcast_shapes(*(editor.tensors[part].shape for part in inputs)) == output:
                return Rewrite((replace(node, inputs=tuple(inputs), sources=merged_sources(expand, node)),))
            inputs[index] = name
    return None


def sum_to_mean(editor: Editor, node: Node) -> Result:
    """s = reduce_sum(x) over n; m = mul(s, 1/n) or div(s, n)  →  m = reduce_mean(x)"""
    function = as_function(editor, node)
    producer = editor.producer(function[0]) if function else None
    if function is None or producer is None or producer.op != "reduce_sum":
        return None
    assert isinstance(producer.attributes, ops.Reduce)
    count = math.prod(editor.tensors[producer.inputs[0]].shape[axis] for axis in producer.attributes.axes)
    affine = scalar.is_affine(function[1])
    if affine is None or affine[1] or abs(affine[0] * count - 1) > 1e-6:
        return None
    return Rewrite((replace(producer, name=node.name, op="reduce_mean", outputs=node.outputs, sources=merged_sources(producer, node)),))


def clip_before_move(editor: Editor, node: Node) -> Result:
    """z = clip(max_pool(conv(x)))  →  z = max_pool(clip(conv(x))), where the clip then folds into the convolution; concat alike"""
    assert isinstance(node.attributes, ops.Table)
    move = editor.producer(node.inputs[0])
    if move is None or move.op not in ("max_pool", "concat", "slice") or scalar.is_clip(node.attributes.expression) is None:
        return None
    producers = [editor.producer(name) for name in move.inputs]
    if not editor.is_read_once(node.inputs[0]) or any(
        part is None or not ops.OPS[part.op].matrix or not editor.is_read_once(part.outputs[0]) for part in producers
    ):
        return None
    parts, tensors = [], []
    for index, name in enumerate(move.inputs):
        tensor = editor.tensors[name]
        inner = Tensor(editor.fresh(f"{node.outputs[0]}/{index}"), tensor.shape, tensor.dtype)
        tensors.append(inner)
        parts.append(Node(editor.fresh(f"{node.name}/{index}"), "table", (name,), (inner.name,), node.attributes, node.sources))
    return Rewrite((*parts, replace(move, inputs=tuple(tensor.name for tensor in tensors), outputs=node.outputs)), tuple(tensors))


_SINGLE = frozenset(name for name, record in ops.OPS.items() if not record.host)  # a host segment may hold random numbers, and has many results
_MOVING = frozenset({"reshape", "transpose", "slice", "expand", "concat", "pad", "table", "max_pool", "average_pool"})
LAYOUT_RULES: tuple[Rule, ...] = (
    Rule("nothing-to-do", _MOVING, nothing_to_do, "an operation that changes nothing is dropped"),
    Rule("computed-already", _SINGLE, computed_already, "the same operation on the same tensors is done once"),
    Rule("unit-transpose", frozenset({"transpose"}), unit_transpose, "moving dimensions of size 1 moves no data"),
    Rule("merge-moves", frozenset({"reshape", "transpose"}), merge_moves, "two in a row are one, often none"),
    Rule("sink-below-transpose", frozenset({"transpose"}), sink_below_transpose, "reshapes and transposes meet below, and cancel"),
    Rule("sink-below-table", frozenset({"table"}), sink_below_table, "reshapes and transposes meet below, and cancel"),
    Rule("sink-below-arithmetic", frozenset(ARITHMETIC), sink_below_arithmetic, "reshapes and transposes meet below, and cancel"),
    Rule("matmul-between-reshapes", frozenset({"reshape"}), matmul_between_reshapes, "a product needs no merged leading dimensions"),
    Rule("broadcast-by-itself", frozenset({*ARITHMETIC, "compare", "where"}), broadcast_by_itself, "elementwise operations broadcast without a copy"),
    Rule("sum-to-mean", frozenset({"table", "mul", "div"}), sum_to_mean, "a mean is one operation"),
    Rule("clip-before-move", frozenset({"table"}), clip_before_move, "a clip before a pool or concat can become part of the convolution there"),
)  # fmt: skip
