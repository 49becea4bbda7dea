"""Each rewrite: what it makes of the written-out form, that values stay, and when it must not apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, numpy_helper

from npucc import ops, scalar
from npucc.frontend import import_model
from npucc.graph import Graph, Node
from npucc.passes import STAGES, Alias, Rewrite, Rule, rewrite_graph
from tests.npucc.onnx_models import assert_agrees, fused, integers, model, node, normal, ops_of

IMAGE = (1, 4, 6, 6)
W = {"w": normal(4, 4, 3, 3) / 4, "b": normal(4)}
CHANNEL = normal(4, 1, 1, seed=5)
STATISTICS = {"s": normal(4), "t": normal(4, seed=1), "m": normal(4, seed=2), "v": np.abs(normal(4, seed=4)) + 0.1}


def graph_of(
    nodes: Sequence[NodeProto], constants: Mapping[str, Any], *, shape: tuple[int, ...] = IMAGE, outputs: Sequence[str] = ("y",), **options: Any
) -> Graph:
    """The fused graph of x → y, whose values were compared with the model's."""
    return assert_agrees(model(nodes, {"x": shape}, outputs, constants, **options), tolerance=1e-4)


def only(graph: Graph) -> Node:
    (single,) = graph
    return single


def clamp_of(part: Node) -> ops.Clamp:
    attributes: Any = part.attributes
    clamp: ops.Clamp = attributes.clamp
    return clamp


def reasons(
    nodes: Sequence[NodeProto], constants: Mapping[str, Any], *, shape: tuple[int, ...] = IMAGE, outputs: Sequence[str] = ("y",)
) -> dict[str, str]:
    _, refusals = fused(import_model(model(nodes, {"x": shape}, outputs, constants)))
    return {refusal.rule: refusal.reason for refusal in refusals}


# ---- folding into convolutions and matrix products

CONV = node("Conv", "x w b", "c", pads=[1, 1, 1, 1])
RELU6 = {"lo": np.float32(0), "hi": np.float32(6)}


@pytest.mark.parametrize(
    ("nodes", "constants", "clamp"),
    [
        ([node("BatchNormalization", "c s t m v", "y")], STATISTICS, None),
        ([node("BatchNormalization", "c s t m v", "n"), node("Relu", "n", "y")], STATISTICS, (0.0, np.inf)),
        ([node("Clip", "c lo hi", "y")], RELU6, (0.0, 6.0)),
        ([node("Min", "c hi", "n"), node("Max", "n lo", "y")], RELU6, (0.0, 6.0)),
        ([node("Mul", "c k", "y")], {"k": CHANNEL}, None),
        ([node("Div", "c k", "n"), node("Sub", "k n", "y")], {"k": CHANNEL}, None),
        ([node("Add", "k c", "n"), node("Relu", "n", "y")], {"k": CHANNEL}, (0.0, np.inf)),
        ([node("HardSigmoid", "c", "y", alpha=0.5)], {}, (0.0, 1.0)),
        ([node("Relu", "c", "n"), node("Mul", "n k", "y")], {"k": np.float32(-2)}, (-np.inf, 0.0)),
        ([node("Clip", "c lo hi", "n"), node("Add", "n k", "o"), node("Clip", "o lo hi", "y")], RELU6 | {"k": np.float32(-3)}, (0.0, 3.0)),
        ([node("Add", "c k", "n"), node("Clip", "n lo hi", "o"), node("Div", "o hi", "y")], RELU6 | {"k": np.float32(3)}, (0.0, 1.0)),
        ([node("Neg", "c", "y")], {}, None),
    ],
)  # fmt: skip
def test_folds_into_a_convolution(nodes: list[NodeProto], constants: dict[str, Any], clamp: ops.Clamp) -> None:
    conv = only(graph_of([CONV, *nodes], W | constants))
    assert conv.op == "conv"
    assert clamp_of(conv) == (None if clamp is None else pytest.approx(clamp))
    assert conv.name == "c"
    assert conv.sources == ("c", *(part.output[0] for part in nodes))


def test_folds_into_a_transposed_convolution_with_groups() -> None:
    constants = {"w": normal(4, 3, 2, 2), "k": normal(6, 1, 1)}
    nodes = [node("ConvTranspose", "x w", "c", group=2, strides=[2, 2]), node("Mul", "c k", "n"), node("Add", "n k", "o"), node("Relu", "o", "y")]
    assert ops_of(graph_of(nodes, constants)) == ["conv_transpose"]


def test_folds_into_a_matrix_product() -> None:
    constants = {"w": normal(5, 3), "k": normal(3), "one": np.float32(1)}
    nodes = [node("MatMul", "x w", "c"), node("Add", "c k", "n"), node("Mul", "k n", "o"), node("Sub", "one o", "p"), node("Relu", "p", "y")]
    product = only(graph_of(nodes, constants, shape=(2, 4, 5)))
    assert product.op == "matmul"
    assert len(product.inputs) == 3


