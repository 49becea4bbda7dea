"""The table of operators does not lie: a small model of each operator is placed where the table says, and what runs on the host gives
onnxruntime's values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

import npucc
from npucc import operators
from npucc.errors import ImportModelError
from tests.npucc.onnx_models import integers, model, node, normal, reals, run
from tests.npucc.test_frontend_operators import CASES, Case
from tests.npucc.test_sequences import recurrent_model

OPEN = helper.make_tensor_value_info
LAST_SEEN = onnx.defs.onnx_opset_version()


@dataclass(frozen=True)
class Small:
    """A few nodes from x (float, [4, 6] if nothing else is said) to y. `result`: its shape, where onnxruntime can't infer it."""

    nodes: Sequence[NodeProto]
    constants: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (4, 6)
    opset: int = 18
    result: tuple[int, ...] = ()

    @property
    def proto(self) -> onnx.ModelProto:
        proto = model(self.nodes, {"x": self.shape}, ["y"], self.constants, opset=self.opset)
        proto.ir_version = 10
        if self.result:
            proto.graph.output[0].CopyFrom(OPEN("y", TensorProto.FLOAT, self.result))
        return proto


def subgraph(name: str, nodes: Sequence[NodeProto], inputs: str, outputs: str, **types: int) -> onnx.GraphProto:
    """A body; values are scalars or tensors of float unless `types` says else."""
    before, after = (
        [OPEN(each, types.get(each, TensorProto.FLOAT), [] if each in types else None) for each in names.split()] for names in (inputs, outputs)
    )
    return helper.make_graph(list(nodes), name, before, after)


def to_real(name: str) -> NodeProto:
    return node("Cast", name, "y", to=TensorProto.FLOAT)


