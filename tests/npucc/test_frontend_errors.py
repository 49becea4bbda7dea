"""Models that can't be taken: one clear error each, that says where, what and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from npucc.errors import ImportModelError
from npucc.frontend import import_model
from tests.npucc.onnx_models import model, node, normal, reals, save

CONV = model([node("Conv", "x w", "y", name="conv")], {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 2, 1, 1)})


def message(proto: ModelProto | str | Path, **options: Any) -> str:
    with pytest.raises(ImportModelError) as error:
        import_model(proto, **options)
    return str(error.value)


# ---- files


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    assert message(path) == f"{path}: there is no such file\n  hint: check the path of the model"


def test_folder(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path}: this is a folder, not an ONNX file\n  hint: give the path of the .onnx file in it"


@pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"not a model at all", bytes(range(256))], ids=["empty", "zeros", "text", "bytes"])
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    text = message(path)
    assert text.startswith(f"{path}: this is not an ONNX model")
    assert text.endswith("hint: export or download the model again")


def test_every_truncation_is_an_error_or_a_model(tmp_path: Path) -> None:
    content = CONV.SerializeToString()
    path = tmp_path / "model.onnx"
    refused = 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            import_model(path)
        except ImportModelError:
            refused += 1
    assert refused > len(content) * 0.9


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_give_no_other_error(data: st.DataObject) -> None:
    content = bytearray(CONV.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    proto = ModelProto()
    try:
        proto.ParseFromString(bytes(content))
    except Exception:
        return
    try:
        import_model(proto)
    except ImportModelError:
        return


def test_no_outputs() -> None:
    proto = ModelProto()
    proto.CopyFrom(CONV)
    del proto.graph.output[:]
    assert message(proto).startswith("the model's graph has no outputs")


@pytest.mark.parametrize("opset", [6, 99])
def test_opset(opset: int) -> None:
    proto = model([node("Relu", "x", "y")], {"x": (2,)}, ["y"], opset=opset)
    newest = onnx.defs.onnx_opset_version()
    assert (
        message(proto)
        == f"the model uses ONNX opset {opset}; supported are 7 to {newest}\n  hint: convert it with onnx.version_converter, or export it again"
    )


# ---- external data


def external(tmp_path: Path, **entries: str) -> Path:
    """CONV with its weights in another file, with the record's entries replaced."""
    proto = ModelProto()
    proto.CopyFrom(CONV)
    weights = proto.graph.initializer[0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"\x00" * 8 + weights.raw_data)
    (tmp_path / "secret.bin").write_bytes(bytes(100))
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "weights.bin", "offset": "8"} | entries).items():
        weights.external_data.add(key=key, value=value)
    path = tmp_path / "model" / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    graph = import_model(external(tmp_path))
    np.testing.assert_array_equal(graph.tensors["w"].data, numpy_helper.to_array(CONV.graph.initializer[0]))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "", "none.bin", ".", "a/../../secret.bin"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    path = external(tmp_path, location=location)
    assert message(path) == (
        f"{path}: tensor 'w' refers to external data {location!r}, which is not a file inside the model's folder\n"
        "  hint: put the external data next to the model; paths that leave its folder are refused"
    )


def test_external_data_through_a_link(tmp_path: Path) -> None:
    path = external(tmp_path, location="link.bin")
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert "is not a file inside the model's folder" in message(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "9"), ("length", "1000000000000"), ("offset", "-1"), ("length", "-5")])
def test_external_data_beyond_the_file(tmp_path: Path, key: str, value: str) -> None:
    text = message(external(tmp_path, **{key: value}))
    assert "refers to bytes" in text or "do not fit its shape" in text or "checker" in text


def test_external_data_with_a_malformed_record(tmp_path: Path) -> None:
    assert "has a malformed external data record" in message(external(tmp_path, offset="eight"))


def test_external_data_of_a_model_in_memory(tmp_path: Path) -> None:
    proto = onnx.load(external(tmp_path), load_external_data=False)
    assert message(proto) == (
        "tensor 'w' is stored outside the model, and a ModelProto does not say where\n"
        "  hint: pass the path of the model, or load it with its external data"
    )


# ---- shapes


def test_dynamic_input() -> None:
    proto = model([node("Relu", "x", "y")], {"x": ("batch", 3, "h", "w")}, ["y"])
    hint = "bind it: --shape x=1,3,1,1 (in Python: shapes={'x': (1, 3, 1, 1)})"
    assert message(proto) == f"input 'x' has the dynamic shape [batch, 3, h, w]\n  hint: {hint}"


def test_all_dynamic_inputs_are_told_at_once_ready_to_be_pasted() -> None:
    proto = model([node("Add", "x y", "a"), node("Add", "a z", "b")], {"x": ("batch", 3), "y": ("n", 3), "z": (1, 3)}, ["b"])
    assert message(proto, shapes={"z": (1, 3)}) == (
        "input 'x' has the dynamic shape [batch, 3]; input 'y' has the dynamic shape [n, 3]\n"
        "  hint: bind it: --shape x=1,3 --shape y=1,3 (in Python: shapes={'x': (1, 3), 'y': (1, 3)})"
    )


