"""Host segments end to end: what the NPU can't run runs in onnxruntime, in as few segments as the graph allows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper as h

import npucc
from npucc import export, frontend, reference, segments
from npucc.cli import main
from npucc.errors import CompileError, ImportModelError
from npucc.graph import Graph
from runtime.errors import RuntimeFault

Array = np.ndarray[Any, np.dtype[Any]]


def model(
    nodes: list[onnx.NodeProto], outputs: Mapping[str, tuple[int, list[int]]], shape: list[int], *constants: onnx.TensorProto
) -> onnx.ModelProto:
    """A model of opset 13 with one input x."""
    results = [h.make_tensor_value_info(name, *kind) for name, kind in outputs.items()]
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, shape)], results, list(constants))
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 13), h.make_opsetid("com.microsoft", 1)], ir_version=8)


def scalar(name: str, value: int, *dims: int) -> onnx.TensorProto:
    return h.make_tensor(name, T.INT64, dims, [value])


def sandwich() -> onnx.ModelProto:
    """conv (NPU), Inverse (host), mean (NPU), hash and places of a MaxPool (host), with integer outputs."""
    weights = np.random.default_rng(0).normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32)
    shift = onnx.numpy_helper.from_array(8 * np.eye(8, dtype=np.float32), "shift")
    nodes = [
        h.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]), h.make_node("Add", ["c", "shift"], ["d"], "add"),
        h.make_node("Inverse", ["d"], ["s"], "inverse", domain="com.microsoft"),
        h.make_node("ReduceMean", ["s"], ["m"], "mean", axes=[3], keepdims=0),
        h.make_node("MurmurHash3", ["m"], ["e"], "hash", domain="com.microsoft", positive=0),
        h.make_node("Mul", ["m", "m"], ["square"], "square"), h.make_node("MaxPool", ["square"], ["v", "i"], "places", kernel_shape=[2]),
        h.make_node("Tanh", ["v"], ["y"], "tanh"),
    ]  # fmt: skip
    outputs = {"y": (T.FLOAT, [1, 8, 7]), "i": (T.INT64, [1, 8, 7]), "e": (T.INT32, [1, 8, 8])}
    return model(nodes, outputs, [1, 3, 8, 8], onnx.numpy_helper.from_array(weights, "w"), shift)


def counted() -> onnx.ModelProto:
    """How many elements are not zero, by a tensor whose size depends on data."""
    nodes = [
        h.make_node("Relu", ["x"], ["r"], "relu"), h.make_node("NonZero", ["r"], ["nz"], "nonzero"), h.make_node("Shape", ["nz"], ["s"], "shape"),
        h.make_node("Gather", ["s", "one"], ["n"], "gather"), h.make_node("Cast", ["n"], ["f"], "cast", to=T.FLOAT),
        h.make_node("Div", ["r", "f"], ["y"], "div"),
    ]  # fmt: skip
    return model(nodes, {"y": (T.FLOAT, [4, 8])}, [4, 8], scalar("one", 1))


def between() -> onnx.ModelProto:
    """An NPU operator between two host nodes that exchange a tensor of unknown size."""
    nodes = [
        h.make_node("NonZero", ["x"], ["nz"], "nonzero"), h.make_node("Inverse", ["x"], ["c"], "inverse", domain="com.microsoft"),
        h.make_node("Shape", ["nz"], ["s"], "shape"), h.make_node("Cast", ["s"], ["f"], "cast", to=T.FLOAT),
        h.make_node("Exp", ["f"], ["e"], "exp"), h.make_node("ReduceSum", ["nz"], ["t"], "sum", keepdims=0),
        h.make_node("Cast", ["t"], ["tf"], "cast2", to=T.FLOAT), h.make_node("Add", ["c", "tf"], ["y"], "add"),
    ]  # fmt: skip
    return model(nodes, {"y": (T.FLOAT, [8, 8]), "e": (T.FLOAT, [2])}, [8, 8])


def branch() -> onnx.ModelProto:
    """Control flow that depends on data, whose branches read tensors from outside."""
    outer = h.make_tensor_value_info("b", T.FLOAT, [4, 8])
    inside = [h.make_node("Unique", ["t"], ["u"], "unique"), h.make_node("ReduceMax", ["u"], ["w"], "most", keepdims=0)]
    then = h.make_graph([*inside, h.make_node("Mul", ["t", "w"], ["b"], "mul")], "then", [], [outer])
    other = h.make_graph([h.make_node("Add", ["t", "x"], ["b"], "inner")], "else", [], [outer])
    nodes = [
        h.make_node("Tanh", ["x"], ["t"], "tanh"), h.make_node("ReduceMax", ["t"], ["m"], "max", keepdims=0),
        h.make_node("Greater", ["m", "half"], ["yes"], "greater"), h.make_node("If", ["yes"], ["c"], "if", then_branch=then, else_branch=other),
        h.make_node("Relu", ["c"], ["y"], "relu"),
    ]  # fmt: skip
    return model(nodes, {"y": (T.FLOAT, [4, 8])}, [4, 8], h.make_tensor("half", T.FLOAT, [], [0.5]))


MODELS = {"sandwich": sandwich, "counted": counted, "between": between, "branch": branch}


def sample(proto: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)}


def by_onnxruntime(proto: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


def imported(proto: onnx.ModelProto) -> Graph:
    return frontend.import_model(proto, host=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_machine_agrees_with_the_reference_and_with_the_export(name: str) -> None:
    proto = MODELS[name]()
    package = npucc.compile(proto, calibration=[sample(proto, seed) for seed in range(6)])
    feed = sample(proto, 1)
    result, exported = package.run(feed), by_onnxruntime(package.to_onnx(), feed)
    stored, real = reference.run(package.graph, feed), by_onnxruntime(proto, feed)
    for output, raw in result.raw.items():
        np.testing.assert_array_equal(raw, stored[output])
        step = float(package.graph.quant(output).scale)  # a division is not one of the operators that onnxruntime runs in integers
        np.testing.assert_allclose(result.outputs[output], exported[output], atol=1.01 * step if name == "counted" else 1e-6)
        assert result.outputs[output].dtype == real[output].dtype
        noise = float(((result.outputs[output] - real[output]) ** 2).sum())
        assert noise <= 0.01 * float((real[output].astype(np.float64) ** 2).sum()), f"{output}: {result.outputs[output]} for {real[output]}"
    for seed in (1, 2):
        assert all(np.array_equal(raw, package.machine.run(feed, order="random", seed=seed).raw[output]) for output, raw in result.raw.items())


@pytest.mark.parametrize("name", MODELS)
def test_float_mode_gives_what_onnxruntime_gives(name: str) -> None:
    proto = MODELS[name]()
    feed = sample(proto)
    package = npucc.compile(proto, calibration=[feed], quant="none")
    for output, wanted in by_onnxruntime(proto, feed).items():
        np.testing.assert_array_equal(package.run(feed).outputs[output], wanted)
    assert len(package.host_nodes) == package.onnx_nodes == len(proto.graph.node)


def test_segments_are_few_and_the_reasons_are_kept(tmp_path: Path) -> None:
    """The hash does not depend on the stretch from the inverse to the places, so it shares a segment."""
    proto = sandwich()
    package = npucc.compile(proto, calibration=[sample(proto)])
    package.save(tmp_path / "a.npu")
    loaded = npucc.load(tmp_path / "a.npu")
    assert {(node.name, node.segment) for node in loaded.host_nodes} == {("inverse", 0), ("hash", 1), ("places", 1)}
    assert all(node.reason for node in loaded.host_nodes)
    assert sorted(name for name in loaded.contents.members if name.startswith("host/")) == ["host/0.onnx", "host/1.onnx"]
    np.testing.assert_array_equal(loaded.run(sample(proto)).outputs["i"], package.run(sample(proto)).outputs["i"])
    assert loaded.host_cycles >= 2 * loaded.program.target.host_latency
    assert loaded.graph.text() == package.graph.text()


def test_a_segment_is_stored_once() -> None:
    """A look-up in a table of a megabyte that only the host knows how to read."""
    table = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32), "table")
    nodes = [h.make_node("Det", ["x"], ["d"], "det"), h.make_node("Mul", ["d", "table"], ["m"], "mul"), h.make_node("Det", ["m"], ["y"], "last")]
    proto = model(nodes, {"y": (T.FLOAT, [])}, [4, 4], table)
    package = npucc.compile(proto, calibration=[sample(proto)], quant="none")
    assert sum(len(member) for member in package.contents.members.values()) < 1.1 * 4 * 512 * 512
    assert segments.attributes_of(segments.host_nodes(package.graph)[0]).model == package.contents.members["host/0.onnx"]


def test_work_is_counted_by_shapes_wherever_it_runs() -> None:
    package = npucc.compile(sandwich(), calibration=[sample(sandwich())])
    whole = npucc.compile(sandwich(), calibration=[sample(sandwich())], quant="none")
    assert package.operations is not None
    assert whole.operations is not None
    assert package.operations["npu"]["macs"] == whole.operations["host"]["macs"] == 8 * 8 * 8 * 27
    assert whole.operations["npu"] == {"macs": 0, "elements": 0}
    assert (package.operations["host_mac_share"], whole.operations["host_mac_share"], whole.operations["host_element_share"]) == (0, 1, 1)
    assert package.operations["host"]["elements"] >= 8


def test_tensors_that_only_the_host_touches_keep_their_values() -> None:
    """Places of the largest of an input: nothing is quantized."""
    proto = model(
        [h.make_node("MaxPool", ["x"], ["v", "i"], "places", kernel_shape=[6])], {"v": (T.FLOAT, [1, 4, 3]), "i": (T.INT64, [1, 4, 3])}, [1, 4, 8]
    )
    feed = sample(proto)
    result = npucc.compile(proto, calibration=[feed]).run(feed)
    for name, wanted in by_onnxruntime(proto, feed).items():
        np.testing.assert_array_equal(result.outputs[name], wanted)
    assert result.raw["i"].dtype == np.int64


def test_what_lies_between_goes_along() -> None:
    """Nodes of the NPU are not pulled in without need; two host nodes that share an open tensor are one segment."""
    graph = imported(between())
    (node,) = segments.host_nodes(graph)
    names = {name for name, _, _ in segments.attributes_of(node).nodes}
    assert {"nonzero", "inverse", "shape", "sum"} <= names
    assert "exp" not in names


def test_the_float_graph_is_the_model() -> None:
    for build in MODELS.values():
        proto = build()
        feed = sample(proto)
        found = by_onnxruntime(export.to_onnx(imported(proto)), feed)
        for name, wanted in by_onnxruntime(proto, feed).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_no_host_names_node_operator_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CompileError, match=r"node 'inverse': com\.microsoft\.Inverse needs the host"):
        npucc.compile(sandwich(), host=False)
    onnx.save(sandwich(), tmp_path / "m.onnx")
    assert main(["compile", str(tmp_path / "m.onnx"), "--no-host"]) == 1
    assert "Inverse needs the host" in capsys.readouterr().err


def test_what_onnxruntime_does_not_know_either_is_an_error() -> None:
    node = h.make_node("Frobnicate", ["x"], ["y"], "strange", domain="com.microsoft")
    with pytest.raises(ImportModelError, match=r"node 'strange': operator com\.microsoft\.Frobnicate has no place on the NPU"):
        npucc.compile(model([node], {"y": (T.FLOAT, [4, 8])}, [4, 8]))


def test_an_output_without_a_fixed_size_is_an_error() -> None:
    proto = model([h.make_node("NonZero", ["x"], ["y"], "nonzero")], {"y": (T.INT64, [2, 5])}, [4, 8])
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    with pytest.raises(ImportModelError, match="output 'y' has no fixed shape"):
        npucc.compile(proto)
    feed = sample(proto)
    package = npucc.compile(proto, calibration=[feed], quant="none")
    np.testing.assert_array_equal(package.run(feed).outputs["y"], np.array(np.nonzero(feed["x"])))
    with pytest.raises(RuntimeFault, match=r"output 0 of the segment has shape \[2, 0\], but the program holds \[2, 32\]"):
        package.run({"x": np.zeros((4, 8), np.float32)})


def test_the_command_line_shows_host_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(sandwich(), "m.onnx")
    assert main(["compile", "m.onnx"]) == 0
    assert "on the host: 3 of" in capsys.readouterr().out
    assert main(["compile", "--check", "m.onnx"]) == 0
    assert "Inverse" in capsys.readouterr().out