WHOLE = [node("Mul", "x ten", "x10"), node("Cast", "x10", "n", to=TensorProto.INT32)]
TEN = {"ten": np.float32(10), "seven": np.int32(7)}
STRINGS = node("Cast", "n", "s", to=TensorProto.STRING)
#: on the host
HOSTED: dict[str, Small] = {
    "bits": Small([*WHOLE, node("BitwiseAnd", "n seven", "a"), node("BitwiseOr", "a seven", "b"), node("BitwiseXor", "b n", "c"),
                   node("BitwiseNot", "c", "d"), node("Cast", "d", "u", to=TensorProto.UINT32),
                   node("BitShift", "u one", "e", direction="RIGHT"), to_real("e")], {**TEN, "one": np.uint32(1)}),
    "BitCast": Small([*WHOLE, node("BitCast", "n", "u", to=TensorProto.UINT32), to_real("u")], TEN, opset=26),
    "Det": Small([node("Det", "x", "y")], shape=(3, 4, 4)),
    "DeformConv": Small([node("DeformConv", "x w o", "y", kernel_shape=[2, 2])],
                        {"w": normal(2, 3, 2, 2), "o": normal(1, 8, 4, 4)}, (1, 3, 5, 5), 22),
    "LinearAttention": Small([node("LinearAttention", "x x x", "y z", update_rule="linear", q_num_heads=2, kv_num_heads=2)], shape=(1, 4, 8),
                       opset=LAST_SEEN),
    "MaxRoiPool": Small([node("MaxRoiPool", "x r", "y", pooled_shape=[2, 2])], {"r": reals([[0, 0, 0, 3, 3]])}, (1, 2, 6, 6)),
    "MaxUnpool": Small([node("MaxPool", "x", "v i", kernel_shape=[2, 2], strides=[2, 2]),
                        node("MaxUnpool", "v i", "y", kernel_shape=[2, 2], strides=[2, 2])], shape=(1, 2, 4, 4)),
    "NonMaxSuppression": Small([node("NonMaxSuppression", "b x many half", "found"), node("Shape", "found", "size"), to_real("size")],
                               {"b": reals([[[0, 0, 1, 1], [0, 0, 1, 1.1], [2, 2, 3, 3]]]), "many": integers([9]), "half": reals([0.5])}, (1, 1, 3)),
    "NonZero": Small([node("NonZero", "x", "found"), node("ReduceSum", "found axis", "sum"), to_real("sum")], {"axis": integers([1])}),
    "TfIdfVectorizer": Small([*WHOLE, node("TfIdfVectorizer", "n", "y", mode="TF", min_gram_length=1, max_gram_length=1, max_skip_count=0,
                                           ngram_counts=[0], ngram_indexes=[0, 1, 2], pool_int64s=[3, 4, 5])], TEN),
    "Unique": Small([node("Unique", "x", "u"), node("ReduceMax", "u", "y", keepdims=1)]),
    "If": Small([node("ReduceSum", "x", "t", keepdims=0), node("Greater", "t zero", "c"),
                 node("If", "c", "o", then_branch=subgraph("then", [node("Sin", "x", "a")], "", "a"),
                      else_branch=subgraph("else", [node("ReduceSum", "x", "b")], "", "b")), node("ReduceSum", "o", "y")], {"zero": np.float32(0)},
                  result=(1, 1)),
    "Loop": Small([node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "times", to=TensorProto.INT64), node("Loop", "times - x", "y",
                  body=subgraph("body", [node("Identity", "go", "on"), node("Mul", "v half", "w")], "i go v", "on w",
                                                                i=TensorProto.INT64, go=TensorProto.BOOL, on=TensorProto.BOOL))],
                  {"half": np.float32(0.5)}, result=(4, 6)),
    "Scan": Small([node("Scan", "start x", "last y", num_scan_inputs=1, body=subgraph("body", [node("Add", "s r", "t"), node("Identity", "t", "o")],
                                                                                      "s r", "t o"))], {"start": np.zeros(6, np.float32)}),
    "sequence": Small([node("SequenceConstruct", "x x", "a"), node("Neg", "x", "m"), node("SequenceInsert", "a m", "b"),
                       node("SequenceErase", "b zero", "c"),
                       node("SequenceLength", "c", "n"), node("SequenceAt", "c zero", "d"), node("ConcatFromSequence", "c", "e", axis=0),
                       node("ReduceSum", "e axis", "f"), node("Cast", "n", "g", to=TensorProto.FLOAT), node("Add", "d f", "h"),
                       node("Mul", "h g", "y")],
                      {"zero": np.int64(0), "axis": integers([0])}, result=(4, 6)),
    "empty sequence": Small([node("SequenceEmpty", "", "a"), node("SequenceInsert", "a x", "b"), node("SequenceAt", "b zero", "c"),
                       node("Relu", "c", "y")],
                            {"zero": np.int64(0)}, result=(4, 6)),
    "SplitToSequence": Small([node("SplitToSequence", "x two", "a", axis=0), node("SequenceAt", "a zero", "b"), node("Relu", "b", "y")],
                             {"two": integers(2), "zero": np.int64(0)}, result=(2, 6)),
    "SequenceMap": Small([node("SequenceConstruct", "x x", "a"),
                       node("SequenceMap", "a", "b", body=subgraph("body", [node("Neg", "v", "w")], "v", "w")),
                          node("ConcatFromSequence", "b", "y", axis=1)], result=(4, 12)),
    "optional": Small([node("Optional", "x", "o"), node("OptionalHasElement", "o", "has"), node("OptionalGetElement", "o", "v"),
                       node("Where", "has v x", "y")], result=(4, 6)),
    "strings": Small([*WHOLE, STRINGS, node("StringConcat", "s s", "t"),
                       node("RegexFullMatch", "t", "m", pattern="-?1.*"), to_real("m")], TEN, opset=20),
    "StringNormalizer": Small([*WHOLE, node("Reshape", "n flat", "f"), node("Cast", "f", "s", to=TensorProto.STRING),
                               node("StringNormalizer", "s", "t", case_change_action="LOWER", locale="C"),
                       node("Cast", "t", "y", to=TensorProto.FLOAT)],
                              {**TEN, "flat": integers([24])}, result=(24,)),
    "StringSplit": Small([*WHOLE, STRINGS, node("StringSplit", "s", "t k", delimiter="1"), to_real("k")], TEN, opset=20),
}  # fmt: skip
#: random: they have a place, but no value to compare
RANDOM = {
    "RandomNormal": Small([node("RandomNormal", "", "r", shape=[4, 6]), node("Add", "x r", "y")]),
    "RandomNormalLike": Small([node("RandomNormalLike", "x", "r"), node("Add", "x r", "y")]),
    "RandomUniform": Small([node("RandomUniform", "", "r", shape=[4, 6]), node("Add", "x r", "y")]),
    "RandomUniformLike": Small([node("RandomUniformLike", "x", "r"), node("Add", "x r", "y")]),
    "Bernoulli": Small([node("Sigmoid", "x", "p"), node("Bernoulli", "p", "y")]),
    "Multinomial": Small([node("Multinomial", "x", "r", sample_size=3), to_real("r")]),
}
#: neither onnxruntime nor the NPU
NOWHERE = {
    "ImageDecoder": Small([node("Cast", "x", "u", to=TensorProto.UINT8), node("ImageDecoder", "u", "y")], shape=(9,), opset=20),
}


