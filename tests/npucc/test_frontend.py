"""What an import makes of a model: names, constants, shapes, types, outputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import npucc
from npucc.errors import ImportModelError, NpuccError
from npucc.frontend import import_model, supported_operators
from tests.npucc.onnx_models import assert_agrees, integers, model, node, normal, ops_of, reals, save


def test_a_small_network_as_text(golden: Callable[[str, str], None]) -> None:
    proto = model(
        [
            node("Conv", "x w b", "c", name="first", strides=[2, 2], pads=[1, 1, 1, 1]),
            node("BatchNormalization", "c s t m v", "n"),
            node("Relu", "n", "r"),
            node("GlobalAveragePool", "r", "p"),
            node("Flatten", "p", "f"),
            node("Gemm", "f u", "y", transB=1),
        ],
        {"x": (1, 3, 8, 8)},
        ["y"],
        {"w": normal(4, 3, 3, 3), "b": normal(4), "s": normal(4), "t": normal(4), "m": normal(4), "v": np.ones(4, np.float32), "u": normal(2, 4)},
    )
    golden("frontend_small.txt", import_model(proto).text())


def test_path_and_proto_give_the_same_graph(tmp_path: Path) -> None:
    proto = model([node("Conv", "x w", "y")], {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 2, 1, 1)})
    path = save(proto, tmp_path / "model.onnx")
    assert import_model(path).text() == import_model(Path(path)).text() == import_model(proto).text()


def test_the_given_proto_is_not_changed() -> None:
    proto = model([node("Cast", "x", "h", to=TensorProto.FLOAT16), node("Relu", "h", "y")], {"x": (2, 3)}, ["y"], dtypes={"y": "float16"})
    before = proto.SerializeToString()
    import_model(proto)
    assert proto.SerializeToString() == before


def test_nodes_get_unique_names_and_any_characters_are_kept() -> None:
    graph = import_model(
        model(
            [node("Relu", "输入", "à/1", name="same"), node("Abs", "à/1", "t:0", name="same"), node("Neg", "t:0", "выход")],
            {"输入": (2, 3)},
            ["выход"],
        )
    )
    assert [part.name for part in graph] == ["same", "same.2", "выход"]
    assert [part.sources for part in graph] == [("same",), ("same.2",), ("выход",)]
    assert graph.inputs == ("输入",)
    assert graph.outputs == ("выход",)
    assert graph.tensors["à/1"].source == "à/1"


def test_a_name_that_the_import_would_choose_may_exist_already() -> None:
    """A 1-D convolution emits reshapes called y/reshape; the model has such a tensor."""
    proto = model(
        [node("Conv", "x w", "y"), node("Relu", "y", "y/reshape"), node("Neg", "y/reshape", "y/conv")],
        {"x": (1, 2, 5)},
        ["y/conv"],
        {"w": normal(2, 2, 3)},
    )
    assert_agrees(proto)


def test_unsorted_nodes_are_sorted_and_unneeded_ones_dropped() -> None:
    proto = model(
        [node("Neg", "a", "y"), node("NonMaxSuppression", "x x", "unused"), node("Relu", "x", "a"), node("Abs", "x", "dead")], {"x": (2, 3)}, ["y"]
    )
    assert ops_of(import_model(proto)) == ["table", "table"]


def test_several_inputs_and_outputs_keep_their_order() -> None:
    graph = import_model(model([node("Add", "b a", "s"), node("Sub", "b a", "d")], {"b": (2,), "a": (2,)}, ["d", "s"]))
    assert graph.inputs == ("b", "a")
    assert graph.outputs == ("d", "s")


# ---- constants


def test_shape_arithmetic_is_folded() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Unsqueeze", "n axes", "n1"),
        node("Concat", "n1 minus", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    proto = model(nodes, {"x": (2, 3, 4)}, ["y"], {"zero": np.int64(0), "axes": [0], "minus": [-1]})
    graph = import_model(proto)
    assert ops_of(graph) == ["reshape"]
    assert graph.tensors["y"].shape == (2, 12)
    assert_agrees(proto)


def test_constants_are_computed_by_onnxruntime_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 200 constant nodes runs in one session."""
    from npucc.frontend import constants

    sessions = []
    original = constants.Constants._run

    def counted(self: constants.Constants, nodes: list[onnx.NodeProto]) -> None:
        sessions.append(len(nodes))
        original(self, nodes)

    monkeypatch.setattr(constants.Constants, "_run", counted)
    chain = [node("Sin", f"c{i}", f"c{i + 1}") for i in range(200)]
    proto = model([*chain, node("Add", "x c200", "y")], {"x": (3,)}, ["y"], {"c0": normal(3)})
    assert_agrees(proto)
    assert sessions == [200]


