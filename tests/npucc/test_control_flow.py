"""If and Loop as plain nodes of the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import GraphProto, TensorProto, helper

import npucc
from npucc.errors import ImportModelError
from npucc.frontend import import_model

from .onnx_models import assert_agrees, model, node, normal

INTEGER, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL
Value = tuple[int, list[int]]  # element type and shape


def subgraph(nodes: list[onnx.NodeProto], inputs: dict[str, Value], outputs: list[str], constants: dict[str, np.ndarray] | None = None) -> GraphProto:
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    types = {"go": BOOL, "next": INTEGER}
    results = [helper.make_tensor_value_info(name, types.get(name, FLOAT), None) for name in outputs]
    return helper.make_graph(nodes, "part", values, results, stored)


def choice(then: GraphProto, other: GraphProto) -> onnx.ModelProto:
    """The mean of x, which is [1, 1], chooses."""
    nodes = [
        node("ReduceMean", "x", "m"), node("Greater", "m zero", "c"), node("If", "c", "y", then_branch=then, else_branch=other),
    ]  # fmt: skip
    return model(nodes, {"x": (6,)}, ["y"], {"zero": np.float32(0)})


@pytest.mark.parametrize("sign", [1, -1])
def test_an_if_that_depends_on_data_computes_both_branches(sign: int) -> None:
    """Both call their tensors and weights the same, and read one from outside."""
    named = enumerate(("Abs", "Neg"))
    parts = [subgraph([node("Mul", "x w", "t"), node(name, "t", "r")], {}, ["r"], {"w": normal(6, seed=seed)}) for seed, name in named]
    assert_agrees(choice(parts[0], parts[1]), feeds={"x": (sign * np.arange(6)).astype(np.float32)})


def test_a_branch_that_no_input_fits_is_never_taken() -> None:
    fitting = subgraph([node("Reshape", "x s", "t"), node("MatMul", "t w", "r")], {}, ["r"], {"s": np.array([2, 3]), "w": normal(3, 4)})
    other = subgraph([node("Reshape", "x s", "t"), node("MatMul", "t w", "r")], {}, ["r"], {"s": np.array([2, 4]), "w": normal(4, 4)})
    graph = import_model(choice(fitting, other), host=True)
    assert graph.tensors["y"].shape == (2, 4)
    assert not {part.op for part in graph} & {"host", "where"}


@pytest.mark.parametrize("counted", [True, False])
def test_a_loop_of_known_length_is_written_out(counted: bool) -> None:
    """A recurrence over the rows of x, as TensorFlow writes it; its length is the trip count or comes from the condition."""
    body = subgraph(
        [
            node("Gather", "x i", "row"), node("MatMul", "h w", "p"), node("Add", "row p", "q"), node("Tanh", "q", "new"),
            node("Neg", "new", "shown"), node("Add", "i one", "next"), node("Less", "next count", "go"),
        ],
        {"n": (INTEGER, []), "before": (BOOL, []), "i": (INTEGER, []), "h": (FLOAT, [3])},
        ["go", "next", "new", "shown"],
        {"w": normal(3, 3), "one": np.array(1)},
    )  # fmt: skip
    nodes = [node("Shape", "x", "shape"), node("Gather", "shape zero", "count"), node("Less", "zero count", "start")]
    nodes.append(node("Loop", "count - zero h0" if counted else "- start zero h0", "last h ys", body=body))
    nodes.append(node("Relu", "h", "y"))
    proto = model(nodes, {"x": (5, 3), "h0": (3,)}, ["y", "ys"], {"zero": np.array(0)})
    assert_agrees(proto)
    feed = {"x": normal(5, 3), "h0": normal(3)}
    assert npucc.compile(proto, calibration=[feed], host=False).run(feed).outputs["ys"].shape == (5, 3)


def test_a_loop_whose_length_depends_on_data_is_refused() -> None:
    body = subgraph(
        [node("Abs", "h", "new"), node("Greater", "new limit", "go")],
        {"n": (INTEGER, []), "before": (BOOL, []), "h": (FLOAT, [])}, ["go", "new"], {"limit": np.asarray(1, np.float32)},
    )  # fmt: skip
    proto = model([node("Loop", "most yes x", "y", body=body)], {"x": ()}, ["y"], {"most": np.array(9), "yes": np.array(True)})
    with pytest.raises(ImportModelError, match="operator Loop is not supported"):
        import_model(proto)
