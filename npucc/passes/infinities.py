"""Where a tensor can be infinite: what a test for it, or for a row that is masked whole, comes down to.

The one big idea: infinity gets into a network by a mask or by a function with a pole. What neither reaches is finite, and tests are dropped.
"""

from __future__ import annotations

import math

import numpy as np

from npucc import ops, scalar
from npucc.graph import Editor, Graph, Node
from npucc.ops import OPS
from npucc.passes.rewrite import Alias, Replacement, Result, Rule
from npucc.passes.values import ARITHMETIC

LONGEST_TRACE = 64  # tensors
#: functions without a pole, that give no infinity for anything finite within the range of a network's values
TAME = frozenset({
    "add", "sub", "mul", "max", "min", "clip", "where", "abs", "neg", "eq", "ne", "lt", "le", "gt", "ge", "sin", "cos", "floor", "ceil", "round",
    "trunc", "sign", "relu", "leaky_relu", "sigmoid", "tanh", "erf", "hard_sigmoid", "hard_swish", "softplus", "softsign", "elu", "selu", "celu",
    "mish",
})  # fmt: skip


def may_be_infinite(graph: Graph | Editor, tensor: str) -> bool:
    """Whether an element can be infinite: False is certain, as the model's inputs are finite and no product overflows."""
    waiting, seen = [tensor], {tensor}
    while waiting:
        name = waiting.pop()
        node, data = graph.producer(name), graph.tensors[name].data
        if data is not None and data.dtype.kind == "f" and not np.isfinite(data).all():
            return True
        if node is None or OPS[node.op].matrix or OPS[node.op].fixed_range or graph.tensors[name].dtype == "bool":
            continue
        known = OPS[node.op].moves_data or node.op in ("where", *ARITHMETIC, "reduce_sum", "reduce_mean", "average_pool", "layer_norm", "table")
        if not known or node.op == "div" or len(seen) > LONGEST_TRACE or not _is_tame(getattr(node.attributes, "expression", "x")):
            return True
        new = [each for each in node.inputs if each and each not in seen]
        seen.update(new)
        waiting += new
    return False


def _is_tame(expression: scalar.Expression) -> bool:
    if isinstance(expression, tuple):
        divides = expression[0] == "div" and isinstance(expression[2], float) and expression[2] != 0
        bounds = expression[2:] if expression[0] == "clip" else ()
        return (divides or expression[0] in TAME) and all(part in bounds or _is_tame(part) for part in expression[1:])
    return not isinstance(expression, float) or math.isfinite(expression)


def never_infinite(editor: Editor, node: Node) -> Result:
    """y = compare(x, −inf) eq  →  y = false, where nothing that x depends on can be infinite"""
    assert isinstance(node.attributes, ops.Compare)
    for tensor, other in (node.inputs, node.inputs[::-1]):
        data = editor.tensors[other].data
        if node.attributes.kind == "eq" and data is not None and data.dtype.kind == "f" and data.size and bool(np.isinf(data).all()):
            if may_be_infinite(editor, tensor):
                return None
            shape = editor.tensors[node.outputs[0]].shape
            build = Replacement(editor, node)
            false = editor.constant(f"{node.outputs[0]}/never", np.zeros((1,) * len(shape), bool))
            return build.done(build.add("expand", (false,), ops.Expand(shape), dtype="bool"))
    return None


def decided(editor: Editor, node: Node) -> Result:
    """y = where(condition, a, b), where the condition is constant and everywhere the same  →  y = a or b"""
    data = _constant(editor, node.inputs[0])
    if data is None or not data.size or data.min() != data.max():
        return None
    chosen, result = node.inputs[1 if data.flat[0] else 2], editor.tensors[node.outputs[0]]
    source = editor.tensors[chosen]
    if source.given or result.given or source.is_constant:
        return None
    if source.shape == result.shape:
        return Alias(chosen)
    build = Replacement(editor, node)
    return build.done(build.add("expand", (chosen,), ops.Expand(result.shape), dtype=result.dtype))


def _constant(editor: Editor, tensor: str) -> np.ndarray | None:
    """The value of a constant, or of one that is merely broadcast."""
    producer = editor.producer(tensor)
    return editor.tensors[producer.inputs[0] if producer is not None and producer.op == "expand" else tensor].data


INFINITY_RULES: tuple[Rule, ...] = (
    Rule("never-infinite", frozenset({"compare"}), never_infinite, "no mask reaches it, so nothing is to be tested"),
    Rule("decided", frozenset({"where"}), decided, "a selection that always takes the same costs nothing"),
)