def test_does_not_fold_a_result_with_other_readers() -> None:
    nodes = [CONV, node("Mul", "c k", "n"), node("Neg", "c", "m"), node("Concat", "n m", "y", axis=1)]
    graph = graph_of(nodes, W | {"k": CHANNEL})
    assert sorted(ops_of(graph)) == ["concat", "conv", "conv", "table"]
    assert reasons(nodes, W | {"k": CHANNEL})["fold-into-producer"] == "the result of 'c' has other readers"


def test_does_not_fold_into_a_graph_output() -> None:
    graph = graph_of([CONV, node("Relu", "c", "y")], W, outputs=("c", "y"))
    assert ops_of(graph) == ["conv", "table"]


def test_a_map_per_channel_after_a_clamp_stays() -> None:
    nodes = [CONV, node("Relu", "c", "r"), node("BatchNormalization", "r s t m v", "y")]
    graph = graph_of(nodes, W | STATISTICS)
    assert ops_of(graph) == ["conv", "conv"]
    assert reasons(nodes, W | STATISTICS)["fold-into-producer"] == "it is a different map per channel, after a clamp"


def test_a_constant_along_another_axis_is_no_channel_map() -> None:
    assert ops_of(graph_of([CONV, node("Mul", "c k", "y")], W | {"k": normal(6)})) == ["conv", "mul"]


def test_a_constant_that_widens_the_result_is_no_channel_map() -> None:
    constants = {"w": normal(1, 4, 3, 3), "k": CHANNEL}
    assert ops_of(graph_of([node("Conv", "x w", "c"), node("Mul", "c k", "y")], constants)) == ["conv", "mul"]


def test_weights_shared_by_two_layers_are_scaled_separately() -> None:
    nodes = [node("Conv", "x w", "a", pads=[1] * 4), node("Mul", "a k", "n"), node("Conv", "n w", "y", pads=[1] * 4)]
    graph = graph_of(nodes, {"w": W["w"], "k": CHANNEL})
    first, second = graph
    assert first.inputs[1] != second.inputs[1]


def test_a_scale_folds_into_the_next_convolution() -> None:
    constants = W | {"k": CHANNEL, "zero": np.float32(0)}
    padded = [node("MaxPool", "x", "p", kernel_shape=[2, 2]), node("Mul", "p k", "n"), node("Conv", "n w b", "y", pads=[1] * 4)]
    assert ops_of(graph_of(padded, constants)) == ["max_pool", "conv"]


def test_a_shift_folds_into_the_next_convolution_only_without_padding() -> None:
    def nodes(pad: int) -> list[NodeProto]:
        return [
            node("MaxPool", "x", "p", kernel_shape=[2, 2]),
            node("BatchNormalization", "p s t m v", "n"),
            node("Conv", "n w b", "y", pads=[pad] * 4),
        ]

    assert ops_of(graph_of(nodes(0), W | STATISTICS)) == ["max_pool", "conv"]
    assert ops_of(graph_of(nodes(1), W | STATISTICS)) == ["max_pool", "conv", "conv"]
    assert reasons(nodes(1), W | STATISTICS)["fold-into-reader"] == "its zero padding would have to be shifted by the affine map before it"


def test_a_scale_folds_into_the_next_grouped_convolution_and_matrix_product() -> None:
    grouped = [node("MaxPool", "x", "p", kernel_shape=[2, 2]), node("BatchNormalization", "p s t m v", "n"), node("Conv", "n g", "y", group=2)]
    assert ops_of(graph_of(grouped, STATISTICS | {"g": normal(6, 2, 3, 3)})) == ["max_pool", "conv"]
    product = [node("Abs", "x", "a"), node("Mul", "a k", "n"), node("Add", "n k", "o"), node("MatMul", "o w", "y")]
    assert ops_of(graph_of(product, {"k": normal(5), "w": normal(5, 3)}, shape=(2, 5))) == ["table", "matmul"]


def test_a_scale_moves_behind_a_max_pool_if_it_is_positive() -> None:
    def nodes(constants: dict[str, Any]) -> Graph:
        parts = [node("Sigmoid", "x", "r"), node("BatchNormalization", "r s t m v", "n"), node("MaxPool", "n", "y", kernel_shape=[2, 2])]
        return graph_of(parts, constants)

    assert ops_of(nodes(STATISTICS | {"s": np.abs(STATISTICS["s"])})) == ["table", "max_pool", "conv"]
    assert ops_of(nodes(STATISTICS)) == ["table", "conv", "max_pool"]