def small(operator: str, inputs: str = "x", constants: Mapping[str, Any] | None = None, opset: int = 18, **attributes: Any) -> Small:
    """One node."""
    return Small([node(operator, inputs, "y", **attributes)], constants or {}, opset=opset)


MICROSOFT: dict[str, Any] = {"domain": "com.microsoft"}
STEPS = {"s": np.float32(0.02), "z": np.uint8(128), "w": np.full((6, 5), 3, np.uint8)}
X8 = node("QuantizeLinear", "x s z", "q")
AXIS = {"axis": integers([1])}
BOTH = "q s z q s z s z"


def quantized(operator: str, reads: str, **attributes: Any) -> Small:
    """An operator on integers, between conversions."""
    return Small([X8, node(operator, reads, "r", **MICROSOFT | attributes), node("DequantizeLinear", "r s z", "y")], STEPS)


def folded(*nodes: NodeProto, **constants: Any) -> Small:
    """A constant c, added to x."""
    return Small([*nodes, node("Add", "x c", "y")], constants, opset=20)


def window(operator: str) -> Small:
    return folded(node(operator, "size", "c"), size=np.int64(6))


#: on the NPU, or folded; the other operators are in test_frontend_operators
ELSEWHERE: dict[str, Small] = {
    "If, written out": Small([node("ReduceSum", "x", "t", keepdims=0), node("Greater", "t zero", "c"),
                              node("If", "c", "y", then_branch=subgraph("then", [node("Sin", "x", "a")], "", "a"),
                                   else_branch=subgraph("else", [node("Neg", "x", "b")], "", "b"))], {"zero": np.float32(0)}),
    "Loop, written out": Small([node("Loop", "times - x", "y", body=subgraph("body", [node("Identity", "go", "on"), node("Sin", "v", "w")],
                                                                             "i go v", "on w", i=TensorProto.INT64, go=TensorProto.BOOL,
                                                                             on=TensorProto.BOOL))], {"times": np.int64(3)}),
    "com.microsoft.DynamicQuantizeLSTM": Small(
        [node("DynamicQuantizeLSTM", "x i i - - - - - t z t z", "y h", hidden_size=2, domain="com.microsoft")],
        {"i": np.ones((1, 2, 8), np.int8), "t": reals([0.01]), "z": np.zeros(1, np.int8)}, (3, 1, 2)),
    **{name: small(name) for name in ("Acos", "Acosh", "Asin", "Asinh", "Atanh", "Cosh", "Sinh", "Tan", "Log", "Sqrt")},
    "Swish": small("Swish", opset=24), "CumProd": small("CumProd", "x axis", {"axis": np.int64(1)}, 26), "CastLike": small("CastLike", "x w",
                       {"w": reals([1])}),
    "ReduceLogSum": small("ReduceLogSum", "x axis", AXIS), "RMSNormalization": small("RMSNormalization", "x g", {"g": normal(6)}, 23),
    "SwiGLU": small("SwiGLU", "x x", opset=LAST_SEEN), "CenterCropPad": small("CenterCropPad", "x size", {"size": integers([3, 7])}),
    "NegativeLogLikelihoodLoss": small("NegativeLogLikelihoodLoss", "x t", {"t": integers([0, 2, 5, 1])}),
    "SoftmaxCrossEntropyLoss": small("SoftmaxCrossEntropyLoss", "x t", {"t": integers([0, 2, 5, 1])}),
    "Attention": Small([node("Attention", "x x x", "y")], shape=(1, 2, 4, 8), opset=23),
    "CausalConvWithState": Small([node("CausalConvWithState", "x w", "y p")], {"w": normal(4, 1, 3)}, (1, 4, 8), LAST_SEEN),
    "RotaryEmbedding": Small([node("RotaryEmbedding", "x c d", "y")], {"c": normal(1, 4, 4), "d": normal(1, 4, 4)}, (1, 2, 4, 8), 23),
    "com.microsoft.Gelu": small("Gelu", **MICROSOFT),
    "com.microsoft.SimplifiedLayerNormalization": small("SimplifiedLayerNormalization", "x g", {"g": normal(6)}, **MICROSOFT),
    "com.microsoft.ExpandDims": small("ExpandDims", "x a", {"a": np.int32(0)}, **MICROSOFT),
    "com.microsoft.SkipGroupNorm": Small([node("SkipGroupNorm", "x g g x g", "y s", groups=2, **MICROSOFT)], {"g": normal(4)}, (2, 3, 5, 4)),
    "com.microsoft.GroupNorm": Small([node("GroupNorm", "x g g", "y", groups=2, activation=0, **MICROSOFT)], {"g": normal(4)}, (2, 3, 5, 4)),
    "com.microsoft.EmbedLayerNormalization": Small(
        [*WHOLE, node("EmbedLayerNormalization", "n - v v - g g", "y m", **MICROSOFT)], {**TEN, "v": normal(99, 6), "g": normal(6)}),
    "Constant": folded(node("Constant", "", "c", value_float=2.0)), "Range": folded(node("Range", "a b d", "c"), a=reals(0), b=reals(6), d=reals(1)),
    "ConstantOfShape": folded(node("ConstantOfShape", "size", "c"), size=integers([6])),
    **{name: window(name) for name in ("HannWindow", "HammingWindow", "BlackmanWindow")},
    "MelWeightMatrix": folded(node("MelWeightMatrix", "bins length rate low high", "m"), node("ReduceSum", "m", "c"),
                              bins=np.int64(4), length=np.int64(16), rate=np.int64(8192), low=reals(0), high=reals(4096)),
    "Shape": folded(node("Shape", "x", "n"), node("ReduceMax", "n", "m"), node("Cast", "m", "c", to=TensorProto.FLOAT)),
    "Size": folded(node("Size", "x", "n"), node("Cast", "n", "c", to=TensorProto.FLOAT)),
    "EyeLike": folded(node("EyeLike", "x", "c")), "IsInf": Small([node("IsInf", "x", "i"), node("Where", "i w x", "y")], {"w": reals(0)}),
    "IsNaN": Small([node("IsNaN", "x", "i"), node("Where", "i w x", "y")], {"w": reals(0)}),
    "QuantizeLinear": Small([X8, node("DequantizeLinear", "q s z", "y")], STEPS), "DequantizeLinear": Small([X8,
                       node("DequantizeLinear", "q s z", "y")], STEPS),
    "com.microsoft.QuantizeLinear": Small([node("QuantizeLinear", "x s z", "q", **MICROSOFT),
                       node("DequantizeLinear", "q s z", "y", **MICROSOFT)], STEPS),
    "DynamicQuantizeLinear": Small([node("DynamicQuantizeLinear", "x", "q t u"), node("MatMulInteger", "q w u", "n"), to_real("n")], STEPS),
    "com.microsoft.MatMulIntegerToFloat": Small(
        [node("DynamicQuantizeLinear", "x", "q t u"), node("MatMulIntegerToFloat", "q w t s u", "y", **MICROSOFT)], STEPS),
    "com.microsoft.DynamicQuantizeMatMul": Small([node("DynamicQuantizeMatMul", "x w s", "y", **MICROSOFT)], STEPS),
    "ConvInteger": Small([node("DynamicQuantizeLinear", "x", "q t u"), node("ConvInteger", "q k u", "n"), to_real("n")],
                         {"k": np.full((2, 3, 2, 2), 5, np.uint8)}, (1, 3, 5, 5)),
    "QLinearConv": Small([X8, node("QLinearConv", "q s z k s z s z", "r"), node("DequantizeLinear", "r s z", "y")],
                         {**STEPS, "k": np.full((2, 3, 2, 2), 5, np.uint8)}, (1, 3, 5, 5)),
    "QLinearMatMul": quantized("QLinearMatMul", "q s z w s z s z", domain=""), "com.microsoft.QLinearMatMul": quantized("QLinearMatMul",
    "q s z w s z s z"),
    "com.microsoft.QGemm": quantized("QGemm", "q s z w s z - s z", alpha=1.0), "com.microsoft.QLinearAdd": quantized("QLinearAdd", BOTH),
    "com.microsoft.QLinearMul": quantized("QLinearMul", BOTH), "com.microsoft.QLinearConcat": quantized("QLinearConcat", "s z q s z q s z", axis=0),
    "com.microsoft.QLinearSigmoid": quantized("QLinearSigmoid", "q s z s z"),
    "com.microsoft.QLinearLeakyRelu": quantized("QLinearLeakyRelu", "q s z s z"),
    "com.microsoft.QLinearReduceMean": quantized("QLinearReduceMean", "q s z s z", axes=[1], keepdims=1),
    "com.microsoft.QLinearSoftmax": quantized("QLinearSoftmax", "q s z s z", opset=13, axis=1),
    "com.microsoft.QLinearConv": Small([X8, node("QLinearConv", "q s z k s z s z", "r", channels_last=1, **MICROSOFT),
                                        node("DequantizeLinear", "r s z", "y")], {**STEPS, "k": np.full((2, 3, 2, 2), 5, np.uint8)}, (1, 5, 5, 3)),
    "com.microsoft.NhwcMaxPool": Small([X8, node("NhwcMaxPool", "q", "r", kernel_shape=[2, 2], **MICROSOFT), node("DequantizeLinear", "r s z", "y")],
                                       STEPS, (1, 5, 5, 3)),
    "com.microsoft.NhwcConv": Small([node("NhwcConv", "x k", "y", **MICROSOFT)], {"k": normal(2, 3, 2, 2)}, (1, 5, 5, 3)),
    "com.microsoft.NhwcFusedConv": Small([node("NhwcFusedConv", "x k - x", "y", activation="Relu", **MICROSOFT)],
                                         {"k": normal(3, 3, 1, 1)}, (1, 5, 5, 3)),
    "com.microsoft.QAttention": Small([X8, node("QAttention", "q w b s s - z z", "y", num_heads=2, **MICROSOFT)],
                                      {**STEPS, "w": np.full((6, 18), 5, np.uint8), "b": normal(18)}, (1, 4, 6)),
    "com.microsoft.QEmbedLayerNormalization": Small(
        [*WHOLE, node("QEmbedLayerNormalization", "n - v v - g g - s s - s s z z - z z", "y m", **MICROSOFT)],
        {**TEN, **STEPS, "v": np.full((99, 6), 5, np.uint8), "g": np.full(6, 9, np.uint8)}),
    "com.microsoft.QLinearWhere": Small([X8, node("Greater", "x ten", "c"), node("QLinearWhere", "c q s z q s z s z", "r", **MICROSOFT),
                                         node("DequantizeLinear", "r s z", "y")], {**STEPS, **TEN}),
    "com.microsoft.QLinearAveragePool": Small([X8, node("QLinearAveragePool", "q s z s z", "r", kernel_shape=[2, 2], **MICROSOFT),
                                               node("DequantizeLinear", "r s z", "y")], STEPS, (1, 3, 5, 5)),
    "com.microsoft.QLinearGlobalAveragePool": Small([X8, node("QLinearGlobalAveragePool", "q s z s z", "r", **MICROSOFT),
                                                     node("DequantizeLinear", "r s z", "y")], STEPS, (1, 3, 5, 5)),
}  # fmt: skip
ELSEWHERE |= {
    "TensorScatter": Small([node("TensorScatter", "x u at", "y", axis=2)], {"u": normal(1, 2, 2, 3), "at": integers([1])}, (1, 2, 5, 3), 24),
    "bits of constants": Small([*WHOLE, node("BitwiseXor", "n seven", "c"), node("Abs", "c", "p"), node("Cast", "p", "u", to=TensorProto.UINT8),
                                node("BitShift", "u one", "e", direction="RIGHT"), to_real("e")], {**TEN, "one": np.uint8(1)}),
    "com.microsoft.MatMulNBits": Small([node("MatMulNBits", "x b s", "y", K=32, N=4, bits=4, block_size=32, **MICROSOFT)],
                                       {"b": np.arange(64, dtype=np.uint8).reshape(4, 1, 16), "s": np.full((4, 1), 0.1, np.float32)}, (3, 32)),
    "com.microsoft.GatherBlockQuantized": Small([*WHOLE, node("Abs", "n", "i"), node("GatherBlockQuantized", "b i s", "y", block_size=16, bits=4,
                                                 gather_axis=0, quantize_axis=1, **MICROSOFT)],
                                                {**TEN, "b": np.full((99, 8), 0x5A, np.uint8), "s": np.full((99, 1), 0.1, np.float32)}),
}  # fmt: skip
ALL = {**HOSTED, **RANDOM, **ELSEWHERE}