def test_a_huge_input_is_refused_before_memory_is_asked_for() -> None:
    proto = model([node("Relu", "x", "y")], {"x": (2**62,)}, ["y"])
    assert message(proto).startswith(f"input 'x' has shape [{2**62}], more than {1 << 28} elements")


def test_unnamed_dynamic_dimension() -> None:
    proto = model([node("Relu", "x", "y")], {"x": (1, 3)}, ["y"])
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert message(proto).startswith("input 'x' has the dynamic shape [?, 3]")


def test_input_without_shape() -> None:
    proto = model([node("Relu", "x", "y")], {"x": ()}, ["y"])
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert message(proto) == "input 'x' has no shape\n  hint: bind it: --shape x=1,3,224,224 (in Python: shapes={'x': (1, 3, 224, 224)})"


def test_shape_for_an_unknown_input() -> None:
    assert message(CONV, shapes={"X": (1,)}).startswith("a shape is given for 'X', but the model's inputs are 'x'")
    proto = model([node("Relu", "images", "y")], {"images": ("n", 3)}, ["y"])
    assert message(proto, shapes={"image": (1, 3)}).endswith("hint: did you mean 'images'?")


@pytest.mark.parametrize("shape", [(1, 2, 5, 4), (1, 2, 4), (0, 2, 4, 4), (-1, 2, 4, 4), (1.0, 2, 4, 4)])
def test_shape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    assert message(CONV, shapes={"x": shape}) == (
        f"shape {shape} does not fit input 'x', declared as [1, 2, 4, 4]\n  hint: give a positive size for every dimension"
    )


def test_contradicting_named_dimension() -> None:
    proto = model([node("Add", "a b", "y")], {"a": ("n",), "b": ("n",)}, ["y"])
    assert message(proto, shapes={"a": (2,), "b": (3,)}).startswith("dimension 'n' is 2 in one input and 3 in 'b'")


def test_string_input() -> None:
    proto = model([node("Identity", "x", "y")], {"x": (1,)}, ["y"])
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    assert message(proto) == "input 'x' has element type STRING\n  hint: inputs must be numbers"


# ---- graphs


def test_cycle() -> None:
    proto = model([node("Add", "x b", "a", name="first"), node("Relu", "a", "b", name="second"), node("Neg", "b", "y")], {"x": (2,)}, ["y"])
    text = message(proto)
    assert text.startswith("the graph has a cycle: ")
    assert "first" in text
    assert "second" in text
    assert text.endswith("hint: an ONNX graph must be acyclic; export the model again")


def test_tensor_made_twice() -> None:
    proto = model([node("Relu", "x", "a"), node("Neg", "x", "a", name="again"), node("Abs", "a", "y")], {"x": (2,)}, ["y"])
    assert message(proto).startswith("node 'again': tensor 'a' is made by two nodes")


def test_tensor_made_by_nothing() -> None:
    assert "the ONNX checker refuses the model" in message(model([node("Add", "x ghost", "y")], {"x": (2,)}, ["y"]))


def test_output_made_by_nothing() -> None:
    assert "output 'z'" in message(model([node("Relu", "x", "y")], {"x": (2,)}, ["y", "z"]))


def test_a_constant_output_without_elements() -> None:
    proto = model([node("Relu", "c", "y"), node("Relu", "x", "z")], {"x": (2,)}, ["y", "z"], {"c": normal(0)})
    assert "output 'y' has shape [0]" in message(proto)


def test_unknown_domain() -> None:
    proto = model([node("Magic", "x", "y", domain="my.company", name="wand")], {"x": (2,)}, ["y"])
    proto.opset_import.append(helper.make_opsetid("my.company", 1))
    assert message(proto).startswith("node 'wand': operator my.company.Magic is not supported\n  hint: see `npucc ops`")


def test_unknown_operator() -> None:
    assert "NoSuchOperator" in message(model([node("NoSuchOperator", "x", "y", name="n")], {"x": (2,)}, ["y"]))


def test_operator_without_importer() -> None:
    proto = model([node("Det", "x", "y", name="volume")], {"x": (1, 4, 4)}, ["y"])
    assert message(proto).startswith(
        "node 'volume': operator Det is not supported\n  hint: see `npucc ops` for the supported operators; cut the model before this node"
    )


