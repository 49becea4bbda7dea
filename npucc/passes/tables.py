"""Everything elementwise that depends on one tensor becomes one table.

The one big idea: an int8 function of one variable is 256 bytes whatever it computes. So HardSwish, SiLU, GELU or Mish in any spelling are recognized
not by their pattern but by having one variable.
"""

from __future__ import annotations

from dataclasses import replace

from npucc import ops, scalar
from npucc.graph import Editor, Node
from npucc.passes.rewrite import Result, Rewrite, Rule, merged_sources
from npucc.passes.values import ARITHMETIC, as_function, clamped, function_name, uniform

LARGEST_EXPRESSION = 64  # function applications; also bounds the depth of every walk over an expression
DEEPEST_CHAIN = 8


def constant_operand(editor: Editor, node: Node) -> Result:
    """y = add(x, 3)  →  y = table(x) add(x, 3); where the model quantizes the 3, it wants a sum of integers"""
    function = as_function(editor, node) if node.op in ARITHMETIC else None
    if function is None or any(editor.tensors[name].given for name in node.inputs):
        return None
    return Rewrite((replace(node, op="table", inputs=(function[0],), attributes=ops.Table(function[1])),))


def chain_of_tables(editor: Editor, node: Node) -> Result:
    """y = table(x) f; z = table(y) g  →  z = table(x) g(f(x)), if nothing else reads y"""
    producer = editor.producer(node.inputs[0])
    inner = as_function(editor, producer) if producer else None
    if producer is None or inner is None or producer.op == "compare":
        return None
    if not editor.is_read_once(node.inputs[0]):
        return None
    assert isinstance(node.attributes, ops.Table)
    expression = scalar.compose(node.attributes.expression, inner[1])
    if scalar.size(expression) > LARGEST_EXPRESSION:
        return f"the expression would have more than {LARGEST_EXPRESSION} steps"
    return Rewrite((replace(node, inputs=(inner[0],), attributes=ops.Table(expression), sources=merged_sources(producer, node)),))


def common_variable(editor: Editor, node: Node) -> Result:
    """y = mul(f(x), g(x))  →  y = table(x) mul(f(x), g(x)); f(x) or g(x) may be x itself, or stay for other readers"""
    output = editor.tensors[node.outputs[0]]
    if output.dtype == "bool":
        return None
    chains = [_chain(editor, name) for name in node.inputs]
    variables = next((chain for chain in chains if not isinstance(chain, float)), None)
    if variables is None:
        return None
    for root in variables:
        parts = [chain if isinstance(chain, float) else chain.get(root) for chain in chains]
        if None in parts or editor.tensors[root].shape != output.shape:
            continue
        name = "where" if node.op == "where" else function_name(node)
        expression = clamped((name, *(part if isinstance(part, float) else part[0] for part in parts if part is not None)), node)
        if scalar.size(expression) > LARGEST_EXPRESSION:
            return f"the expression would have more than {LARGEST_EXPRESSION} steps"
        fused = [inner for part in parts if part is not None and not isinstance(part, float) for inner in part[1]]
        return Rewrite((Node(node.name, "table", (root,), node.outputs, ops.Table(expression), merged_sources(*fused, node)),))
    return None


def _chain(editor: Editor, tensor: str) -> float | dict[str, tuple[scalar.Expression, tuple[Node, ...]]]:
    """The tensor as functions of the tensors above it, nearest first (with the nodes in between); a number if it is a constant of one value.

    A constant that the model has quantized stays an operand: it wants integer arithmetic.
    """
    value = uniform(editor, tensor) if editor.tensors[tensor].given is None else None
    if value is not None:
        return value
    chain: dict[str, tuple[scalar.Expression, tuple[Node, ...]]] = {tensor: ("x", ())}
    expression: scalar.Expression = "x"
    nodes: tuple[Node, ...] = ()
    for _ in range(DEEPEST_CHAIN):
        producer = editor.producer(tensor)
        function = as_function(editor, producer) if producer else None
        if producer is None or function is None:
            break
        tensor, expression, nodes = function[0], scalar.compose(expression, function[1]), (producer, *nodes)
        chain[tensor] = (expression, nodes)
    return chain


TABLE_RULES: tuple[Rule, ...] = (
    Rule("constant-operand", frozenset(ARITHMETIC), constant_operand, "arithmetic with a constant is a function of one variable"),
    Rule("chain-of-tables", frozenset({"table"}), chain_of_tables, "two tables in a row are one table, and round once"),
    Rule("common-variable", frozenset({*ARITHMETIC, "where"}), common_variable, "operations on functions of one tensor are a function of it"),
)