def test_constant_node_forms() -> None:
    nodes = [
        node("Constant", "", "a", value_float=2.0),
        node("Constant", "", "b", value_floats=[1.0, 2.0, 3.0]),
        node("Constant", "", "i", value_ints=[3, 1]),
        node("Constant", "", "t", value=numpy_helper.from_array(normal(3))),
        node("Mul", "x a", "m"),
        node("Add", "m b", "n"),
        node("Add", "n t", "o"),
        node("Reshape", "o i", "y"),
    ]
    assert_agrees(model(nodes, {"x": (3,)}, ["y"]))


def test_data_dependent_sizes_are_folded_when_constant() -> None:
    proto = model([node("NonZero", "c", "z"), node("Cast", "z", "f", to=1), node("Add", "x f", "y")], {"x": (1, 2)}, ["y"], {"c": reals([0, 3, 4])})
    assert_agrees(proto)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", "s", "c")],
        [node("Expand", "one s", "c")],
        [node("Range", "zero s1 one_i", "c")],
        [node("Tile", "row repeats", "r"), node("Transpose", "r", "t", perm=[1, 0]), node("Add", "r t", "c")],
    ],
    ids=["ConstantOfShape", "Expand", "Range", "broadcast"],
)
def test_huge_computed_constants_are_refused_quickly(nodes: list[onnx.NodeProto]) -> None:
    constants = {"s": [1 << 20, 1 << 20], "s1": np.int64(1 << 40), "one": reals([1]), "zero": np.int64(0), "one_i": np.int64(1)}
    constants |= {"row": np.ones((1, 1000), np.float32), "repeats": [1, 1000]}
    proto = model(
        [*nodes, node("ReduceMax", "c", "m", keepdims=0), node("Cast", "m", "f", to=1), node("Add", "x f", "y")], {"x": (1, 2)}, ["y"], constants
    )
    start = time.monotonic()
    with pytest.raises(ImportModelError, match=r"would have shape .* more than 134217728 elements"):
        import_model(proto)
    assert time.monotonic() - start < 5


def test_sparse_initializers_become_dense() -> None:
    values, indices = numpy_helper.from_array(reals([5, 7]), "w"), numpy_helper.from_array(integers([1, 5]), "w_indices")
    proto = model([node("MatMul", "x w", "y")], {"x": (1, 3)}, ["y"])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3, 2]))
    graph = import_model(proto)
    data = graph.tensors["w"].data
    assert data is not None
    assert data.tolist() == [[0, 5], [0, 0], [0, 7]]


def test_an_initializer_that_is_also_an_input_is_a_constant() -> None:
    graph = import_model(model([node("MatMul", "x w", "y")], {"x": (1, 3), "w": (3, 2)}, ["y"], {"w": normal(3, 2)}))
    assert graph.inputs == ("x",)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_types_are_computed_in_float32(dtype: str) -> None:
    weights = normal(3, 2).astype(dtype)
    proto = model(
        [node("Cast", "x", "h", to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))), node("MatMul", "h w", "m"), node("Cast", "m", "y", to=1)],
        {"x": (1, 3)},
        ["y"],
        {"w": weights},
    )
    graph = assert_agrees(proto, tolerance=1e-2)
    assert ops_of(graph) == ["matmul"]
    assert graph.tensors["w"].dtype == "float32"


def test_inputs_and_outputs_keep_their_types() -> None:
    proto = model([node("Relu", "x", "y")], {"x": (2, 3)}, ["y"], dtypes={"x": "float16", "y": "float16"})
    graph = assert_agrees(proto, tolerance=1e-3)
    assert graph.tensors["x"].dtype == graph.tensors["y"].dtype == "float16"


