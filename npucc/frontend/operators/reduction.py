"""Reductions over axes, Softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx import TensorProto

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport


def _axes(node: NodeImport) -> list[int]:
    """The axes to reduce over, non-negative. None given means all, unless noop_with_empty_axes is set."""
    rank = node.rank()
    axes = node.integers_of("axes", 1)
    if not axes:
        return [] if node.integer("noop_with_empty_axes", 0) == 1 else list(range(rank))
    return sorted({node.axis(axis, rank) for axis in axes})


def _finish(node: NodeImport, reduced: str, axes: list[int]) -> str:
    """Drop the reduced dimensions unless keepdims is set."""
    if node.integer("keepdims", 1) == 1:
        return reduced
    return node.reshape(reduced, [size for i, size in enumerate(node.shape_of(reduced)) if i not in axes])


def _reduce(op: str, *, before: scalar.Expression = "x", after: scalar.Expression = "x") -> Callable[[NodeImport], str]:
    """after(reduction of before(x)). Booleans are 0 and 1."""

    def run(node: NodeImport) -> str:
        axes, logical = _axes(node), node.element_type(0) == TensorProto.BOOL
        x = node.table(before, node.input(0)) if logical or before != "x" else node.input(0)
        reduced = node.reduce(op, x, axes)
        result = _finish(node, reduced if after == "x" else node.table(after, reduced), axes)
        return node.emit("compare", (result, node.new_constant(0.0, "zero")), ops.Compare("ne"), dtype="bool") if logical else result

    return run


def log_sum_exp(node: NodeImport) -> str:
    """m + log(sum(exp(x − m))) with m the maximum, which can't overflow."""
    axes = _axes(node)
    x = node.input(0)
    largest = node.reduce("reduce_max", x, axes)
    total = node.reduce("reduce_sum", node.table(("exp", "x"), node.binary("sub", x, largest)), axes)
    return _finish(node, node.binary("add", node.table(("log", "x"), total), largest), axes)


def product(node: NodeImport) -> str:
    """Halves multiplied with each other until one is left, axis by axis."""
    axes, x = _axes(node), node.input(0)
    for axis in axes:
        while (size := node.shape_of(x)[axis]) > 1:
            half = node.binary("mul", node.slice(x, axis, 0, size // 2), node.slice(x, axis, size // 2, size // 2))
            rest = node.slice(x, axis, size - 1, 1) if size % 2 else ""
            x = node.emit("concat", (half, rest), ops.Concat(axis)) if rest else half
    return _finish(node, x, axes)


def _flattened(node: NodeImport) -> tuple[str, int]:
    """(tensor, axis): since opset 13 along one axis; before, over all dimensions from `axis` on."""
    x, shape = node.input(0), node.shape(0)
    axis = node.axis(node.integer("axis", -1 if node.opset >= 13 else 1), len(shape))
    if node.opset >= 13 or all(size == 1 for size in shape[axis + 1 :]):
        return x, axis
    return node.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:]))), 1


def softmax(node: NodeImport) -> str:
    """Along one axis; before opset 13 along all from `axis` on."""
    x, axis = _flattened(node)
    return node.reshape(node.emit("softmax", (x,), ops.Softmax(axis)), node.shape(0))


def log_softmax(node: NodeImport) -> str:
    """x − m − log(sum(exp(x − m))) with m the maximum."""
    x, axis = _flattened(node)
    shifted = node.binary("sub", x, node.reduce("reduce_max", x, [axis]))
    total = node.reduce("reduce_sum", node.table(("exp", "x"), shifted), [axis])
    return node.reshape(node.binary("sub", shifted, node.table(("log", "x"), total)), node.shape(0))


_SQUARE = ("mul", "x", "x")
TABLE: tuple[Importer, ...] = (
    Importer("ReduceMean", _reduce("reduce_mean")),
    Importer("ReduceSum", _reduce("reduce_sum")),
    Importer("ReduceMax", _reduce("reduce_max")),
    Importer("ReduceMin", _reduce("reduce_min")),
    Importer("ReduceL1", _reduce("reduce_sum", before=("abs", "x"))),
    Importer("ReduceL2", _reduce("reduce_sum", before=_SQUARE, after=("sqrt", "x"))),
    Importer("ReduceSumSquare", _reduce("reduce_sum", before=_SQUARE)),
    Importer("ReduceLogSum", _reduce("reduce_sum", after=("log", "x"))),
    Importer("ReduceLogSumExp", log_sum_exp),
    Importer("ReduceProd", product),
    Importer("Softmax", softmax),
    Importer("LogSoftmax", log_softmax),
)
