"""Expressions: values equal onnxruntime's, simplification changes no value, and what is said of an expression holds."""

from __future__ import annotations

import math
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from npucc import scalar
from tests.npucc.onnx_models import reals, run

POINTS = np.concatenate([np.linspace(-9, 9, 2001), [0.0, -0.0, 1e-20, 1e20, -1e20]]).astype(np.float32)
CONSTANTS = {"clip": (-1.0, 2.0), "hard_sigmoid": (0.3, 0.4), "selu": (1.5, 1.1), "where": (0.25, -0.5)}


def applied(function: scalar.Function) -> scalar.Expression:
    """The function of x, with constants for its other arguments."""
    if function.name == "where":
        return ("where", ("gt", "x", 0.5), "x", -0.5)
    return (function.name, "x", *CONSTANTS.get(function.name, (0.7,) * (function.arity - 1)))


def in_onnxruntime(expression: scalar.Expression, x: np.ndarray) -> np.ndarray:
    numbers = count()
    nodes = scalar.emit(expression, "x", lambda stem: f"{stem}{next(numbers)}", output="y")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "table", value[:1], value[1:])
    return run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), {"x": x})[0]


@pytest.mark.parametrize("function", scalar.TABLE, ids=lambda function: function.name)
def test_each_function_equals_onnxruntime(function: scalar.Function) -> None:
    x = POINTS[np.abs(POINTS) < 1e10]
    expression = applied(function)
    np.testing.assert_allclose(scalar.evaluate(expression, x), in_onnxruntime(expression, x), rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("expression", ["x", 2.5, scalar.gelu(), scalar.gelu(tanh=True), ("mul", "x", ("sigmoid", "x"))], ids=scalar.text)
def test_compositions_equal_onnxruntime(expression: scalar.Expression) -> None:
    x = POINTS[np.abs(POINTS) < 1e10]
    np.testing.assert_allclose(scalar.evaluate(expression, x), in_onnxruntime(expression, x), rtol=1e-5, atol=2e-6)


def test_every_step_is_rounded_to_float32() -> None:
    x = reals([16777216.0])
    assert scalar.evaluate(("sub", ("add", "x", 1.0), "x"), x)[0] == 0  # in float64 it would be 1
    assert scalar.evaluate(("add", "x", 1.0), x).dtype == np.float32


def test_functions_have_one_meaning_and_unique_names() -> None:
    assert len(scalar.FUNCTIONS) == len(scalar.TABLE)
    for function in scalar.TABLE:
        assert (function.compute is None) == (function.expansion is not None), function.name
        assert bool(function.operator) == (function.compute is not None), function.name


@pytest.mark.parametrize("function", scalar.TABLE, ids=lambda function: function.name)
def test_bounds_hold(function: scalar.Function) -> None:
    low, high = scalar.bounds(applied(function))
    values = scalar.evaluate(applied(function), POINTS)
    values = values[~np.isnan(values)]
    assert low <= values.min()
    assert values.max() <= high


numbers = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, math.inf, -math.inf])
expressions = st.recursive(
    st.just("x") | numbers,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div", "max", "min"]), inner, inner),
        st.tuples(st.sampled_from(["relu", "neg", "abs", "tanh", "sigmoid", "hard_swish", "trunc"]), inner),
        st.tuples(st.just("clip"), inner, st.just(-1.0), st.just(2.0)),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_simplify_changes_no_value(expression: scalar.Expression) -> None:
    simple = scalar.simplify(expression)
    np.testing.assert_array_equal(scalar.evaluate(simple, POINTS), scalar.evaluate(expression, POINTS))
    assert scalar.size(simple) <= scalar.size(expression)


@settings(max_examples=200, deadline=None)
@given(expressions, expressions)
def test_compose_is_one_after_the_other(outer: scalar.Expression, inner: scalar.Expression) -> None:
    whole = scalar.evaluate(scalar.compose(outer, inner), POINTS)
    np.testing.assert_array_equal(whole, scalar.evaluate(outer, scalar.evaluate(inner, POINTS)))


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_clipped_lines_are_that(expression: scalar.Expression) -> None:
    line = scalar.clipped_line(expression)
    if line is None:
        return
    x = np.linspace(-20, 20, 101)
    expected = np.minimum(np.maximum(line.scale * x + line.shift, line.low), line.high)
    np.testing.assert_allclose(scalar.evaluate(expression, x.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("expression", "limits"),
    [
        (("relu", "x"), (0.0, math.inf)),
        (("min", ("max", "x", 0.0), 6.0), (0.0, 6.0)),
        (("min", 6.0, ("relu", "x")), (0.0, 6.0)),
        (("clip", ("relu", "x"), -3.0, 4.0), (0.0, 4.0)),
        (("relu", ("clip", "x", -3.0, -1.0)), (0.0, 0.0)),
        ("x", None),
        (("add", "x", 1.0), None),
        (("leaky_relu", "x", 0.1), None),
        (("clip", "x", math.nan, 1.0), None),
    ],
)
def test_is_clip(expression: scalar.Expression, limits: tuple[float, float] | None) -> None:
    assert scalar.is_clip(expression) == limits


@pytest.mark.parametrize(
    ("expression", "affine"),
    [
        ("x", (1.0, 0.0)),
        (("div", ("add", "x", 3.0), 2.0), (0.5, 1.5)),
        (("sub", 1.0, ("mul", 2.0, "x")), (-2.0, 1.0)),
        (("neg", ("sub", "x", 4.0)), (-1.0, 4.0)),
        (("div", 1.0, "x"), None),
        (("div", "x", 0.0), None),
        (("mul", "x", 0.0), None),
        (("mul", "x", "x"), None),
        (("mul", "x", math.inf), None),
        (("relu", "x"), None),
    ],
)
def test_is_affine(expression: scalar.Expression, affine: tuple[float, float] | None) -> None:
    assert scalar.is_affine(expression) == affine


def test_hard_sigmoid_is_a_clipped_line() -> None:
    assert scalar.clipped_line(("hard_sigmoid", "x", 0.25, 0.5)) == scalar.ClippedLine(0.25, 0.5, 0.0, 1.0)


def test_text() -> None:
    assert scalar.text(("mul", "x", ("clip", ("add", "x", 3.0), 0.0, 6.0))) == "mul(x, clip(add(x, 3), 0, 6))"
    assert scalar.text(("max", "x", -math.inf)) == "max(x, -inf)"
    assert scalar.text(0.1) == "0.1"
    assert scalar.text(1e-7) == "1e-07"


def test_shared_subexpressions_are_written_once() -> None:
    part = ("sigmoid", "x")
    numbers = count()
    nodes = scalar.emit(("add", ("mul", part, part), part), "x", lambda stem: f"{stem}{next(numbers)}")
    assert [node.op_type for node in nodes] == ["Sigmoid", "Mul", "Add"]