def test_a_scale_per_channel_becomes_a_depthwise_convolution() -> None:
    conv = list(graph_of([node("Tanh", "x", "a"), node("Mul", "a k", "n"), node("Add", "n k", "o"), node("Relu", "o", "y")], {"k": CHANNEL}))[1]
    assert isinstance(conv.attributes, ops.Conv)
    assert conv.attributes.groups == 4
    assert len(conv.inputs) == 3
    assert conv.attributes.clamp == (0.0, np.inf)


def test_a_clip_joins_the_addition_before_it() -> None:
    graph = graph_of([node("Tanh", "x", "a"), CONV, node("Add", "c a", "s"), node("Relu", "s", "y")], W)
    assert clamp_of(list(graph)[-1]) == (0.0, np.inf)
    assert ops_of(graph) == ["table", "conv", "add"]


def test_a_clip_moves_before_a_pool_or_concat_of_convolutions() -> None:
    pool = graph_of([CONV, node("MaxPool", "c", "p", kernel_shape=[2, 2]), node("Relu", "p", "y")], W)
    assert ops_of(pool) == ["conv", "max_pool"]
    both = [CONV, node("Conv", "x w", "d", pads=[1] * 4), node("Concat", "c d", "p", axis=1), node("Relu", "p", "y")]
    graph = graph_of(both, W)
    assert ops_of(graph) == ["conv", "conv", "concat"]
    assert all(clamp_of(part) == (0.0, np.inf) for part in graph if part.op == "conv")


# ---- tables

