"""LayerNorm, Softmax and LogSoftmax, recognized in the forms that exporters write out.

The one big idea: their inner tensors (moments, exponentials, their sums) can't be quantized well, so the whole must become one operation before
quantization. The forms are patterns; by then every function of one variable is a table, which leaves few forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from npucc import ops, scalar
from npucc.graph import Editor, Node
from npucc.passes.pattern import Anything, Constant, Found, Function, Pattern, either, find, op
from npucc.passes.rewrite import Replacement, Result, Rewrite, Rule, merged_sources

# ---- functions within the patterns


def is_square(expression: scalar.Expression) -> float | None:
    """2 for x², else None."""
    return 2.0 if expression in (("pow", "x", 2.0), ("mul", "x", "x")) else None


def root_epsilon(expression: scalar.Expression) -> float | None:
    """ε of sqrt(x + ε), where x may be limited from below by something not above 0; None for anything else."""
    if not isinstance(expression, tuple):
        return None
    if expression[0] == "sqrt" or (expression[0] == "pow" and expression[2] == 0.5):
        line = scalar.clipped_line(expression[1])
        if line and line.scale == 1 and line.shift >= 0 and line.low <= line.shift and line.high == math.inf:
            return line.shift
    return None


def inverse_root_epsilon(expression: scalar.Expression) -> float | None:
    """ε of 1 / sqrt(x + ε); None for anything else."""
    if not isinstance(expression, tuple):
        return None
    if expression[0] == "reciprocal":
        return root_epsilon(expression[1])
    if expression[0] == "div" and expression[1] == 1.0:
        return root_epsilon(expression[2])
    if expression[0] == "pow" and expression[2] == -0.5:
        return root_epsilon(("sqrt", expression[1]))
    return None


def is_exponential(expression: scalar.Expression) -> float | None:
    """1 for exp(anything), else None."""
    return 1.0 if isinstance(expression, tuple) and expression[0] == "exp" else None


def is_reciprocal(expression: scalar.Expression) -> float | None:
    """1 for 1 / x, else None."""
    return 1.0 if expression in (("reciprocal", "x"), ("div", 1.0, "x"), ("pow", "x", -1.0)) else None


# ---- LayerNorm

_NON_NEGATIVE = (0.0, math.inf)
_X = Anything("x")
_MEAN = op("reduce_mean", _X, bind="mean")
_CENTERED = op("sub", _X, _MEAN)
_VARIANCE = either(
    op("reduce_mean", Function(is_square, _CENTERED), bind="moment"),
    op("sub", op("reduce_mean", Function(is_square, _X), bind="moment"), Function(is_square, _MEAN), clamp_allowed=_NON_NEGATIVE),
)
_DEVIATION = Function(root_epsilon, _VARIANCE, "epsilon")
_INVERSE = Function(inverse_root_epsilon, _VARIANCE, "epsilon")
_FACTOR = op("mul", _INVERSE, Constant("gamma"))
NORMALIZED: Pattern = either(
    op("div", _CENTERED, _DEVIATION),
    op("mul", _CENTERED, _INVERSE),
    op("mul", _CENTERED, _FACTOR),
    op("add", op("mul", _X, _FACTOR), op("sub", Constant("beta"), op("mul", _MEAN, _FACTOR))),
)
_SQUARES = op("reduce_mean", Function(is_square, _X), bind="moment")
_INVERSE_ROOT = Function(inverse_root_epsilon, _SQUARES, "epsilon")
NOT_CENTERED: Pattern = either(
    op("div", _X, Function(root_epsilon, _SQUARES, "epsilon")),
    op("mul", _X, _INVERSE_ROOT),
    op("mul", _X, op("mul", _INVERSE_ROOT, Constant("gamma"))),
)


def written_layer_norm(editor: Editor, node: Node) -> Result:
    """y = (x − mean(x)) / sqrt(mean((x − mean(x))²) + ε)  →  y = layer_norm(x) epsilon=ε

    Also with the variance as E[x²] − E[x]², with 1/sqrt(…), and with γ multiplied in first. An axis other than the last is moved there and back.
    """
    found = find(editor, node, NORMALIZED)
    if found is None:
        return None
    axes = _axes(found.nodes["mean"])
    if axes != _axes(found.nodes["moment"]):
        return f"mean and variance are taken over different axes, {axes} and {_axes(found.nodes['moment'])}"
    return _as_one_norm(editor, node, found, centered=True)


def written_rms_norm(editor: Editor, node: Node) -> Result:
    """y = x / sqrt(mean(x²) + ε)  →  y = layer_norm(x) epsilon=ε centered=False, and the other forms alike"""
    found = find(editor, node, NOT_CENTERED)
    return None if found is None else _as_one_norm(editor, node, found, centered=False)


def _as_one_norm(editor: Editor, node: Node, found: Found, *, centered: bool) -> Result:
    if getattr(node.attributes, "clamp", None) is not None:
        return "its result is clamped already"
    build = Replacement(editor, node, found.covered)
    attributes = ops.LayerNorm(found.numbers["epsilon"], centered)
    axes = _axes(found.nodes["moment"])
    result = _along_last(build, found.tensors["x"], axes, lambda moved: build.add("layer_norm", (moved,), attributes))
    for operator, name in (("mul", "gamma"), ("add", "beta")):
        if name in found.tensors:
            result = build.add(operator, (result, found.tensors[name]), ops.Binary())
    return build.done(result)


def _along_last(build: Replacement, tensor: str, axes: Sequence[int], apply: Callable[[str], str]) -> str:
    """`apply` with these axes merged into the last dimension, and the result brought back to the shape of `tensor`."""
    shape = build.shape(tensor)
    others = [axis for axis in range(len(shape)) if axis not in axes]
    order = (*others, *axes)
    size = math.prod(shape[axis] for axis in axes)
    moved = build.transpose(tensor, order)
    flat = build.reshape(moved, (*(shape[axis] for axis in others), size))
    back = build.reshape(apply(flat), build.shape(moved))
    return build.transpose(back, tuple(order.index(axis) for axis in range(len(shape))))


def _axes(node: Node) -> tuple[int, ...]:
    assert isinstance(node.attributes, ops.Reduce)
    return node.attributes.axes


def norm_scale(editor: Editor, node: Node) -> Result:
    """y = mul(layer_norm(x), γ)  →  y = layer_norm(x, γ), for a constant γ along the last dimension"""
    return _norm_parameter(editor, node, 1)


def norm_shift(editor: Editor, node: Node) -> Result:
    """y = add(layer_norm(x, γ), β)  →  y = layer_norm(x, γ, β), for a constant β along the last dimension"""
    return _norm_parameter(editor, node, 2)


def _norm_parameter(editor: Editor, node: Node, position: int) -> Result:
    """Give a layer_norm its input at `position` (1: γ, 2: β)."""
    attributes = node.attributes
    for tensor, other in (node.inputs, node.inputs[::-1]):
        norm = editor.producer(tensor)
        data = editor.tensors[other].data
        if norm is None or norm.op != "layer_norm" or data is None or any(norm.inputs[position:]):
            continue
        shape = editor.tensors[tensor].shape
        if data.size not in (1, shape[-1]) or data.ndim > len(shape) or (data.size > 1 and data.shape[-1] != shape[-1]):
            return f"the constant has shape {list(data.shape)}, not one value per entry of the last dimension ({shape[-1]})"
        if not editor.is_read_once(tensor) or getattr(attributes, "clamp", None) is not None:
            return f"the result of {norm.name!r} has other readers, or is clamped"
        vector = editor.constant(other, np.ascontiguousarray(np.broadcast_to(data.reshape(-1), shape[-1:])))
        inputs = (*(*norm.inputs[:position], "")[:position], vector)
        return Rewrite((replace(norm, inputs=inputs, outputs=node.outputs, sources=merged_sources(norm, node)),))
    return None


# ---- Softmax

_LARGEST = op("reduce_max", Anything("x"), bind="largest")
_EXPONENTIAL = either(Function(is_exponential, op("sub", Anything("x"), _LARGEST)), Function(is_exponential, Anything("x")))
_TOTAL = op("reduce_sum", _EXPONENTIAL, bind="total")
WRITTEN_SOFTMAX: Pattern = either(op("div", _EXPONENTIAL, _TOTAL), op("mul", _EXPONENTIAL, Function(is_reciprocal, _TOTAL)))


def written_softmax(editor: Editor, node: Node) -> Result:
    """y = exp(x − max(x)) / sum(exp(x − max(x)))  →  y = softmax(x), with or without the maximum; exp(c·x) alike"""
    found = find(editor, node, WRITTEN_SOFTMAX)
    if found is None:
        return None
    axes = _axes(found.nodes["total"])
    if len(axes) != 1 or ("largest" in found.nodes and _axes(found.nodes["largest"]) != axes):
        return f"the sum is over axes {axes}, expected one axis, the same as the maximum's"
    exponential = next(part for part in found.covered if part.op == "table" and is_exponential(_expression(part)))
    inner = _expression(exponential)[1]
    build = Replacement(editor, node, found.covered)
    source = found.tensors["x"] if inner == "x" else build.add("table", exponential.inputs, ops.Table(inner))
    return build.done(build.add("softmax", (source,), ops.Softmax(axes[0])))


# ---- logarithms of sums of exponentials


def after_logarithm(expression: scalar.Expression) -> scalar.Expression | None:
    """f of f(log(x)), where log(x + ε) is log(exp(log(x)) + ε); None where x is not only in logarithms."""
    if not isinstance(expression, tuple):
        return None if expression == "x" else expression
    if expression[0] == "log":
        return "x" if expression[1] == "x" else ("log", scalar.compose(expression[1], ("exp", "x")))
    parts = [after_logarithm(part) for part in expression[1:]]
    return None if None in parts else (expression[0], *(part for part in parts if part is not None))


def is_of_logarithm(expression: scalar.Expression) -> float | None:
    """1 for f(log(x)), else None."""
    return 1.0 if isinstance(expression, tuple) and after_logarithm(expression) is not None else None


LOG_SUM_EXP: Pattern = Function(is_of_logarithm, either(op("reduce_sum", _EXPONENTIAL, bind="total"), op("reduce_mean", _EXPONENTIAL, bind="total")))
LOG_SOFTMAX: Pattern = Function(is_of_logarithm, op("softmax", Anything("x"), bind="softmax"))


def log_sum_exp(editor: Editor, node: Node) -> Result:
    """y = log(sum(exp(x)))  →  y = m + log(sum(exp(x − m))) with m the maximum of x, where it is not written so; of a mean alike"""
    found = find(editor, node, LOG_SUM_EXP)
    if found is None or "largest" in found.nodes:
        return None
    total, exponential = found.nodes["total"], next(part for part in found.covered if part.op == "table" and is_exponential(_expression(part)))
    if not editor.is_read_once(total.outputs[0]):
        return None
    build = Replacement(editor, node, found.covered)
    inner = _expression(exponential)[1]
    source = found.tensors["x"] if inner == "x" else build.add("table", exponential.inputs, ops.Table(inner))
    largest = build.add("reduce_max", (source,), ops.Reduce(_axes(total)))
    shifted = build.add("sub", (source, largest), ops.Binary())
    small = build.add(total.op, (build.add("table", (shifted,), ops.Table(("exp", "x"))),), total.attributes)
    result = build.add("add", (build.add("table", (small,), ops.Table(("log", "x"))), largest), ops.Binary())
    after = after_logarithm(_expression(node))
    assert after is not None
    return build.done(result if after == "x" else build.add("table", (result,), ops.Table(after)))


def log_softmax(editor: Editor, node: Node) -> Result:
    """y = log(softmax(x))  →  y = x − m − log(sum(exp(x − m))) with m the maximum of x"""
    found = find(editor, node, LOG_SOFTMAX)
    if found is None:
        return None
    attributes = found.nodes["softmax"].attributes
    assert isinstance(attributes, ops.Softmax)
    build = Replacement(editor, node, found.covered)
    along = ops.Reduce((attributes.axis % len(build.shape(found.tensors["x"])),))
    shifted = build.add("sub", (found.tensors["x"], build.add("reduce_max", (found.tensors["x"],), along)), ops.Binary())
    total = build.add("reduce_sum", (build.add("table", (shifted,), ops.Table(("exp", "x"))),), along)
    result = build.add("sub", (shifted, build.add("table", (total,), ops.Table(("log", "x")))), ops.Binary())
    after = after_logarithm(_expression(node))
    assert after is not None
    return build.done(result if after == "x" else build.add("table", (result,), ops.Table(after)))


def _expression(node: Node) -> scalar.Expression:
    assert isinstance(node.attributes, ops.Table)
    return node.attributes.expression


PATTERN_RULES: tuple[Rule, ...] = (
    Rule(
        "written-layer-norm", frozenset({"div", "mul", "add"}), written_layer_norm, "its moments are lost in 8 bits; as one operation they are exact"
    ),
    Rule("written-rms-norm", frozenset({"div", "mul"}), written_rms_norm, "the mean of its squares spans twice the bits of what it is made of"),
    Rule("norm-scale", frozenset({"mul"}), norm_scale, "the scale is applied before rounding"),
    Rule("norm-shift", frozenset({"add"}), norm_shift, "the shift is applied before rounding"),
    Rule("log-sum-exp", frozenset({"table"}), log_sum_exp, "less the maximum, its exponentials do not span more than evenly spaced steps can"),
    Rule("log-softmax", frozenset({"table"}), log_softmax, "small probabilities are lost in 8 bits, their logarithms are not"),
    Rule("written-softmax", frozenset({"div", "mul"}), written_softmax, "its exponentials are lost in 8 bits; as one operation they are exact"),
)