@pytest.mark.parametrize("place", ["input", "output"])
def test_bfloat16_is_handed_over_as_float32(place: str) -> None:
    """numpy has no such type, and onnxruntime hands none out."""
    ports = {"input": ("x", "BFLOAT16", "FLOAT"), "output": ("x", "FLOAT", "BFLOAT16")}[place]
    cast = node("Cast", "x", "y", to=getattr(onnx.TensorProto, ports[2]))
    proto = model([cast], {"x": (2, 3)}, ["y"])
    proto.graph.input[0].type.tensor_type.elem_type = getattr(onnx.TensorProto, ports[1])
    proto.graph.output[0].type.tensor_type.elem_type = getattr(onnx.TensorProto, ports[2])
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    y = npucc.compile(proto, calibration=[{"x": x}]).run({"x": x}).outputs["y"]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x, atol=1e-2)
    with pytest.raises(NpuccError, match="has element type BFLOAT16"):
        npucc.compile(proto, quant="none")


# ---- outputs


def test_an_output_behind_an_identity_keeps_its_name() -> None:
    proto = model([node("Relu", "x", "a"), node("Identity", "a", "y"), node("Neg", "a", "z")], {"x": (2, 3)}, ["y", "z"])
    graph = assert_agrees(proto)
    assert ops_of(graph) == ["table", "table"]


def test_two_names_for_one_output_and_an_input_as_output() -> None:
    proto = model([node("Relu", "x", "a"), node("Identity", "a", "b"), node("Identity", "x", "c")], {"x": (2, 3)}, ["a", "b", "c"])
    assert_agrees(proto)


def test_second_results_may_be_declared_but_not_read() -> None:
    assert_agrees(model([node("Dropout", "x", "y mask"), node("Relu", "y", "z")], {"x": (2, 3)}, ["z"], opset=11))
    with pytest.raises(ImportModelError, match="a second result that is not supported"):
        import_model(model([node("MaxPool", "x", "y i", kernel_shape=[2]), node("Cast", "i", "z", to=1)], {"x": (2, 3, 4)}, ["z"], opset=12))


# ---- structure


def test_local_functions_are_inlined() -> None:
    body = [node("Sigmoid", "a", "s"), node("Mul", "a s", "r")]
    function = helper.make_function("local", "Silu", ["a"], ["r"], body, [helper.make_opsetid("", 17)])
    proto = model([node("Silu", "x", "y", domain="local")], {"x": (2, 3)}, ["y"])
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    graph = assert_agrees(proto)
    assert ops_of(graph) == ["table"]


@pytest.mark.parametrize("condition", [True, False])
def test_an_if_with_a_constant_condition_is_its_branch(condition: bool) -> None:
    branches = {}
    for name, operator in (("then", "Relu"), ("else", "Neg")):
        value = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        branches[f"{name}_branch"] = helper.make_graph([node(operator, "x", f"{name}_y")], name, [], [value])
    proto = model([node("If", "c", "y", **branches), node("Abs", "x", "z")], {"x": (2, 3)}, ["y", "z"], {"c": np.array(condition)})
    assert_agrees(proto)


def test_named_dimensions_bind_other_inputs() -> None:
    proto = model([node("Add", "a b", "y")], {"a": ("batch", 3), "b": ("batch", "n")}, ["y"])
    graph = import_model(proto, shapes={"b": (5, 3)})
    assert graph.tensors["a"].shape == graph.tensors["y"].shape == (5, 3)


def test_import_is_linear_in_the_number_of_nodes() -> None:
    """10,000 nodes within a few seconds; quadratic work would take minutes."""
    chain = [node("Relu" if i % 2 else "Neg", f"t{i}", f"t{i + 1}") for i in range(10_000)]
    start = time.monotonic()
    graph = import_model(model(chain, {"t0": (2, 3)}, ["t10000"]))
    assert len(graph.nodes) == 10_000
    assert time.monotonic() - start < 20


def test_supported_operators_are_listed_once() -> None:
    names = [name for name, _ in supported_operators()]
    assert names == sorted(set(names))
    assert {"Conv", "Resize", "com.microsoft.QuickGelu"} <= set(names)
