"""Functions of one real variable, as expressions: what a `table` node computes.

The one big idea: an expression is a value, "x" | a float | (function, argument, …), and one table says of each function how to compute it,
which ONNX operator it is and which values it can take. Any elementwise subgraph with one variable becomes one expression.

Every step is rounded to float32, as onnxruntime does. Transcendental functions are computed in float64 and rounded once, so that a table
does not depend on the machine's vector library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

Expression: TypeAlias = Any  # "x" | float | tuple[str, *Expression]; recursive, which mypy can't say of a tuple
Floats: TypeAlias = NDArray[np.float32]

INFINITY = math.inf


@dataclass(frozen=True, slots=True)
class Function:
    """One function. It has either `compute` (float32 arrays to a float32 array) with its ONNX `operator`, or an `expansion` into others.

    Trailing arguments named in `onnx_attributes` are ONNX attributes (they must be constants). `boolean`: the ONNX operator yields bool;
    here that is 0.0 or 1.0. `bounds`: a range that holds for every argument.
    """

    name: str
    arity: int
    compute: Callable[..., Any] | None = None
    operator: str = ""
    onnx_attributes: tuple[str, ...] = ()
    boolean: bool = False
    bounds: tuple[float, float] = (-INFINITY, INFINITY)
    expansion: Callable[..., Expression] | None = None


def _double(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function computed in float64, rounded to float32 once by the caller."""
    return lambda x, *rest: function(np.asarray(x, np.float64), *(np.float64(value) for value in rest))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _softplus(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _elu(x: Any, alpha: Any) -> Any:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _selu(x: Any, alpha: Any, gamma: Any) -> Any:
    return gamma * _elu(x, alpha)


def _celu(x: Any, alpha: Any) -> Any:
    return np.maximum(x, 0) + np.minimum(alpha * np.expm1(np.minimum(x, 0) / alpha), 0)


def _clip(x: Any, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)


def _hard_sigmoid(x: Any, alpha: Any, beta: Any) -> Any:
    return _clip(x * alpha + beta, np.float32(0), np.float32(1))


def _binary(name: str, operator: str, compute: Callable[..., Any]) -> Function:
    return Function(name, 2, compute, operator)


def _unary(name: str, operator: str, compute: Callable[[Any], Any], bounds: tuple[float, float] = (-INFINITY, INFINITY)) -> Function:
    return Function(name, 1, _double(compute), operator, bounds=bounds)


def _comparison(name: str, operator: str, compute: Callable[..., Any]) -> Function:
    return Function(name, 2, compute, operator, boolean=True, bounds=(0.0, 1.0))


TABLE: tuple[Function, ...] = (
    _binary("add", "Add", np.add),
    _binary("sub", "Sub", np.subtract),
    _binary("mul", "Mul", np.multiply),
    _binary("div", "Div", np.divide),
    _binary("max", "Max", np.maximum),
    _binary("min", "Min", np.minimum),
    Function("pow", 2, _double(np.power), "Pow"),
    _comparison("eq", "Equal", np.equal),
    _comparison("lt", "Less", np.less),
    _comparison("le", "LessOrEqual", np.less_equal),
    _comparison("gt", "Greater", np.greater),
    _comparison("ge", "GreaterOrEqual", np.greater_equal),
    Function("ne", 2, expansion=lambda a, b: ("sub", 1.0, ("eq", a, b)), bounds=(0.0, 1.0)),
    Function("where", 3, lambda c, a, b: np.where(np.asarray(c) != 0, a, b), "Where"),
    _unary("neg", "Neg", np.negative),
    _unary("abs", "Abs", np.abs, (0.0, INFINITY)),
    _unary("reciprocal", "Reciprocal", np.reciprocal),
    _unary("floor", "Floor", np.floor),
    _unary("ceil", "Ceil", np.ceil),
    _unary("round", "Round", np.rint),
    _unary("sign", "Sign", np.sign, (-1.0, 1.0)),
    _unary("exp", "Exp", np.exp, (0.0, INFINITY)),
    _unary("log", "Log", np.log),
    _unary("sqrt", "Sqrt", np.sqrt, (0.0, INFINITY)),
    _unary("erf", "Erf", _erf, (-1.0, 1.0)),
    _unary("sin", "Sin", np.sin, (-1.0, 1.0)),
    _unary("cos", "Cos", np.cos, (-1.0, 1.0)),
    _unary("tan", "Tan", np.tan),
    _unary("asin", "Asin", np.arcsin),
    _unary("acos", "Acos", np.arccos),
    _unary("atan", "Atan", np.arctan),
    _unary("sinh", "Sinh", np.sinh),
    _unary("cosh", "Cosh", np.cosh, (1.0, INFINITY)),
    _unary("tanh", "Tanh", np.tanh, (-1.0, 1.0)),
    _unary("asinh", "Asinh", np.arcsinh),
    _unary("acosh", "Acosh", np.arccosh),
    _unary("atanh", "Atanh", np.arctanh),
    _unary("sigmoid", "Sigmoid", _logistic, (0.0, 1.0)),
    _unary("softplus", "Softplus", _softplus, (0.0, INFINITY)),
    _unary("softsign", "Softsign", lambda x: x / (1 + np.abs(x)), (-1.0, 1.0)),
    Function("relu", 1, lambda x: np.maximum(x, np.float32(0)), "Relu", bounds=(0.0, INFINITY)),
    Function("clip", 3, _clip, "Clip"),
    Function("leaky_relu", 2, lambda x, alpha: np.where(x < 0, x * alpha, x), "LeakyRelu", ("alpha",)),
    Function("thresholded_relu", 2, lambda x, alpha: np.where(x > alpha, x, np.float32(0)), "ThresholdedRelu", ("alpha",)),
    Function("elu", 2, _double(_elu), "Elu", ("alpha",)),
    Function("selu", 3, _double(_selu), "Selu", ("alpha", "gamma")),
    Function("celu", 2, _double(_celu), "Celu", ("alpha",)),
    Function("hard_sigmoid", 3, _hard_sigmoid, "HardSigmoid", ("alpha", "beta"), bounds=(0.0, 1.0)),
    Function("hard_swish", 1, expansion=lambda x: ("mul", x, ("hard_sigmoid", x, 1 / 6, 0.5))),
    Function("mish", 1, expansion=lambda x: ("mul", x, ("tanh", ("softplus", x)))),
    Function("trunc", 1, expansion=lambda x: ("where", ("lt", x, 0.0), ("ceil", x), ("floor", x))),
)
FUNCTIONS: dict[str, Function] = {record.name: record for record in TABLE}


def gelu(*, tanh: bool = False) -> Expression:
    """GELU: x·Φ(x) with the error function, or its tanh approximation."""
    if not tanh:
        return ("mul", ("mul", 0.5, "x"), ("add", 1.0, ("erf", ("mul", "x", math.sqrt(0.5)))))
    cubic = ("add", "x", ("mul", 0.044715, ("mul", "x", ("mul", "x", "x"))))
    return ("mul", ("mul", 0.5, "x"), ("add", 1.0, ("tanh", ("mul", math.sqrt(2 / math.pi), cubic))))


def is_expression(value: object) -> bool:
    """Whether a value that came from elsewhere has the form of an Expression."""
    if not isinstance(value, tuple):
        return value == "x" or (isinstance(value, int | float) and not isinstance(value, bool))
    function = FUNCTIONS.get(value[0]) if value and isinstance(value[0], str) else None
    if function is None or len(value) != 1 + function.arity:
        return False
    constants = value[len(value) - len(function.onnx_attributes) :]
    return all(is_expression(part) for part in value[1:]) and all(isinstance(part, int | float) for part in constants)


def evaluate(expression: Expression, x: Floats) -> Floats:
    """The expression at every element of `x`, each operation rounded to float32. Same shape as `x`; may hold NaN and infinities."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        return np.array(np.broadcast_to(_value(expression, x, {}), x.shape), np.float32)


def _value(part: Expression, x: Floats, known: dict[int, Any]) -> Any:
    """Of a part of an expression; `known`: of those that were met before. (A function within `evaluate` would be a cycle that keeps large arrays.)"""
    if not isinstance(part, tuple):
        return x if part == "x" else np.float32(part)
    if id(part) not in known:
        known[id(part)] = _apply(FUNCTIONS[part[0]], [_value(argument, x, known) for argument in part[1:]])
    return known[id(part)]


def _apply(function: Function, arguments: list[Any]) -> Any:
    if function.expansion is None:
        assert function.compute is not None
        return np.asarray(function.compute(*arguments)).astype(np.float32)
    return _apply_expansion(function.expansion(*(f"argument{i}" for i in range(function.arity))), arguments)


def _apply_expansion(part: Expression, arguments: list[Any]) -> Any:
    if isinstance(part, tuple):
        return _apply(FUNCTIONS[part[0]], [_apply_expansion(argument, arguments) for argument in part[1:]])
    return arguments[int(part[len("argument") :])] if isinstance(part, str) else np.float32(part)


def compose(outer: Expression, inner: Expression) -> Expression:
    """outer(inner(x)), simplified."""
    known: dict[int, Expression] = {}

    def substitute(part: Expression) -> Expression:
        if not isinstance(part, tuple):
            return inner if part == "x" else part
        if id(part) not in known:
            known[id(part)] = simplify_step((part[0], *(substitute(argument) for argument in part[1:])))
        return known[id(part)]

    return substitute(outer)


def simplify(expression: Expression) -> Expression:
    """Constants folded, neutral operands removed, chains of clips merged; the value at every x stays the same."""
    return compose(expression, "x")


#: x + 0 and x - 0 are not among them: they may change the sign of a zero, which a division tells apart
_NEUTRAL_RIGHT = {"mul": 1.0, "div": 1.0, "pow": 1.0, "max": -INFINITY, "min": INFINITY}
_NEUTRAL_LEFT = {"mul": 1.0, "max": -INFINITY, "min": INFINITY}


def simplify_step(part: tuple[Any, ...]) -> Expression:
    """One function applied to simplified arguments."""
    name, *arguments = part
    if all(isinstance(argument, float) for argument in arguments):
        result = float(evaluate(part, np.zeros((), np.float32)))
        return part if math.isnan(result) else result
    if name in _NEUTRAL_RIGHT and arguments[1] == _NEUTRAL_RIGHT[name]:
        return arguments[0]
    if name in _NEUTRAL_LEFT and arguments[0] == _NEUTRAL_LEFT[name]:
        return arguments[1]
    limits = _clip_chain(part)
    if limits is None:
        return part
    return ("relu", "x") if limits == (0.0, INFINITY) else ("clip", "x", *limits)


def _clip_chain(part: tuple[Any, ...]) -> tuple[float, float] | None:
    """The limits of clips of clips of x; arithmetic between them is left as it is written, because it rounds."""
    operands = _clip_operands(part)
    if operands is None:
        return None
    inner, low, high = operands
    if inner == "x":
        return min(low, high), high
    limits = _clip_chain(inner) if isinstance(inner, tuple) else None
    return limits and (min(max(limits[0], low), high), min(max(limits[1], low), high))


def _clip_operands(part: tuple[Any, ...]) -> tuple[Expression, float, float] | None:
    """(argument, low, high) of a function that only clips."""
    name, *arguments = part
    if name == "relu":
        return arguments[0], 0.0, INFINITY
    if name == "clip" and all(isinstance(limit, float) and not math.isnan(limit) for limit in arguments[1:]):
        return arguments[0], arguments[1], arguments[2]
    if name in ("max", "min"):
        constant, variable = sorted(arguments, key=lambda argument: not isinstance(argument, float))
        if isinstance(constant, float) and not math.isnan(constant):
            return (variable, constant, INFINITY) if name == "max" else (variable, -INFINITY, constant)
    return None


@dataclass(frozen=True, slots=True)
class ClippedLine:
    """min(max(scale · x + shift, low), high), with scale not 0."""

    scale: float = 1.0
    shift: float = 0.0
    low: float = -INFINITY
    high: float = INFINITY

    def times(self, factor: float) -> ClippedLine:
        low, high = sorted((self.low * factor, self.high * factor))
        return ClippedLine(self.scale * factor, self.shift * factor, low, high)

    def plus(self, term: float) -> ClippedLine:
        return ClippedLine(self.scale, self.shift + term, self.low + term, self.high + term)

    def clipped(self, low: float, high: float) -> ClippedLine:
        return ClippedLine(self.scale, self.shift, min(max(self.low, low), high), min(max(self.high, low), high))

    @property
    def is_line(self) -> bool:
        return (self.low, self.high) == (-INFINITY, INFINITY)


def clipped_line(expression: Expression) -> ClippedLine | None:
    """The expression as a clipped straight line (any mix of sums, differences, products, quotients and clips with finite constants), else None."""
    if not isinstance(expression, tuple):
        return ClippedLine() if expression == "x" else None
    name, *arguments = expression
    limits = _clip_operands(expression)
    if limits is not None:
        inner = clipped_line(limits[0])
        return inner and inner.clipped(limits[1], limits[2])
    if name == "hard_sigmoid":
        return clipped_line(("clip", ("add", ("mul", arguments[0], arguments[1]), arguments[2]), 0.0, 1.0))
    if name == "neg":
        return clipped_line(("mul", arguments[0], -1.0))
    if name in ("add", "sub", "mul", "div"):
        return _line_step(name, arguments[0], arguments[1])
    return None


def _line_step(name: str, first: Expression, second: Expression) -> ClippedLine | None:
    """One arithmetic operation with a finite constant."""
    if any(isinstance(constant, float) and not math.isfinite(constant) for constant in (first, second)):
        return None
    if isinstance(second, float):
        inner, constant = clipped_line(first), second
        constant = -constant if name == "sub" else 1 / constant if name == "div" and constant else constant
        valid = math.isfinite(constant) and (name in ("add", "sub") or second != 0)
    else:
        inner, constant = clipped_line(second), first
        valid = isinstance(first, float) and math.isfinite(first) and name != "div" and (name != "mul" or first != 0)
        inner = inner.times(-1.0) if inner and name == "sub" else inner
    if inner is None or not valid:
        return None
    return inner.plus(constant) if name in ("add", "sub") else inner.times(constant)


def is_clip(expression: Expression) -> tuple[float, float] | None:
    """(low, high) if the expression is x limited to that range (ReLU, ReLU6, Clip, Max and Min with a constant, chains of them), else None."""
    line = clipped_line(expression)
    return (line.low, line.high) if line and not line.is_line and (line.scale, line.shift) == (1.0, 0.0) else None


def is_affine(expression: Expression) -> tuple[float, float] | None:
    """(scale, shift) if the expression is scale · x + shift with finite constants, else None. "x" itself is (1, 0)."""
    line = clipped_line(expression)
    return (line.scale, line.shift) if line and line.is_line else None


def bounds(expression: Expression) -> tuple[float, float]:
    """A range that holds for every x (infinite where nothing is known)."""
    if not isinstance(expression, tuple):
        return (-INFINITY, INFINITY) if expression == "x" else (expression, expression)
    name, *arguments = expression
    if name in ("max", "min", "clip", "relu"):
        parts = [bounds(argument) for argument in arguments]
        parts += [(0.0, 0.0)] if name == "relu" else []
        if name == "clip":
            (low, high), (floor, _), (_, ceiling) = parts
            return min(max(low, floor), ceiling), min(max(high, floor), ceiling)
        pick = min if name == "min" else max
        return pick(low for low, _ in parts), pick(high for _, high in parts)
    return FUNCTIONS[name].bounds


STEEP = frozenset({"sqrt", "log", "reciprocal"})
SMALL_OFFSET = 1e-3  # what is added to keep a logarithm finite, or a lower limit


def is_steep_at_zero(expression: Expression) -> bool:
    """Whether a root, logarithm or reciprocal is taken of x itself, scaled or kept from zero: small values then matter as much as large."""
    if not isinstance(expression, tuple):
        return False
    function, *arguments = expression
    root = function == "pow" and isinstance(arguments[1], float) and arguments[1] < 1
    return ((root or function in STEEP) and _vanishes_with_x(arguments[0])) or any(map(is_steep_at_zero, arguments))


def _vanishes_with_x(expression: Expression) -> bool:
    """Whether it is x, times a positive number, plus next to nothing, or no less than that."""
    if not isinstance(expression, tuple):
        return bool(expression == "x")
    function, inner, *others = expression
    if function == "mul":
        return inner == others[0] == "x" or (isinstance(others[0], float) and others[0] > 0 and _vanishes_with_x(inner))
    low = others[0] if others else None
    return function in ("add", "max", "clip") and isinstance(low, float) and 0 <= low <= SMALL_OFFSET and _vanishes_with_x(inner)


def size(expression: Expression) -> int:
    """Number of function applications, shared ones counted each time."""
    count, waiting = 0, [expression]
    while waiting:
        part = waiting.pop()
        if isinstance(part, tuple):
            count += 1
            waiting.extend(part[1:])
    return count


def text(expression: Expression) -> str:
    """`mul(x, clip(add(x, 3), 0, 6))`; constants are the shortest decimals that give the same float32."""
    if isinstance(expression, tuple):
        return f"{expression[0]}({', '.join(text(argument) for argument in expression[1:])})"
    if expression == "x":
        return "x"
    if 1e-5 <= abs(expression) < 1e7:
        return np.format_float_positional(np.float32(expression), trim="-")
    with np.errstate(over="ignore"):
        return "0" if expression == 0 else str(np.float32(expression))


# ---- ONNX -------------------------------------------------------------------------------------------------------------


@dataclass
class _Emitter:
    """Collects the ONNX nodes of one expression; equal subexpressions and constants are written once."""

    input_name: str
    fresh: Callable[[str], str]
    nodes: list[NodeProto] = field(default_factory=list)
    known: dict[Any, str] = field(default_factory=dict)

    def node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        output = self.fresh(operator.lower())
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: float) -> str:
        return self.node("Constant", [], value=helper.make_tensor("value", TensorProto.FLOAT, (), [np.float32(value)]))

    def emit(self, part: Expression) -> str:
        if part == "x":
            return self.input_name
        key = ("constant", np.float32(part).tobytes()) if not isinstance(part, tuple) else part
        if key not in self.known:
            self.known[key] = self.apply(part) if isinstance(part, tuple) else self.constant(part)
        return self.known[key]

    def apply(self, part: tuple[Any, ...]) -> str:
        function = FUNCTIONS[part[0]]
        if function.expansion is not None:
            return self.emit(function.expansion(*part[1:]))
        count = len(part) - len(function.onnx_attributes)
        attributes = dict(zip(function.onnx_attributes, part[count:], strict=True))
        inputs = [self.emit(argument) for argument in part[1:count]]
        if function.name == "where":
            inputs[0] = self.node("Cast", [inputs[0]], to=TensorProto.BOOL)
        output = self.node(function.operator, inputs, **attributes)
        return self.node("Cast", [output], to=TensorProto.FLOAT) if function.boolean else output


def emit(expression: Expression, input_name: str, fresh: Callable[[str], str], opset: int = 17, *, output: str = "") -> list[NodeProto]:
    """The ONNX nodes (opset 13 or later) that compute the expression in float32 from the tensor `input_name`.

    `fresh(stem)` yields an unused tensor name. The last node's first output is the result; it is named `output` if that is given.
    """
    assert opset >= 13, f"tables are written for ONNX opset 13 or later, not {opset}"
    emitter = _Emitter(input_name, fresh)
    result = emitter.emit(expression)
    if result == input_name or not isinstance(expression, tuple):
        emitter.node("Identity" if result == input_name else "Expand", [result] if result == input_name else [result, _shape_of(emitter)])
    assert emitter.nodes
    if output:
        emitter.nodes[-1].output[0] = output
    return emitter.nodes


def _shape_of(emitter: _Emitter) -> str:
    return emitter.node("Shape", [emitter.input_name])
