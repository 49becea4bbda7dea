"""Logarithms of powers, by way of their roots.

The one big idea: a power takes twice the bits of its amplitude. What is steep at zero (a logarithm) and reads a sum of squares then reads the sum's
root instead: the squares and their sum have 32 bits, the root has 16 (see `quantize.precision`), and nothing between them is coarse.
"""

from __future__ import annotations

from dataclasses import replace

from npucc import scalar
from npucc.arithmetic import DIRECT
from npucc.graph import Editor, Node
from npucc.ops import OPS, Binary, Reduce, Slice, Table
from npucc.passes.rewrite import Replacement, Result, Rule

MOST_ADDED = 4  # elements of a sum that is written as additions, which keep 32 bits: real and imaginary part, or some coordinates


def sum_of_few(editor: Editor, node: Node) -> Result:
    """y = reduce_sum(mul(x, x))  →  y = add(slice(mul(x, x)), slice(mul(x, x))), where few elements are summed"""
    assert isinstance(node.attributes, Reduce)
    shape = editor.tensors[node.inputs[0]].shape
    if len(node.attributes.axes) != 1 or not 2 <= (count := shape[node.attributes.axes[0]]) <= MOST_ADDED or not _is_power(editor, node.inputs[0]):
        return None
    (axis,), build = node.attributes.axes, Replacement(editor, node)
    sizes = tuple(1 if d == axis else size for d, size in enumerate(shape))
    steps = (1,) * len(shape)
    parts = [build.add("slice", node.inputs, Slice(tuple(i if d == axis else 0 for d in range(len(shape))), sizes, steps)) for i in range(count)]
    total = parts[0]
    for part in parts[1:]:
        total = build.add("add", (total, part), Binary())
    return build.done(total)


def root_of_power(editor: Editor, node: Node) -> Result:
    """y = table(p) log(x)  →  r = table(p) sqrt(x); y = table(r) log(x · x), where p is a sum of squares that nothing else reads"""
    assert isinstance(node.attributes, Table)
    power = node.inputs[0]
    steep = scalar.is_steep_at_zero(node.attributes.expression) and DIRECT.get(node.attributes.expression) != "sqrt"
    if not steep or not editor.is_read_once(power) or not _is_power(editor, power):
        return None
    build = Replacement(editor, node)
    root = build.add("table", (power,), Table(("sqrt", "x")))
    rewrite = build.done(build.add("table", (root,), Table(scalar.compose(node.attributes.expression, ("mul", "x", "x")))))
    return replace(rewrite, tensors=tuple(replace(tensor, wide=True) for tensor in rewrite.tensors))


def _is_power(editor: Editor, tensor: str) -> bool:
    """Whether the tensor is made of squares by sums and moves alone, on which nothing else is done."""
    node = editor.producer(tensor)
    if node is None or editor.tensors[tensor].given or tensor in editor.outputs:
        return False
    if isinstance(node.attributes, Table):
        return DIRECT.get(node.attributes.expression) == "mul"
    known = _keeps_power(node) and all(all(map(_keeps_power, editor.readers(name))) for name in node.inputs)
    return known and all(_is_power(editor, name) for name in node.inputs)


def _keeps_power(node: Node) -> bool:
    return node.op == "add" or (OPS[node.op].moves_data and len(node.inputs) == 1)


POWER_RULES: tuple[Rule, ...] = (
    Rule("sum-of-few", frozenset({"reduce_sum"}), sum_of_few, "additions of squares keep 32 bits"),
    Rule("root-of-power", frozenset({"table"}), root_of_power, "a root has in 16 bits what its square has in 32"),
)