def case_model(case: Case) -> onnx.ModelProto:
    names = [name for name in dict.fromkeys(case.inputs.split()) if name != "-" and name not in case.constants]
    inputs = {name: case.shapes.get(name, case.shape) for name in names}
    nodes = [node(case.operator, case.inputs, case.outputs, **case.attributes)]
    return model(nodes, inputs, case.outputs.split(), case.constants, opset=case.opset, dtypes=case.dtypes)


def test_operators_are_where_the_table_says() -> None:
    """Of each operator some form is there; it may be elsewhere for other attributes, as its note says."""
    found: dict[str, set[str]] = {}
    cells = [recurrent_model(name, state=False) for name in ("lstm", "gru", "rnn")]
    for proto in (*map(case_model, CASES), *(each.proto for each in ALL.values()), *cells):
        domains = {part.name: part.domain for part in proto.graph.node}
        for row in operators.place(proto, {}):
            domain = domains.get(row.node) or next(part.domain for part in proto.graph.node if part.op_type == row.operator)
            found.setdefault(f"{domain}.{row.operator}" if domain else row.operator, set()).add(row.place)
    rows = {row.name: row.place for row in operators.table()}
    assert {name: (place, found.get(name)) for name, place in rows.items() if place not in found.get(name, ()) and name not in NOWHERE} == {}


@pytest.mark.parametrize("name", HOSTED)
def test_the_host_gives_the_values_of_onnxruntime(name: str) -> None:
    proto = HOSTED[name].proto
    # rounded to 8 bits, none of these becomes another whole number
    feeds = [{"x": np.floor(10 * normal(*HOSTED[name].shape, seed=seed)) / 10 + np.float32(0.05)} for seed in range(4)]
    package = npucc.compile(proto, target="tiny", calibration=feeds, quant="scheme=int8")
    assert package.host_nodes
    for feed in feeds:
        want, have = run(proto, feed)[0], package.run(feed).outputs["y"]
        np.testing.assert_allclose(have, want, rtol=0, atol=0.03 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("name", NOWHERE)
def test_what_neither_can_run_is_said(name: str) -> None:
    with pytest.raises(ImportModelError, match=f"operator {name} has no place on the NPU"):
        npucc.compile(NOWHERE[name].proto)


def test_a_size_that_depends_on_data_can_not_leave() -> None:
    proto = model([node("NonZero", "x", "y")], {"x": (2, 3)}, ["y"], dtypes={"y": "int64"})
    with pytest.raises(ImportModelError, match="output 'y' has no fixed shape"):
        npucc.compile(proto)
