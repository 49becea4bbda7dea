"""Products of which only slices are read.

The one big idea: query, key and value are often one product, cut in three. As one tensor they share a scale; as three products each has its
own, for the same cycles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from npucc import ops
from npucc.graph import Editor, Node
from npucc.passes.rewrite import Replacement, Result, Rewrite, Rule, merged_sources

PRODUCTS = ("conv", "matmul")
BLOCK = 16  # channels that an array computes side by side, or half or a quarter of them
MOST = 1.125  # channels for one, all blocks filled up


def split_product(editor: Editor, node: Node) -> Result:
    """y = slice(matmul(x, w)) along the output channels  →  y = matmul(x, slice(w)), if all that reads the product are such slices; conv alike"""
    product = editor.producer(node.inputs[0])
    if product is None or product.op not in PRODUCTS or getattr(product.attributes, "groups", 1) != 1:
        return None
    constants = [editor.tensors[name] for name in product.inputs[1:] if name]
    if any(not each.is_constant or each.given for each in constants) or editor.tensors[node.inputs[0]].given:
        return None
    result = editor.tensors[node.inputs[0]]
    axis = 1 if product.op == "conv" else len(result.shape) - 1
    readers = editor.readers(result.name)
    if result.name in editor.outputs or not all(_cuts_only(reader, result.shape, axis) for reader in readers):
        return None
    sizes = [editor.tensors[reader.outputs[0]].shape[axis] for reader in readers]
    if BLOCK * sum(math.ceil(size / BLOCK) for size in sizes) > MOST * result.shape[axis]:
        return f"{len(sizes)} products of {', '.join(map(str, sizes))} channels take longer than one of {result.shape[axis]}"
    kept = _kept(node, axis)
    weights, *bias = (each.data for each in constants)
    assert weights is not None
    weights = np.ascontiguousarray(weights[kept] if product.op == "conv" else weights[..., kept])
    inputs = [product.inputs[0], editor.constant(f"{node.name}.weights", weights)]
    inputs += [editor.constant(f"{node.name}.bias", np.ascontiguousarray(each[kept])) for each in bias if each is not None]
    return Rewrite((replace(product, name=node.name, inputs=tuple(inputs), outputs=node.outputs, sources=merged_sources(product, node)),))


def slice_before_transpose(editor: Editor, node: Node) -> Result:
    """z = slice(transpose(x))  →  z = transpose(slice(x)), where x comes from a product and only slices read it"""
    move = editor.producer(node.inputs[0])
    if move is None or not isinstance(move.attributes, ops.Transpose) or not _all_cut(editor, move):
        return None
    assert isinstance(node.attributes, ops.Slice)
    order = np.argsort(move.attributes.permutation)
    a = node.attributes
    build = Replacement(editor, node, (move,))
    dtype = editor.tensors[node.outputs[0]].dtype
    part = build.add("slice", move.inputs, ops.Slice(*(tuple(each[i] for i in order) for each in (a.starts, a.sizes, a.steps))), dtype=dtype)
    return build.done(build.add("transpose", (part,), move.attributes, dtype=dtype))


def slice_before_reshape(editor: Editor, node: Node) -> Result:
    """z = slice(reshape(x))  →  z = reshape(slice(x)), where x comes from a product, only slices read it, and x has the parts one after the other"""
    move = editor.producer(node.inputs[0])
    if move is None or move.op != "reshape" or not _all_cut(editor, move):
        return None
    assert isinstance(node.attributes, ops.Slice)
    before, after, a = editor.tensors[move.inputs[0]].shape, editor.tensors[node.inputs[0]].shape, node.attributes
    cut = [axis for axis, size in enumerate(a.sizes) if size != after[axis]]
    if len(cut) != 1 or a.steps[cut[0]] != 1:
        return None
    place = _same_place(before, after, cut[0])
    if place is None:
        return None
    axis, unit = place
    starts, sizes = [0] * len(before), list(before)
    starts[axis], sizes[axis] = a.starts[cut[0]] * unit, a.sizes[cut[0]] * unit
    build = Replacement(editor, node, (move,))
    dtype = editor.tensors[node.outputs[0]].dtype
    part = build.add("slice", move.inputs, ops.Slice(tuple(starts), tuple(sizes), (1,) * len(before)), dtype=dtype)
    return build.done(build.add("reshape", (part,), ops.Reshape(a.sizes), dtype=dtype))


def _all_cut(editor: Editor, move: Node) -> bool:
    """Whether only slices read what is moved, and what is moved comes from a product with constant weights."""
    name = move.outputs[0]
    if name in editor.outputs or any(reader.op != "slice" for reader in editor.readers(name)):
        return False
    source = editor.producer(move.inputs[0])
    while source is not None and source.op in ("reshape", "transpose"):
        source = editor.producer(source.inputs[0])
    return source is not None and source.op in PRODUCTS and editor.tensors[source.inputs[1]].is_constant


def _same_place(before: Sequence[int], after: Sequence[int], cut: int) -> tuple[int, int] | None:
    """(dimension before a reshape, its entries per entry of dimension `cut` after it), where the latter's entries lie one after the other in it."""
    outer, inner = math.prod(after[:cut]), math.prod(after[cut + 1 :])
    for axis, size in enumerate(before):
        unit = inner // math.prod(before[axis + 1 :])
        if math.prod(before[:axis]) == outer and size == after[cut] * unit:
            return axis, unit
    return None


def _cuts_only(reader: Node, shape: tuple[int, ...], cut: int) -> bool:
    """Whether the reader is a slice that leaves all dimensions but one whole."""
    a = reader.attributes
    if not isinstance(a, ops.Slice):
        return False
    cuts = list(zip(a.starts, a.sizes, a.steps, strict=True))
    return all(axis == cut or cuts[axis] == (0, size, 1) for axis, size in enumerate(shape))


def _kept(node: Node, axis: int) -> slice:
    """The channels that the slice picks."""
    assert isinstance(node.attributes, ops.Slice)
    start, size, step = (each[axis] for each in (node.attributes.starts, node.attributes.sizes, node.attributes.steps))
    stop = start + size * step
    return slice(start, stop if stop >= 0 else None, step)


PART_RULES: tuple[Rule, ...] = (
    Rule("slice-before-transpose", frozenset({"slice"}), slice_before_transpose, "then the product itself can be cut"),
    Rule("slice-before-reshape", frozenset({"slice"}), slice_before_reshape, "then the product itself can be cut"),
    Rule("split-product", frozenset({"slice"}), split_product, "each part of a product has a scale of its own"),
)
