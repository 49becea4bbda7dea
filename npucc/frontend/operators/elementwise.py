"""Elementwise operators: functions of one variable become tables; arithmetic, comparisons and selection keep their operands."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.prepare import NUMBERS, type_name

Run = Callable[[NodeImport], str]
MOST_EXPONENTS = 16


def _table(expression: scalar.Expression) -> Run:
    return lambda node: node.table(expression, node.input(0))


def _identity(node: NodeImport) -> str:
    return node.input(0)


def dropout(node: NodeImport) -> list[str]:
    """Does nothing outside training; the second result is true everywhere."""
    ratio = float(node.floats(1, "ratio").reshape(-1)[0]) if node.has(1) else 0.5
    if ratio and node.has(2) and bool(np.any(node.constant(2, "training_mode"))):
        raise node.refuse("is in training mode", hint="export the model in evaluation mode")
    return [node.input(0), node.new_constant(np.ones(node.shape(0), bool), "mask") if len(node.outputs) > 1 else ""]


def _parametric(function: str, **defaults: float) -> Run:
    """A function whose further arguments are ONNX attributes, with these defaults."""
    return lambda node: node.table((function, "x", *(node.real(name, default) for name, default in defaults.items())), node.input(0))


def shrink(node: NodeImport) -> str:
    """x + bias below −lambd, x − bias above lambd, else 0."""
    bias, limit = node.real("bias", 0.0), node.real("lambd", 0.5)
    inner = ("where", ("gt", "x", limit), ("sub", "x", bias), 0.0)
    return node.table(("where", ("lt", "x", -limit), ("add", "x", bias), inner), node.input(0))


def gelu(node: NodeImport) -> str:
    """x·Φ(x), or its tanh approximation."""
    return node.table(scalar.gelu(tanh=node.word("approximate", "none") == "tanh"), node.input(0))


def quick_gelu(node: NodeImport) -> str:
    """x · sigmoid(alpha · x)."""
    return node.table(("mul", "x", ("sigmoid", ("mul", "x", node.real("alpha", 1.702)))), node.input(0))


def fast_gelu(node: NodeImport) -> str:
    """The tanh approximation of GELU, of the input plus an optional bias."""
    biased = node.binary("add", node.input(0), node.input(1)) if node.has(1) else node.input(0)
    return node.table(scalar.gelu(tanh=True), biased)


def swish(node: NodeImport) -> str:
    """x · sigmoid(alpha · x)."""
    return node.table(("mul", "x", ("sigmoid", ("mul", "x", node.real("alpha", 1.0)))), node.input(0))


def clip(node: NodeImport) -> str:
    """Limits are attributes before opset 11, inputs since; computed limits become max and min."""
    tensor = node.input(0)
    if not (node.has(1) or node.has(2)):
        return node.table(("clip", "x", node.real("min", -math.inf), node.real("max", math.inf)), tensor)
    limits = [-math.inf, math.inf]
    for index, op in ((1, "max"), (2, "min")):
        if node.is_constant(index):
            limits[index - 1] = float(node.floats(index, "limit").reshape(()))
        elif node.has(index):
            tensor = node.binary(op, tensor, node.input(index))
    return tensor if limits == [-math.inf, math.inf] else node.table(("clip", "x", *limits), tensor)


def prelu(node: NodeImport) -> str:
    """max(x, 0) + slope · min(x, 0); one common slope makes a leaky ReLU."""
    x = node.input(0)
    if node.is_constant(1):
        slope = node.floats(1, "slope")
        if slope.size and np.all(slope == slope.flat[0]) and np.broadcast_shapes(node.shape(0), slope.shape) == node.shape(0):
            return node.table(("leaky_relu", "x", float(slope.flat[0])), x)
    negative = node.binary("mul", node.table(("min", "x", 0.0), x), node.input(1))
    return node.binary("add", node.table(("relu", "x"), x), negative)


def _variadic(op: str) -> Run:
    """A chain of two-operand nodes."""

    def run(node: NodeImport) -> str:
        result = node.input(0)
        for index in range(1, len(node.inputs)):
            result = node.binary(op, result, node.input(index))
        return result

    return run


def mean(node: NodeImport) -> str:
    """Sum of all inputs over their number."""
    total = _variadic("add")(node)
    return node.table(("mul", "x", 1 / len(node.inputs)), total)


def _arithmetic(op: str) -> Run:
    """A two-operand operator. Before opset 7 operands were not broadcast as in numpy, which is why older opsets are refused."""

    return lambda node: node.binary(op, node.input(0), node.input(1))


def power(node: NodeImport) -> str:
    """One operand must be a single constant, or the exponents constants of a few values."""
    for index in (1, 0):
        if node.is_constant(index) and node.floats(index, "operand").size == 1:
            constant = float(node.floats(index, "operand").reshape(()))
            other = node.input(1 - index)
            shape = np.broadcast_shapes(node.shape(0), node.shape(1))
            result = node.table(("pow", "x", constant) if index == 1 else ("pow", constant, "x"), other)
            return node.reshape(result, shape)
    exponents = node.floats(1, "exponent")
    distinct = [float(value) for value in np.unique(exponents)]
    if len(distinct) > MOST_EXPONENTS:
        message = f"has {len(distinct)} different exponents; supported are up to {MOST_EXPONENTS}"
        raise node.refuse(message, hint="write it as Exp(exponent · Log(base))")
    result = node.table(("pow", "x", distinct[0]), node.input(0))
    for value in distinct[1:]:
        chosen = node.new_constant(exponents == value, "chosen")
        result = _select(node, chosen, node.table(("pow", "x", value), node.input(0)), result)
    return result


def activation(node: NodeImport, name: str, parameters: list[float], x: str) -> str:
    """A named activation function with its parameters, as fused operators have it."""
    if name == "Clip":
        return node.table(("clip", "x", *parameters), x)
    if name not in ACTIVATIONS:
        raise node.refuse(f"the activation function {name!r} is not known", hint=f"known are {', '.join(ACTIVATIONS)}, Clip")
    return node.table((ACTIVATIONS[name], "x", *parameters), x)


ACTIVATIONS = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "LeakyRelu": "leaky_relu", "HardSigmoid": "hard_sigmoid", "Softplus": "softplus",
    "Softsign": "softsign", "Elu": "elu", "HardSwish": "hard_swish",
}  # fmt: skip


def never(node: NodeImport) -> str:
    """Integers are never infinite."""
    return node.new_constant(np.zeros(node.shape(0), bool), "never")


def is_nan(node: NodeImport) -> str:
    """Integers are never NaN. What softmax gives for a row of −∞ throughout is not either, but the model means such a row by it."""
    scores = node.softmax_source(0)
    if scores is None:
        return never(node)
    tensor, axis = scores
    masked = node.emit("compare", (node.reduce("reduce_max", tensor, [axis]), node.new_constant(-np.inf, "masked")), ops.Compare("eq"), dtype="bool")
    return node.emit("expand", (masked,), ops.Expand(node.shape(0)))


def _compare(kind: str) -> Run:
    return lambda node: node.emit("compare", (node.input(0), node.input(1)), ops.Compare(kind), dtype="bool")


def _truth(node: NodeImport, value: bool) -> str:
    return node.new_constant(np.array(value), str(value).lower())


def _select(node: NodeImport, condition: str, first: str, second: str) -> str:
    return node.emit("where", (condition, first, second), ops.Attributes(), dtype=node.dtype_of(first))


def logical_not(node: NodeImport) -> str:
    """condition ? false : true."""
    return _select(node, node.input(0), _truth(node, False), _truth(node, True))


def logical_and(node: NodeImport) -> str:
    """a ? b : false."""
    return _select(node, node.input(0), node.input(1), _truth(node, False))


def logical_or(node: NodeImport) -> str:
    """a ? true : b."""
    return _select(node, node.input(0), _truth(node, True), node.input(1))


def where(node: NodeImport) -> str:
    """condition ? a : b."""
    return _select(node, node.input(0), node.input(1), node.input(2))


def cast(node: NodeImport) -> str:
    """Between numbers nothing happens, except that real to integer drops the fraction; bool is 0 or 1."""
    target = node.integer("to", TensorProto.FLOAT)
    source = node.element_type(0)
    x = node.input(0)
    if target == TensorProto.BOOL:
        return x if source == TensorProto.BOOL else node.emit("compare", (x, node.new_constant(0.0, "zero")), ops.Compare("ne"), dtype="bool")
    if target not in NUMBERS:
        raise node.refuse(f"casts to {type_name(target)}", hint="only numbers are supported")
    if source == TensorProto.BOOL:
        return node.table("x", x)
    to_real = target in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return x if to_real or node.is_integer(0) else node.table(("trunc", "x"), x)


_SIMPLE = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Erf": "erf", "HardSwish": "hard_swish", "Mish": "mish", "Softplus": "softplus",
    "Softsign": "softsign", "Abs": "abs", "Neg": "neg", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal",
    "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign", "Sin": "sin", "Cos": "cos", "Tan": "tan", "Asin": "asin",
    "Acos": "acos", "Atan": "atan", "Sinh": "sinh", "Cosh": "cosh", "Asinh": "asinh", "Acosh": "acosh", "Atanh": "atanh",
}  # fmt: skip
_COMPARISONS = {"Equal": "eq", "Greater": "gt", "GreaterOrEqual": "ge", "Less": "lt", "LessOrEqual": "le", "Xor": "ne"}

TABLE: tuple[Importer, ...] = (
    *(Importer(name, _table((function, "x"))) for name, function in _SIMPLE.items()),
    *(Importer(name, _arithmetic(name.lower())) for name in ("Add", "Sub", "Mul")),
    *(Importer(name, _variadic(op)) for name, op in (("Max", "max"), ("Min", "min"), ("Sum", "add"))),
    *(Importer(name, _compare(kind)) for name, kind in _COMPARISONS.items()),
    Importer("Identity", _identity),
    Importer("Dropout", dropout, "inference only"),
    Importer("LeakyRelu", _parametric("leaky_relu", alpha=0.01)),
    Importer("PRelu", prelu),
    Importer("Elu", _parametric("elu", alpha=1.0)),
    Importer("Selu", _parametric("selu", alpha=1.67326319217681884765625, gamma=1.05070102214813232421875)),
    Importer("Celu", _parametric("celu", alpha=1.0)),
    Importer("ThresholdedRelu", _parametric("thresholded_relu", alpha=1.0)),
    Importer("HardSigmoid", _parametric("hard_sigmoid", alpha=0.2, beta=0.5)),
    Importer("Shrink", shrink),
    Importer("Gelu", gelu),
    Importer("Gelu", gelu, domain="com.microsoft"),
    Importer("QuickGelu", quick_gelu, domain="com.microsoft"),
    Importer("FastGelu", fast_gelu, domain="com.microsoft"),
    Importer("Swish", swish),
    Importer("Clip", clip),
    Importer("Mean", mean),
    Importer("Pow", power, "base or exponent constant"),
    Importer("IsNaN", is_nan, "never true, but of a softmax: where its row is masked whole"),
    Importer("IsInf", never, "integers are never infinite"),
    Importer("Not", logical_not),
    Importer("And", logical_and),
    Importer("Or", logical_or),
    Importer("Where", where),
    Importer("Cast", cast),
    Importer("CastLike", _identity, "between float types"),
)
