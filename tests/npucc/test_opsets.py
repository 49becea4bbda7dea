"""One meaning in every opset that spells it differently: attributes that became inputs, other defaults, other names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

import npucc
from npucc import segments
from npucc.errors import ImportModelError
from npucc.frontend import import_model
from tests.npucc.onnx_models import assert_agrees, fused, integers, model, node, normal

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 17, 18, 19, 20, 21, 22, 23, onnx.defs.onnx_opset_version())
Built = tuple[list[NodeProto], dict[str, Any]]


def clipped(opset: int) -> Built:
    if opset < 11:
        return [node("Clip", "x", "y", min=-0.5, max=1.0)], {}
    return [node("Clip", "x low high", "y")], {"low": -0.5, "high": 1.0}


def padded(opset: int) -> Built:
    if opset < 11:
        return [node("Pad", "x", "y", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=0.25)], {}
    return [node("Pad", "x pads value", "y")], {"pads": integers([0, 0, 1, 0, 0, 0, 0, 2]), "value": 0.25}


def sliced(opset: int) -> Built:
    if opset < 10:
        return [node("Slice", "x", "y", starts=[1, -3], ends=[4, 2**31], axes=[2, 3])], {}
    return [node("Slice", "x starts ends axes", "y")], {"starts": integers([1, -3]), "ends": integers([4, 2**31]), "axes": integers([2, 3])}


def summed(opset: int) -> Built:
    if opset < 13:
        return [node("ReduceSum", "x", "y", axes=[1, 3], keepdims=0)], {}
    return [node("ReduceSum", "x axes", "y", keepdims=0)], {"axes": integers([1, 3])}


def averaged(opset: int) -> Built:
    if opset < 18:
        return [node("ReduceMean", "x", "y", axes=[2, 3])], {}
    return [node("ReduceMean", "x axes", "y")], {"axes": integers([2, 3])}


def flattened_softmax(opset: int) -> Built:
    """Before opset 13 over all dimensions from the axis on, since then over one."""
    if opset < 13:
        return [node("Softmax", "x", "y", axis=2)], {}
    shape = [node("Reshape", "x flat", "f"), node("Softmax", "f", "s"), node("Reshape", "s full", "y")]
    return shape, {"flat": integers([1, 4, 30]), "full": integers([1, 4, 5, 6])}


def normalized(opset: int) -> Built:
    """`spatial` went, `training_mode` came; more than one result in training only."""
    constants = {"g": normal(4), "b": normal(4, seed=1), "m": normal(4, seed=2), "v": np.abs(normal(4, seed=3)) + 0.5}
    return [node("BatchNormalization", "x g b m v", "y", epsilon=1e-3, **({"momentum": 0.8} if opset < 14 else {"training_mode": 0}))], constants


def enlarged(opset: int) -> Built:
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)}
    if opset < 9:
        return [node("Upsample", "x", "y", mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])], {}
    if opset < 11:
        return [node("Upsample" if opset < 10 else "Resize", "x scales", "y", mode="nearest")], scales
    roi = "region" if opset < 13 else "-"  # which may be left out since
    options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return [node("Resize", f"x {roi} scales", "y", **options)], scales | ({"region": np.zeros(8, np.float32)} if opset < 13 else {})


def dropped(opset: int) -> Built:
    if opset < 12:
        return [node("Dropout", "x", "d", ratio=0.3), node("Tanh", "d", "y")], {}
    return [node("Dropout", "x ratio off", "d"), node("Tanh", "d", "y")], {"ratio": 0.3, "off": np.array(False)}


def squeezed(opset: int) -> Built:
    """Unsqueeze at the end, Squeeze at the front."""
    if opset < 13:
        return [node("Squeeze", "x", "s", axes=[0]), node("Unsqueeze", "s", "y", axes=[-1 if opset > 10 else 3])], {}
    return [node("Squeeze", "x front", "s"), node("Unsqueeze", "s back", "y")], {"front": integers([0]), "back": integers([-1])}


def parted(opset: int) -> Built:
    if opset < 13:
        return [node("Split", "x", "a b", axis=3, split=[2, 4]), node("Tanh", "b", "y")], {}
    return [node("Split", "x sizes", "a b", axis=3), node("Tanh", "b", "y")], {"sizes": integers([2, 4])}


def topped(opset: int) -> Built:
    """The count became an input of one dimension."""
    if opset < 10:
        return [node("TopK", "x", "y i", k=2, axis=3)], {}
    return [node("TopK", "x k", "y i", axis=-1 if opset > 10 else 3)], {"k": integers([2])}


MEANINGS: Sequence[Callable[[int], Built]] = (
    clipped, padded, sliced, summed, averaged, flattened_softmax, normalized, enlarged, dropped, squeezed, parted, topped,
)  # fmt: skip


@pytest.mark.parametrize("meaning", MEANINGS, ids=lambda meaning: str(meaning.__name__))
def test_every_opset_says_the_same(meaning: Callable[[int], Built]) -> None:
    """Each spelling is what onnxruntime makes of it, all on the NPU, and the same graph."""
    texts = set()
    for opset in OPSETS:
        nodes, constants = meaning(opset)
        proto = model(nodes, {"x": (1, 4, 5, 6)}, ["y"], constants, opset=opset)
        proto.ir_version = 3 if opset < 9 else 8 if opset < 21 else 10
        graph = assert_agrees(proto) if opset <= NEWEST_IN_ONNXRUNTIME else fused(import_model(proto))[0]
        assert not segments.host_nodes(graph)
        texts.add(tuple(part.op for part in graph))
    assert len(texts) == 1


#: what the installed onnxruntime states it supports; newer models are imported by npucc all the same
NEWEST_IN_ONNXRUNTIME = 23


def test_older_opsets_are_refused_with_what_to_do() -> None:
    with pytest.raises(ImportModelError, match="the model uses ONNX opset 6; supported are 7 to") as error:
        import_model(model([node("Relu", "x", "y")], {"x": (1, 2)}, ["y"], opset=6))
    assert "version_converter" in error.value.hint


NAMES = ("a/b:0", "with space", "übergröße", "日本語", "x;y|z", 'quo"te', "back\\slash", "-", "new\tline")


def test_strange_names_survive_the_whole_way(tmp_path: Path) -> None:
    """As names of tensors and nodes alike: through program text, package and export."""
    nodes = []
    for index, name in enumerate(NAMES):
        nodes.append(helper.make_node("Tanh" if index % 2 else "Neg", [NAMES[index - 1] if index else "in put"], [name], name=name))
    before, after = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 7])] for name in ("in put", NAMES[-1]))
    proto = helper.make_model(helper.make_graph(nodes, 'g r/a:p"h', before, after), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feed = {"in put": normal(1, 7)}
    package = npucc.compile(proto, calibration=[feed])
    package.save(tmp_path / "strange.npu")
    loaded = npucc.load(tmp_path / "strange.npu")
    result = loaded.run(feed)
    assert list(result.outputs) == [NAMES[-1]]
    assert {name for layer in loaded.program.layers for name in layer.nodes} <= set(NAMES)
    onnx.checker.check_model(loaded.to_onnx())


def test_nodes_of_one_name_stay_apart() -> None:
    nodes = [helper.make_node("Tanh", ["x"], ["a"], name="same"), helper.make_node("Sin", ["a"], ["y"], name="same")]
    proto = model(nodes, {"x": (1, 4)}, ["y"])
    assert len(import_model(proto).nodes) == 2


def test_functions_are_inlined() -> None:
    """A function with an attribute that calls another, used twice."""
    inner = helper.make_function("local", "Half", ["a"], ["b"], [node("Mul", "a half", "b")], [helper.make_opsetid("", 18)])
    inner.node.insert(0, helper.make_node("Constant", [], ["half"], value_float=0.5))
    leaky = helper.make_node("LeakyRelu", ["h"], ["out"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    outer = helper.make_function(
        "local", "Gate", ["x"], ["out"], [helper.make_node("Half", ["x"], ["h"], domain="local"), leaky],
        [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)], ["slope"],
    )  # fmt: skip
    nodes = [helper.make_node("Gate", ["x"], ["a"], domain="local", slope=0.2), helper.make_node("Gate", ["a"], ["y"], domain="local", slope=0.1)]
    proto = model(nodes, {"x": (2, 5)}, ["y"], opset=18)
    proto.functions.extend([inner, outer])
    proto.opset_import.append(helper.make_opsetid("local", 1))
    assert not segments.host_nodes(assert_agrees(proto))