ACTIVATIONS = {
    "HardSwish": ([node("Add", "a three", "b"), node("Clip", "b lo hi", "c"), node("Mul", "a c", "d"),
    node("Div", "d hi", "y")], RELU6 | {"three": np.float32(3)}),
    "HardSwish by HardSigmoid": ([node("HardSigmoid", "a", "b", alpha=1 / 6), node("Mul", "b a", "y")], {}),
    "SiLU": ([node("Sigmoid", "a", "b"), node("Mul", "a b", "y")], {}),
    "SiLU written out": (
        [node("Neg", "a", "b"), node("Exp", "b", "c"), node("Add", "c one", "d"), node("Reciprocal", "d", "e"),
        node("Mul", "e a", "y")], {"one": np.float32(1)}),
    "GELU": (
        [node("Div", "a root", "b"), node("Erf", "b", "c"), node("Add", "c one", "d"), node("Mul", "a d", "e"), node("Mul", "e half", "y")],
        {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}),
    "GELU by tanh": (
        [node("Pow", "a three", "b"), node("Mul", "b k", "c"), node("Add", "a c", "d"), node("Mul", "d l", "e"), node("Tanh", "e", "f"),
        node("Add", "f one", "g"),
         node("Mul", "a half", "h"), node("Mul", "h g", "y")],
        {"three": np.float32(3), "k": np.float32(0.044715), "l": np.float32(0.79788), "one": np.float32(1), "half": np.float32(0.5)}),
    "Mish": ([node("Softplus", "a", "b"), node("Tanh", "b", "c"), node("Mul", "a c", "y")], {}),
    "PReLU": ([node("Relu", "a", "b"), node("Neg", "a", "c"), node("Relu", "c", "d"), node("Mul", "d k", "e"),
    node("Sub", "b e", "y")], {"k": np.float32(0.25)}),
    "threshold": ([node("Greater", "a one", "b"), node("Where", "b a zero", "y")], {"one": np.float32(1), "zero": np.float32(0)}),
    "uniform tensor": ([node("Mul", "a k", "b"), node("Tanh", "b", "y")], {"k": np.full((4, 1, 1), 0.5, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_function_of_one_tensor_is_one_table(name: str) -> None:
    nodes, constants = ACTIVATIONS[name]
    table = only(graph_of([node("Identity", "x", "a"), *nodes], constants))
    assert table.op == "table"
    assert table.inputs == ("x",)
    assert set(table.sources) == {part.output[0] for part in nodes}


def test_shared_parts_stay_for_their_other_readers() -> None:
    nodes = [node("Sigmoid", "x", "s"), node("Mul", "x s", "m"), node("GlobalAveragePool", "s", "p"), node("Add", "m p", "y")]
    graph = graph_of(nodes, {})
    assert ops_of(graph).count("table") == 2
    assert [part.inputs for part in graph if part.op == "table"] == [("x",), ("x",)]


def test_a_table_is_not_fused_across_a_graph_output() -> None:
    graph = graph_of([node("Sigmoid", "x", "s"), node("Tanh", "s", "y")], {}, outputs=("s", "y"))
    assert [part.inputs for part in graph] == [("x",), ("s",)]


def test_two_variables_make_no_table() -> None:
    graph = assert_agrees(model([node("Sigmoid", "x", "s"), node("Mul", "s z", "y")], {"x": (3,), "z": (3,)}, ["y"]))
    assert ops_of(graph) == ["table", "mul"]


def test_a_broadcast_that_widens_makes_no_table() -> None:
    assert ops_of(graph_of([node("Sigmoid", "x", "s"), node("Add", "s k", "y")], {"k": np.ones((4, 1), np.float32)}, shape=(1, 5))) == [
        "table",
        "add",
    ]


def test_long_chains_become_several_tables() -> None:
    chain = [node("Sin" if i % 2 else "Neg", f"t{i}", f"t{i + 1}") for i in range(300)]
    graph = fused(import_model(model(chain, {"t0": (3,)}, ["t300"])))[0]
    assert 2 <= len(graph.nodes) < 20
    assert all(scalar.size(part.attributes.expression) <= 64 for part in graph if isinstance(part.attributes, ops.Table))


# ---- padding


def padded(
    operator: str, value: float, *, before: Sequence[NodeProto] = (), x: str = "x", **attributes: Any
) -> tuple[list[NodeProto], dict[str, Any]]:
    inputs = "p w b" if operator == "Conv" else "p"
    nodes = [*before, node("Pad", f"{x} pads value", "p"), node(operator, inputs, "y", **attributes)]
    return nodes, {"pads": [0, 0, 1, 0, 0, 0, 2, 1], "value": np.float32(value)} | (W if operator == "Conv" else {})


def test_padding_joins_a_convolution() -> None:
    conv = only(graph_of(*padded("Conv", 0.0, pads=[1, 1, 1, 1])))
    assert isinstance(conv.attributes, ops.Conv)
    assert conv.attributes.pads == (2, 1, 3, 2)


def test_padding_joins_a_max_pool() -> None:
    pool = only(graph_of(*padded("MaxPool", -np.inf, kernel_shape=[3, 3])))
    assert isinstance(pool.attributes, ops.Pool)
    assert pool.attributes.pads == (1, 0, 2, 1)


def test_zero_padding_joins_a_max_pool_after_a_relu() -> None:
    assert ops_of(graph_of(*padded("MaxPool", 0.0, before=[node("Relu", "x", "r")], x="r", kernel_shape=[3, 3]))) == ["table", "max_pool"]
    nodes, constants = padded("MaxPool", 0.0, kernel_shape=[3, 3])
    assert ops_of(graph_of(nodes, constants)) == ["pad", "max_pool"]
    assert reasons(nodes, constants)["fold-pad"] == "the padding value 0.0 could exceed an element"


def test_padding_joins_an_average_pool_that_then_counts_it() -> None:
    pool = only(graph_of(*padded("AveragePool", 0.0, kernel_shape=[3, 3])))
    assert isinstance(pool.attributes, ops.Pool)
    assert pool.attributes.count_include_pad
    nodes, constants = padded("AveragePool", 0.0, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    assert ops_of(graph_of(nodes, constants)) == ["pad", "average_pool"]


@pytest.mark.parametrize(
    ("value", "mode", "reason"), [(1.0, b"constant", "the padding value is 1.0, not 0"), (0.0, b"reflect", "the padding is reflect, not constant")]
)
def test_padding_that_stays(value: float, mode: bytes, reason: str) -> None:
    nodes, constants = padded("Conv", value)
    nodes[0].attribute.append(node("Pad", "x", "y", mode=mode).attribute[0])
    assert ops_of(graph_of(nodes, constants)) == ["pad", "conv"]
    assert reasons(nodes, constants)["fold-pad"] == reason


# ---- LayerNorm and Softmax


def layer_norm(form: str, axes: Sequence[int] = (-1,), *, x: str = "x") -> tuple[list[NodeProto], dict[str, Any]]:
    """x → y, written out."""
    mean = [node("ReduceMean", x, "mean", axes=list(axes)), node("Sub", f"{x} mean", "d")]
    variance = [node("Mul", "d d", "q"), node("ReduceMean", "q", "var", axes=list(axes))]
    if "moments" in form:
        variance = [
            node("Mul", f"{x} {x}", "q"),
            node("ReduceMean", "q", "q1", axes=list(axes)),
            node("Mul", "mean mean", "q2"),
            node("Sub", "q1 q2", "v0"),
            node("Max", "v0 zero", "var"),
        ]
    if "power" in form:
        variance[0] = node("Pow", "d two", "q")
    root = [node("Add", "var epsilon", "e"), node("Sqrt", "e", "r")]
    inverse = [*root, node("Reciprocal", "r", "i")]
    if "half power" in form:
        inverse = [root[0], node("Pow", "e minus_half", "i")]
    tails = {
        "divide": [*root, node("Div", "d r", "n"), node("Mul", "n gamma", "g"), node("Add", "g beta", "y")],
        "inverse": [*inverse, node("Mul", "d i", "n"), node("Mul", "gamma n", "g"), node("Add", "beta g", "y")],
        "factor": [*inverse, node("Mul", "i gamma", "f"), node("Mul", "f d", "g"), node("Add", "g beta", "y")],
        "tensorflow": [
            *inverse,
            node("Mul", "i gamma", "f"),
            node("Mul", f"{x} f", "g"),
            node("Mul", "mean f", "h"),
            node("Sub", "beta h", "j"),
            node("Add", "g j", "y"),
        ],
        "plain": [*root, node("Div", "d r", "y")],
    }
    constants = {
        "epsilon": np.float32(1e-3),
        "zero": np.float32(0),
        "two": np.float32(2),
        "minus_half": np.float32(-0.5),
        "gamma": normal(8),
        "beta": normal(8, seed=1),
    }
    return [*mean, *variance, *tails[form.split()[0]]], constants


@pytest.mark.parametrize(
    "form",
    ["divide", "divide power", "divide moments", "inverse", "inverse half power", "factor", "factor moments", "tensorflow", "tensorflow moments"],
)
def test_written_layer_norm(form: str) -> None:
    nodes, constants = layer_norm(form)
    norm = only(graph_of(nodes, constants, shape=(2, 3, 8), opset=13))
    assert norm.op == "layer_norm"
    assert len(norm.inputs) == 3
    assert norm.attributes == ops.LayerNorm(float(np.float32(1e-3)))


def test_written_layer_norm_with_sums_instead_of_means() -> None:
    nodes, constants = layer_norm("divide")
    constants |= {"axis": [-1], "inverse_count": np.float32(1 / 8), "count": np.float32(8)}
    nodes[0:1] = [node("ReduceSum", "x axis", "total"), node("Mul", "total inverse_count", "mean")]
    nodes[4:5] = [node("ReduceSum", "q axis", "total2"), node("Div", "total2 count", "var")]
    assert ops_of(graph_of(nodes, constants, shape=(2, 3, 8), opset=13)) == ["layer_norm"]


def test_written_layer_norm_over_other_axes() -> None:
    nodes, constants = layer_norm("plain", (1,))
    assert ops_of(graph_of(nodes, constants, shape=(2, 8, 3), opset=13)) == ["transpose", "layer_norm", "transpose"]
    nodes, constants = layer_norm("plain", (2, 3))
    assert ops_of(graph_of(nodes, constants, shape=(2, 3, 4, 5), opset=13)) == ["reshape", "layer_norm", "reshape"]


@pytest.mark.parametrize("form", ["divide", "inverse", "power", "factor"])
def test_written_rms_norm(form: str) -> None:
    tails = {
        "divide": [node("Sqrt", "e", "s"), node("Div", "x s", "n"), node("Mul", "n gamma", "y")],
        "inverse": [node("Sqrt", "e", "s"), node("Div", "one s", "i"), node("Mul", "x i", "n"), node("Mul", "gamma n", "y")],
        "power": [node("Pow", "e minus_half", "i"), node("Mul", "x i", "n"), node("Mul", "n gamma", "y")],
        "factor": [node("Sqrt", "e", "s"), node("Reciprocal", "s", "i"), node("Mul", "i gamma", "f"), node("Mul", "x f", "y")],
    }
    nodes = [node("Pow", "x two", "q"), node("ReduceMean", "q", "m", axes=[-1]), node("Add", "m epsilon", "e"), *tails[form]]
    values = {"two": 2, "one": 1, "minus_half": -0.5, "epsilon": 1e-3}
    constants = {**{name: np.float32(value) for name, value in values.items()}, "gamma": normal(8)}
    norm = only(graph_of(nodes, constants, shape=(2, 3, 8), opset=13))
    assert (norm.op, len(norm.inputs)) == ("layer_norm", 2)
    assert norm.attributes == ops.LayerNorm(float(np.float32(1e-3)), centered=False)


def test_a_near_layer_norm_is_refused_with_a_reason() -> None:
    nodes, constants = layer_norm("plain")
    nodes[3] = node("ReduceMean", "q", "var", axes=[1])
    proto = model(nodes, {"x": (2, 8, 8)}, ["y"], constants, opset=13)
    graph = assert_agrees(proto)
    assert [node.attributes.centered for node in graph if isinstance(node.attributes, ops.LayerNorm)] == [False]
    _, refusals = fused(import_model(proto))
    assert [refusal.reason for refusal in refusals if refusal.rule == "written-layer-norm"] == [
        "mean and variance are taken over different axes, (2,) and (1,)"
    ]


def test_a_difference_of_other_tensors_is_not_centered() -> None:
    nodes, constants = layer_norm("plain")
    nodes[1] = node("Sub", "z mean", "d")
    graph = assert_agrees(model(nodes, {"x": (2, 8), "z": (2, 8)}, ["y"], constants, opset=13))
    assert [node.attributes.centered for node in graph if isinstance(node.attributes, ops.LayerNorm)] == [False]


@pytest.mark.parametrize("form", ["maximum", "plain", "scaled", "reciprocal"])
def test_written_softmax(form: str) -> None:
    axis = numpy_helper.from_array(integers([1]), "axis")
    start = [node("Sub", "x m", "d")] if form == "maximum" else [node("Mul", "x half", "d")] if form == "scaled" else [node("Identity", "x", "d")]
    end = [node("Reciprocal", "t", "r"), node("Mul", "r e", "y")] if form == "reciprocal" else [node("Div", "e t", "y")]
    nodes = [node("ReduceMax", "x", "m", axes=[1]), *start, node("Exp", "d", "e"), node("ReduceSum", "e axis", "t"), *end]
    graph = graph_of(nodes, {"axis": numpy_helper.to_array(axis), "half": np.float32(0.5)}, shape=(2, 5, 3), opset=13)
    assert ops_of(graph) == (["table", "softmax"] if form == "scaled" else ["softmax"])
    assert list(graph)[-1].attributes == ops.Softmax(1)


@pytest.mark.parametrize("form", ["sum", "mean", "scaled", "with epsilon"])
def test_logarithm_of_a_sum_of_exponentials(form: str) -> None:
    start = [node("Mul", "x half", "d")] if form == "scaled" else [node("Identity", "x", "d")]
    total = node("ReduceMean", "e", "t", axes=[1]) if form == "mean" else node("ReduceSum", "e axis", "t", keepdims=0)
    end = [node("Add", "t half", "u"), node("Log", "u", "y")] if form == "with epsilon" else [node("Log", "t", "y")]
    graph = graph_of([*start, node("Exp", "d", "e"), total, *end], {"axis": integers([1]), "half": np.float32(0.5)}, shape=(2, 5, 3), opset=13)
    assert "reduce_max" in ops_of(graph)


@pytest.mark.parametrize("limit", [False, True])
def test_logarithm_of_a_softmax(limit: bool) -> None:
    nodes = [node("Softmax", "x", "s", axis=1), node("Clip", "s least", "c") if limit else node("Identity", "s", "c"), node("Log", "c", "y")]
    graph = graph_of(nodes, {"least": np.float32(1e-3)}, shape=(2, 5, 3), opset=13)
    assert ops_of(graph)[:5] == ["reduce_max", "sub", "table", "reduce_sum", "table"]


# ---- infinity


def attention() -> list[NodeProto]:
    """Masked scores, and zero for rows that are masked whole, as exporters write it."""
    return [
        node("MatMul", "x x2", "s"), node("Add", "s mask", "t"), node("Softmax", "t", "p", axis=-1), node("IsNaN", "p", "n"),
        node("Where", "n zero p", "y"),
    ]  # fmt: skip


@pytest.mark.parametrize("low", [-np.inf, -1e4])
def test_a_row_that_no_mask_reaches_is_not_tested(low: float) -> None:
    mask = np.where(np.tri(4, 4, -1) > 0, 0, low).astype(np.float32)
    proto = model(attention(), {"x": (4, 8)}, ["y"], {"x2": normal(8, 4), "mask": mask, "zero": np.float32(0)})
    tested = {"reduce_max", "compare", "where"} <= set(ops_of(fused(import_model(proto))[0]))
    assert tested == np.isinf(low)


# ---- layout


def test_reshapes_around_line_convolutions_cancel() -> None:
    nodes = [
        node("Conv", "x w", "a", pads=[1, 1]), node("BatchNormalization", "a s t m v", "b"), node("Relu", "b", "c"),
        node("Conv", "c w", "d", pads=[1, 1]), node("Add", "d k", "e"), node("Add", "e c", "f"), node("MaxPool", "f", "g", kernel_shape=[2]),
        node("Conv", "g w", "y"),
    ]  # fmt: skip
    graph = graph_of(nodes, STATISTICS | {"w": normal(4, 4, 3) / 3, "k": normal(4, 1)}, shape=(1, 4, 10))
    assert ops_of(graph) == ["reshape", "conv", "conv", "add", "max_pool", "conv", "reshape"]


def test_a_channels_last_island_needs_no_transposes() -> None:
    nodes = [
        CONV, node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Mul", "t k", "m"), node("Add", "m k", "n"), node("Sigmoid", "n", "o"),
        node("Transpose", "o", "y", perm=[0, 3, 1, 2]),
    ]  # fmt: skip
    assert ops_of(graph_of(nodes, W | {"k": normal(4)})) == ["conv", "table"]


def test_moves_that_change_nothing_are_dropped() -> None:
    nodes = [
        node("Reshape", "x same", "a"), node("Transpose", "a", "b", perm=[0, 2, 3, 1]), node("Transpose", "b", "c", perm=[0, 3, 1, 2]),
        node("Concat", "c", "d", axis=0),
        node("Slice", "d zero five", "e"), node("Expand", "e same", "f"), node("Relu", "f", "y"),
    ]  # fmt: skip
    assert ops_of(graph_of(nodes, {"same": list(IMAGE), "zero": [0], "five": [5]})) == ["table"]


def test_transposes_through_dimensions_of_one_meet() -> None:
    nodes = [node("Transpose", "x", "a", perm=[0, 2, 1]), node("Unsqueeze", "a axes", "b"), node("Transpose", "b", "y", perm=[0, 2, 1, 3])]
    assert ops_of(graph_of(nodes, {"axes": [3]}, shape=(1, 3, 4))) == ["reshape"]


def test_a_matrix_product_between_reshapes() -> None:
    constants = {"flat": [-1, 8], "w": normal(8, 6), "b": normal(6), "back": [2, 3, 6]}
    nodes = [node("Reshape", "x flat", "a"), node("Gemm", "a w b", "g"), node("Reshape", "g back", "y")]
    assert ops_of(graph_of(nodes, constants, shape=(2, 3, 8))) == ["matmul"]


def parts(*forms: NodeProto, order: str = "q k v") -> list[NodeProto]:
    """A product whose result is cut in three, and something that reads each third apart."""
    q, k, v = order.split()
    return [node("MatMul", "x w", "p"), node("Add", "p b", "c"), *forms, node("MatMul", f"{q} {k}", "s"), node("MatMul", f"s {v}", "y")]


HEADS = {"w": normal(16, 96), "b": normal(96), "thirds": integers([32, 32, 32]), "five": integers([1, 4, 3, 8, 4]), "one": integers([1, 1, 1])}


@pytest.mark.parametrize(
    "forms",
    [
        [node("Split", "c thirds", "q kt v", axis=2), node("Transpose", "kt", "k", perm=[0, 2, 1])],
        [
            node("Reshape", "c five", "r"), node("Transpose", "r", "t", perm=[2, 0, 3, 1, 4]), node("Split", "t one", "q kt v", axis=0),
            node("Transpose", "kt", "k", perm=[0, 1, 2, 4, 3]),
        ],
    ],
    ids=["split", "reshape and transpose"],
)  # fmt: skip
def test_a_product_is_cut_where_its_result_is(forms: list[NodeProto]) -> None:
    graph = graph_of(parts(*forms), HEADS, shape=(1, 4, 16))
    assert "slice" not in ops_of(graph)
    weights = [graph.tensors[part.inputs[1]] for part in graph if part.op == "matmul"]
    assert [each.shape for each in weights if each.is_constant] == [(16, 32)] * 3


def test_a_convolution_is_cut_backwards_too() -> None:
    places = {"start": -1, "end": -17, "step": -1, "zero": 0, "half": 16, "axis": 1}
    constants = {"w": normal(32, 4, 3, 3), **{name: integers([place]) for name, place in places.items()}}
    cuts = [node("Slice", "c start end axis step", "q"), node("Slice", "c zero half axis", "v"), node("Sub", "q v", "y")]
    assert ops_of(graph_of([node("Conv", "x w", "c", pads=[1] * 4), *cuts], constants)) == ["conv", "conv", "sub"]


def test_a_product_stays_whole_where_something_reads_all_of_it_or_its_parts_are_small() -> None:
    split = node("Split", "c thirds", "q k v", axis=2)
    together = [node("MatMul", "x w", "c"), split, node("Mul", "q k", "m"), node("Mul", "m v", "y")]
    assert ops_of(graph_of([*together, node("Neg", "c", "z")], HEADS, shape=(1, 4, 16), outputs=("y", "z"))).count("matmul") == 1
    small = {"w": normal(16, 12), "thirds": integers([4, 4, 4])}
    assert ops_of(graph_of(together, small, shape=(1, 4, 16))).count("matmul") == 1
    assert "3 products of 4, 4, 4 channels take longer than one of 12" in reasons(together, small, shape=(1, 4, 16)).values()


def test_an_operand_needs_no_expand() -> None:
    nodes = [
        node("ReduceMax", "x", "m", axes=[3]),
        node("Expand", "m shape", "e"),
        node("Sub", "x e", "a"),
        node("Mul", "e e", "b"),
        node("Add", "a b", "y"),
    ]
    assert ops_of(graph_of(nodes, {"shape": list(IMAGE)})).count("expand") == 1  # for e · e, which has no other operand of the shape


def test_the_same_operation_twice_is_done_once() -> None:
    nodes = [node("ReduceMax", "x", "m", axes=[1]), node("ReduceMax", "x", "n", axes=[1]), node("Sub", "x m", "a"), node("Mul", "a n", "y")]
    assert ops_of(graph_of(nodes, {})) == ["reduce_max", "sub", "mul"]


def test_what_an_output_needs_is_kept() -> None:
    """An operation that does nothing between an input and an output, or between two outputs, can't go."""
    graph = graph_of([node("Identity", "x", "y"), node("Relu", "x", "z"), node("Identity", "z", "u")], {}, outputs=("y", "z", "u"))
    assert graph.outputs == ("y", "z", "u")


# ---- the engine


def test_a_typical_network_as_text(golden: Callable[[str, str], None]) -> None:
    """Convolution, batch normalization, HardSwish, squeeze and excitation, residual, pool, classifier."""
    constants = W | STATISTICS | {"e": normal(2, 4, 1, 1), "f": normal(4, 2, 1, 1), "g": normal(4, 3), "three": np.float32(3), **RELU6}
    nodes = [
        CONV, node("BatchNormalization", "c s t m v", "n"),
        node("Add", "n three", "h1"), node("Clip", "h1 lo hi", "h2"), node("Mul", "n h2", "h3"), node("Div", "h3 hi", "h"),
        node("GlobalAveragePool", "h", "p"), node("Conv", "p e", "q1"), node("Relu", "q1", "q2"), node("Conv", "q2 f", "q3"),
        node("HardSigmoid", "q3", "q"),
        node("Mul", "h q", "i"), node("Add", "i x", "j"), node("Relu", "j", "k"),
        node("GlobalAveragePool", "k", "l"), node("Flatten", "l", "o"), node("Gemm", "o g", "r"), node("Softmax", "r", "y"),
    ]  # fmt: skip
    golden("passes_typical.txt", graph_of(nodes, constants).text())


def test_stages_have_names_and_reasons_and_return_verified_graphs() -> None:
    graph = import_model(model([CONV, node("Relu", "c", "y")], {"x": IMAGE}, ["y"], W))
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert stage.why
        graph, refusals = stage.run(graph)
        assert isinstance(refusals, tuple)


def test_all_rules_have_unique_names_examples_and_reasons() -> None:
    from npucc.passes import affine, infinities, layout, padding, patterns, tables

    rules: list[Rule] = [*affine.FOLD_RULES, *affine.FORWARD_RULES, *affine.DEPTHWISE_RULES, *layout.LAYOUT_RULES]
    rules += infinities.INFINITY_RULES
    rules += [*padding.PADDING_RULES, *patterns.PATTERN_RULES, *tables.TABLE_RULES]
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.why
        assert "→" in (rule.apply.__doc__ or ""), f"{rule.name} has no before → after"
        assert rule.roots <= set(ops.OPS)


def test_stages_are_idempotent() -> None:
    nodes = [CONV, node("BatchNormalization", "c s t m v", "n"), node("Sigmoid", "n", "a"), node("Mul", "n a", "y")]
    graph = graph_of(nodes, W | STATISTICS)
    assert fused(graph)[0].text() == graph.text()


def test_rules_that_undo_each_other_are_found() -> None:
    graph = import_model(model([node("Relu", "x", "y")], {"x": (2,)}, ["y"]))

    def flip(_: Any, part: Node) -> Rewrite:
        expression = "x" if isinstance(part.attributes, ops.Table) and part.attributes.expression != "x" else ("relu", "x")
        return Rewrite((Node(part.name, "table", part.inputs, part.outputs, ops.Table(expression)),))

    with pytest.raises(AssertionError, match="rule flip does not come to an end at"):
        rewrite_graph(graph, [Rule("flip", frozenset({"table"}), flip, "a mistake")])


def test_refusals_of_nodes_that_are_gone_are_not_reported() -> None:
    graph = import_model(model([node("Relu", "x", "a"), node("Neg", "a", "y")], {"x": (2,)}, ["y"]))

    def drop(_: Any, part: Node) -> Any:
        return "not this one" if part.name == "y" else Alias(part.inputs[0])

    result, refusals = rewrite_graph(graph, [Rule("drop", frozenset({"table"}), drop, "a test")])
    assert ops_of(result) == ["table"]
    assert [str(refusal) for refusal in refusals] == ["drop at 'y': not this one"]


def test_nodes_keep_their_place_in_the_order() -> None:
    """A replaced node stays where it was, so that a later schedule is not disturbed."""
    nodes = [
        node("Conv", "x w", "a", pads=[1] * 4),
        node("Conv", "x w b", "d", pads=[1] * 4),
        node("Relu", "a", "r"),
        node("Concat", "r d", "y", axis=1),
    ]
    assert [part.sources[0] for part in graph_of(nodes, W)] == ["a", "d", "y"]