def test_recurrent_cells_that_are_not_supported() -> None:
    constants = {"w": normal(1, 8, 4), "r": normal(1, 8, 2)}
    proto = model([node("RNN", "x w r", "y", name="cell", hidden_size=2)], {"x": (3, 1, 4)}, ["y"], constants)
    assert "its weights have shapes [1, 8, 4] and [1, 8, 2]" in message(proto)


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        (np.float32(-0.1), "QuantizeLinear: its scale is -0.1"),
        (np.float32(np.inf), "QuantizeLinear: its scale is inf, which turns 0 into NaN; expected a positive number\n  hint: quantize"),
        (np.array([0.1, 0.2], np.float32), "QuantizeLinear: an activation has more than one scale or zero point"),
    ],
)
def test_quantized_model(scale: np.ndarray, text: str) -> None:
    proto = model([node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")], {"x": (2, 3)}, ["y"], {"s": scale})
    assert text in message(proto)


def test_control_flow_on_data() -> None:
    """An If whose branches give results of different shapes."""
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    parts = {"then": node("Relu", "x", "r"), "else": node("Concat", "x x", "r", axis=0)}
    branches = {f"{name}_branch": helper.make_graph([part], name, [], [value]) for name, part in parts.items()}
    proto = model([node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "c", to=9), node("If", "c", "y", **branches)], {"x": (3,)}, ["y"])
    assert message(proto).endswith("hint: control flow that depends on data can't be compiled; export the model with fixed control flow")


def test_random_numbers() -> None:
    assert "operator RandomNormalLike is not supported" in message(model([node("RandomNormalLike", "x", "y")], {"x": (2,)}, ["y"]))
    constant = model([node("RandomNormal", "", "r", shape=[2]), node("Add", "x r", "y")], {"x": (2,)}, ["y"])
    assert "operator RandomNormal is not supported" in message(constant)


@pytest.mark.parametrize(
    ("nodes", "shape", "constants", "expected"),
    [
        ([node("Reshape", "x s", "y")], (2, 3), {"s": [4, -1]}, "Reshape: can't turn shape [2, 3] into [4, -1]"),
        ([node("Gemm", "x w", "y")], (2, 3), {"w": normal(4, 5)}, "Gemm: yields the impossible shape [-1] from [2, 3], [4, 5]"),
        ([node("Add", "x w", "y")], (2, 3), {"w": normal(4)}, "Add does not fit its inputs of shapes [2, 3], [4]"),
        ([node("Conv", "x w", "y")], (1, 2, 4, 4), {"w": normal(3, 5, 1, 1)}, "has weights of shape [3, 5, 1, 1] and 1 groups for 2 input channels"),
        ([node("Conv", "x w", "y")], (1, 2, 4, 4), {"w": normal(3, 2, 9, 9)}, "Conv: has a kernel that spans [9, 9] on a padded input of [4, 4]"),
        ([node("Conv", "x w", "y")], (1, 2, 4, 4, 4, 4), {"w": normal(3, 2, 1, 1, 1, 1)}, "supported are 1-D to 3-D convolutions"),
        ([node("Transpose", "x", "y", perm=[0, 0])], (2, 3), {}, "Transpose: perm=[0, 0] does not fit an input of shape [2, 3]"),
        ([node("Concat", "x w", "y", axis=0)], (2, 3), {"w": normal(2, 4)}, "Concat: its inputs have shapes [2, 3], [2, 4]"),
        ([node("Softmax", "x", "y", axis=5)], (2, 3), {}, "Softmax: axis 5 is outside a tensor of rank 2"),
        ([node("Slice", "x a b", "y")], (2, 3), {"a": [2], "b": [2]}, "Slice yields a tensor of shape [0, 3], which has no elements"),
        ([node("Expand", "x s", "y")], (2, 1), {"s": [1 << 20, 1 << 12]}, "does not fit its inputs"),
        ([node("Expand", "x s", "y")], (1, 1), {"s": [1 << 20, 1 << 12]}, "which has more than 268435456 elements"),
        ([node("Reshape", "x s", "y")], (2, 3), {"s": [-5]}, "Reshape: can't turn shape [2, 3] into [-5]"),
        ([node("MaxPool", "x", "y", kernel_shape=[0, 0])], (1, 2, 4, 4), {}, "must be positive"),
        ([node("Gather", "x i", "y")], (2, 3), {"i": [7]}, "Gather: an index is outside 0 to 1"),
        ([node("Resize", "x - f", "y", mode=b"sinc")], (1, 2, 4, 4), {"f": reals([1, 1, 2, 2])}, "Resize: 'sinc' is not known"),
        ([node("Cast", "x", "y", to=TensorProto.STRING)], (2,), {}, "Cast: casts to STRING"),
    ],
)  # fmt: skip
def test_operators_say_what_does_not_fit(nodes: list[Any], shape: tuple[int, ...], constants: dict[str, Any], expected: str) -> None:
    nodes[0].name = "culprit"
    text = message(model(nodes, {"x": shape}, ["y"], constants))
    assert text.startswith("node 'culprit': ")
    assert expected in text
    assert "\n  hint: " in text


def test_computed_parameters_are_refused() -> None:
    proto = model([node("Cast", "x", "i", to=7), node("Reshape", "z i", "y", name="r")], {"x": (1,), "z": (4,)}, ["y"])
    assert message(proto) == (
        "node 'r': Reshape: shape (input 1) must be a constant, but it depends on the model's inputs\n"
        "  hint: export the model with static shapes and fixed parameters"
    )


def test_damaged_tensor_data(tmp_path: Path) -> None:
    proto = ModelProto()
    proto.CopyFrom(CONV)
    proto.graph.initializer[0].dims[0] = 1 << 40
    text = message(save(proto, tmp_path / "model.onnx"))
    assert "checker" in text or "do not fit its shape" in text
