"""Each ONNX operator, in the opsets where it differs: the imported graph and the fused graph yield what onnxruntime yields for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from npucc.frontend import OPERATORS
from tests.npucc.onnx_models import assert_agrees, model, node, normal, reals

IMAGE = (1, 4, 7, 9)


@dataclass(frozen=True)
class Case:
    """One node: `inputs` as in `node`; names found in `constants` are constants, the others inputs of shape `shape` (or `shapes`)."""

    operator: str
    inputs: str = "x"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = IMAGE
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    outputs: str = "y"
    opset: int = 17

    def __str__(self) -> str:
        words = [f"{key}={value.decode() if isinstance(value, bytes) else value}" for key, value in self.attributes.items()]
        return f"{self.operator}-{self.opset}-{'-'.join(words)}-{'x'.join(map(str, self.shape))}"


def weights(*shape: int) -> np.ndarray:
    return normal(*shape, seed=3) / np.float32(np.sqrt(np.prod(shape[1:])))


def conv(shape: tuple[int, ...], *, image: tuple[int, ...] = IMAGE, bias: int = 0, operator: str = "Conv", **attributes: Any) -> Case:
    constants = {"w": weights(*shape)} | ({"b": normal(bias)} if bias else {})
    return Case(operator, "x w b" if bias else "x w", attributes, constants, shape=image)


LINE = (2, 4, 11)
CONVOLUTIONS = [
    conv((6, 4, 3, 3)),
    conv((6, 4, 3, 3), bias=6, pads=[1, 0, 2, 1], strides=[2, 1]),
    conv((6, 4, 2, 3), auto_pad=b"SAME_UPPER", strides=[2, 2]),
    conv((6, 4, 2, 3), auto_pad=b"SAME_LOWER", strides=[2, 2]),
    conv((6, 4, 2, 3), auto_pad=b"VALID", dilations=[2, 1]),
    conv((8, 2, 3, 1), group=2, dilations=[1, 2]),
    conv((4, 1, 3, 3), group=4, bias=4, pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
    conv((6, 4, 3), image=LINE, bias=6, pads=[2, 1], strides=[2]),
    conv((6, 4, 4), image=LINE, auto_pad=b"SAME_UPPER"),
    conv((6, 4, 3), image=LINE, pads=[2, 2], dilations=[2]),
    *(
        conv((4, 3, 3, 2), operator="ConvTranspose", **attributes)
        for attributes in (
            {},
            {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 0]},
            {"strides": [2, 3], "auto_pad": b"SAME_UPPER"},
            {"strides": [2, 3], "auto_pad": b"SAME_LOWER"},
            {"strides": [2, 2], "output_shape": [14, 18]},
            {"strides": [2, 2], "dilations": [2, 1]},
        )
    ),
    conv((4, 3, 2, 2), operator="ConvTranspose", group=2, bias=6, strides=[2, 2]),
    conv((4, 3, 4), image=LINE, operator="ConvTranspose", bias=3, strides=[2], pads=[1, 1]),
]

MATRIX = [
    Case("Gemm", "x w", {}, {"w": normal(5, 3)}, shape=(2, 5)),
    Case("Gemm", "x w c", {"alpha": 0.5, "beta": 2.0, "transB": 1}, {"w": normal(3, 5), "c": normal(3)}, shape=(2, 5)),
    Case("Gemm", "x w c", {"transA": 1}, {"w": normal(5, 3), "c": normal(2, 3)}, shape=(5, 2)),
    Case("Gemm", "x w c", {"beta": 0.5}, {"w": normal(5, 3), "c": normal(1, 1)}, shape=(2, 5)),
    Case("Gemm", "x z", {"alpha": 0.5, "transB": 1}, shapes={"x": (2, 5), "z": (3, 5)}),
    Case("Gemm", "x z c", {}, {"c": normal(3)}, shapes={"x": (2, 5), "z": (5, 3)}),
    Case("MatMul", "x w", {}, {"w": normal(5, 3)}, shape=(2, 4, 5)),
    Case("MatMul", "x w", {}, {"w": normal(1, 5, 3)}, shape=(2, 4, 5)),
    Case("MatMul", "x w", {}, {"w": normal(2, 5, 3)}, shape=(2, 4, 5)),
    Case("MatMul", "x w", {}, {"w": normal(5)}, shape=(2, 4, 5)),
    Case("MatMul", "x w", {}, {"w": normal(5, 3)}, shape=(5,)),
    Case("MatMul", "w x", {}, {"w": normal(3, 5)}, shape=(2, 5, 4)),
    Case("MatMul", "w x", {}, {"w": normal(5)}, shape=(5, 4)),
    Case("MatMul", "x z", shapes={"x": (2, 1, 3, 5), "z": (4, 5, 2)}),
    Case("MatMul", "x z", shapes={"x": (3, 5), "z": (5,)}),
    *(
        Case("Einsum", inputs, {"equation": equation}, constants, shapes=shapes, shape=shapes["x"])
        for equation, inputs, shapes, constants in (
            ("bij,jk->bik", "x w", {"x": (2, 3, 4)}, {"w": normal(4, 5)}),
            ("bhid,bhjd->bhij", "x z", {"x": (1, 2, 3, 4), "z": (1, 2, 5, 4)}, {}),
            ("bihd,bjhd->bhij", "x z", {"x": (1, 3, 2, 4), "z": (1, 5, 2, 4)}, {}),
            ("abc->cab", "x", {"x": (2, 3, 4)}, {}),
            ("abc->b", "x", {"x": (2, 3, 4)}, {}),
            ("jk,bij->bki", "w x", {"x": (2, 3, 4)}, {"w": normal(4, 5)}),
            ("bhi,jh->bj", "x w", {"x": (2, 3, 4)}, {"w": normal(5, 3)}),
        )
    ),
]

SIMPLE = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "Erf",
    "HardSwish",
    "Softplus",
    "Softsign",
    "Abs",
    "Neg",
    "Exp",
    "Reciprocal",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Sin",
    "Cos",
    "Atan",
]
SIMPLE += ["Identity", "Elu", "Selu", "Celu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Shrink", "Dropout"]
VECTOR = {"c": normal(9)}
TWO = {"x": IMAGE, "z": (4, 1, 9)}
ELEMENTWISE = [
    *(Case(operator) for operator in SIMPLE),
    Case("Mish", opset=18),
    Case("Gelu", opset=20),
    Case("Gelu", attributes={"approximate": b"tanh"}, opset=20),
    *(Case(name, attributes={"alpha": 0.3}) for name in ("Elu", "Celu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid")),
    *(Case(name, "x c", {}, VECTOR) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(Case(name, "c x", {}, VECTOR) for name in ("Add", "Sub", "Mul", "Max", "Min")),
    *(Case(name, "x z", shapes=TWO) for name in ("Add", "Sub", "Mul", "Max", "Min")),
    *(Case(name, "x z c", {}, VECTOR, shapes=TWO) for name in ("Sum", "Mean", "Max", "Min")),
    *(Case(name, "x z", shapes=TWO, dtypes={"y": "bool"}) for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")),
    *(Case(name, "p q", shapes={"p": (3, 4), "q": (4,)}, dtypes=dict.fromkeys("pqy", "bool")) for name in ("And", "Or", "Xor")),
    Case("Not", "p", shapes={"p": (3, 4)}, dtypes={"p": "bool", "y": "bool"}),
    Case("Where", "p x z", shapes={"p": (9,), **TWO}, dtypes={"p": "bool"}),
    Case("Pow", "x c", {}, {"c": np.float32(2)}),
    Case("Pow", "c x", {}, {"c": np.float32(2)}),
    Case("Pow", "x c", {}, {"c": np.full((1, 1, 1, 1, 1), 3, np.float32)}),
    Case("Mod", "x c", {"fmod": 1}, {"c": np.float32(0.75)}),
    Case("PRelu", "x c", {}, {"c": reals([0.2])}),
    Case("PRelu", "x c", {}, {"c": normal(4, 1, 1)}),
    Case("Clip", attributes={"min": -0.5, "max": 1.5}, opset=10),
    Case("Clip", attributes={"max": 1.5}, opset=7),
    Case("Clip", "x lo hi", {}, {"lo": np.float32(-0.5), "hi": np.float32(1)}),
    Case("Clip", "x - hi", {}, {"hi": np.float32(1)}),
    Case("Clip", "x lo", shapes={"x": IMAGE, "lo": ()}),
    Case("Cast", attributes={"to": 1}, dtypes={"x": "uint8"}),
    Case("Cast", attributes={"to": 1}, dtypes={"x": "bool"}),
    Case("Cast", attributes={"to": 9}, dtypes={"y": "bool"}),
    Case("Cast", attributes={"to": 6}, dtypes={"y": "int32"}),
    Case("Cast", attributes={"to": 10}, dtypes={"y": "float16"}),
]

POOLS = [
    *(Case(name, attributes={"kernel_shape": [3, 2], **attributes}, opset=19)
      for name in ("MaxPool", "AveragePool")
      for attributes in (
          {}, {"strides": [2, 2], "pads": [1, 0, 2, 1]},
          {"strides": [2, 2], "auto_pad": b"SAME_UPPER"}, {"strides": [2, 2], "auto_pad": b"SAME_LOWER"},
          {"strides": [2, 3], "ceil_mode": 1}, {"strides": [3, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]}, {"dilations": [2, 1]},
      )),
    Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "ceil_mode": 1, "strides": [2, 2]},
         shape=(1, 4, 8, 8), opset=19),
    Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "dilations": [2, 2]}, opset=19),
    Case("MaxPool", attributes={"kernel_shape": [3], "strides": [2]}, shape=LINE),
    Case("AveragePool", attributes={"kernel_shape": [4], "pads": [1, 2]}, shape=LINE),
    Case("GlobalAveragePool"), Case("GlobalMaxPool"), Case("GlobalAveragePool", shape=LINE),
]  # fmt: skip

REDUCTIONS = [
    *(
        Case(name, attributes={"axes": [1, -1], "keepdims": keep}, opset=11)
        for name in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
        for keep in (0, 1)
    ),
    *(Case(name, attributes={"axes": [2]}, opset=13) for name in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceMean")),
    *(Case(name, "x a", {"keepdims": 0}, {"a": [0, 3]}, opset=18) for name in ("ReduceMean", "ReduceSum", "ReduceMax")),
    Case("ReduceSum", "x a", {"keepdims": 1}, {"a": [1]}, opset=13),
    Case("ReduceMean"),
    Case("ReduceSum", "x", {"noop_with_empty_axes": 1}, opset=13),
    *(
        Case(name, attributes={"axis": axis}, opset=opset, shape=(2, 3, 4))
        for name in ("Softmax", "LogSoftmax")
        for axis in (1, 2)
        for opset in (11, 13)
    ),
]

STATISTICS = {"s": normal(4), "b": normal(4, seed=1), "m": normal(4, seed=2), "v": np.abs(normal(4, seed=4)) + 0.1}
NORMALIZATIONS = [
    *(
        Case("BatchNormalization", "x s b m v", {"epsilon": 1e-3}, STATISTICS, shape=shape, opset=opset)
        for shape in (IMAGE, LINE, (3, 4))
        for opset in (9, 15)
    ),
    Case("InstanceNormalization", "x s b", {}, STATISTICS),
    Case("GroupNormalization", "x s b", {"num_groups": 2}, STATISTICS, opset=21),
    Case("LayerNormalization", "x s b", {}, {"s": normal(9), "b": normal(9, seed=1)}),
    Case("LayerNormalization", "x s", {"axis": 2, "epsilon": 1e-2}, {"s": normal(7, 9)}),
    Case("LpNormalization", attributes={"axis": 1}),
    Case("LpNormalization", attributes={"axis": -1, "p": 1}),
]

LAYOUT = [
    Case("Reshape", "x s", {}, {"s": [0, -1, 9]}),
    Case("Flatten"), Case("Flatten", attributes={"axis": 0}), Case("Flatten", attributes={"axis": -1}),
    Case("Squeeze", attributes={"axes": [0]}, opset=11), Case("Squeeze", "x a", {}, {"a": [-4]}), Case("Squeeze"),
    Case("Unsqueeze", attributes={"axes": [0, 5]}, opset=11), Case("Unsqueeze", "x a", {}, {"a": [1, -1]}),
    Case("Transpose"), Case("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Case("Concat", "x z x", {"axis": 1}, shapes={"x": IMAGE, "z": (1, 2, 7, 9)}), Case("Concat", "x c", {"axis": -1}, {"c": normal(1, 4, 7, 2)}),
    Case("Split", attributes={"axis": 1, "split": [1, 3]}, outputs="y w", opset=11),
    Case("Split", "x s", {"axis": -1}, {"s": [2, 3, 4]}, outputs="y w v"),
    Case("Split", attributes={"axis": 1}, outputs="y w"), Case("Split", attributes={"axis": 2, "num_outputs": 2}, outputs="y w", opset=18),
    Case("Slice", attributes={"starts": [1, -4], "ends": [3, 100], "axes": [1, 3]}, opset=9),
    Case("Slice", "x s e a t", {}, {"s": [-1, 8], "e": [-100, 0], "a": [1, -1], "t": [-1, -3]}),
    Case("Slice", "x s e", {}, {"s": [0, 1], "e": [1, 3]}),
    Case("Expand", "x s", {}, {"s": [3, 1, 1, 1, 9]}), Case("Expand", "x s", {}, {"s": [3, 5, 4]}, shape=(5, 1)),
    Case("Tile", "x r", {}, {"r": [2, 1, 3, 1]}),
    Case("Pad", attributes={"pads": [0, 1, 2, 0, 0, 0, 1, 3], "value": 0.5}, opset=10),
    Case("Pad", "x p v", {}, {"p": [0, 0, 2, 1, 0, 0, 0, 3], "v": np.float32(2)}),
    *(Case("Pad", "x p", {"mode": mode}, {"p": [0, 0, 2, 1, 0, 0, 1, 3]}) for mode in (b"edge", b"reflect")),
    Case("Pad", "x p", {}, {"p": [0, -1, 2, 0, 0, 0, -3, 1]}), Case("Pad", "x p - a", {}, {"p": [1, 2], "a": [-1]}, opset=18),
    Case("Gather", "x i", {"axis": 1}, {"i": np.int64(2)}), Case("Gather", "x i", {"axis": 3}, {"i": [[0, 1], [2, 3]]}),
    Case("Gather", "x i", {"axis": -1}, {"i": [8, 6, 4, -9, 1, 1, 5]}),
    Case("DepthToSpace", attributes={"blocksize": 2}), Case("DepthToSpace", attributes={"blocksize": 2, "mode": b"CRD"}),
    Case("SpaceToDepth", attributes={"blocksize": 2}, shape=(1, 3, 4, 6)),
]  # fmt: skip

SIZES = {"s": [1, 4, 10, 15]}
RESIZES = [
    Case("Upsample", attributes={"scales": [1.0, 1.0, 2.0, 3.0]}, opset=7),
    Case("Upsample", "x f", {"mode": b"linear"}, {"f": reals([1, 1, 2, 2])}, opset=9),
    Case("Resize", "x f", {}, {"f": reals([1, 1, 1.0, 1.7])}, opset=10), Case("Resize", "x f", {}, {"f": reals([1, 1, 0.6, 0.5])}, opset=10),
    Case("Resize", "x f", {"mode": b"linear"}, {"f": reals([1, 1, 2, 2])}, opset=10),
    *(Case("Resize", "x - - s", {"mode": b"nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}, SIZES)
      for coordinates in (b"half_pixel", b"asymmetric", b"align_corners")
      for rounding in (b"floor", b"ceil", b"round_prefer_floor", b"round_prefer_ceil")),
    *(Case("Resize", "x - f", {"mode": b"linear", "coordinate_transformation_mode": coordinates}, {"f": reals([1, 1, 2.0, 1.5])})
      for coordinates in (b"half_pixel", b"asymmetric", b"align_corners", b"pytorch_half_pixel")),
    Case("Resize", "x - f", {"axes": [2, 3]}, {"f": reals([2, 2])}, opset=18), Case("Resize", "x - f", {}, {"f": reals([1, 1, 2])}, shape=LINE),
]  # fmt: skip

CASES = [*CONVOLUTIONS, *MATRIX, *ELEMENTWISE, *POOLS, *REDUCTIONS, *NORMALIZATIONS, *LAYOUT, *RESIZES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_onnxruntime(case: Case) -> None:
    names = [name for name in dict.fromkeys(case.inputs.split()) if name != "-" and name not in case.constants]
    inputs = {name: case.shapes.get(name, case.shape) for name in names}
    outputs = case.outputs.split()
    assert_agrees(
        model(
            [node(case.operator, case.inputs, case.outputs, **case.attributes)], inputs, outputs, case.constants, opset=case.opset, dtypes=case.dtypes
        )
    )


def test_positive_arguments() -> None:
    """Square root and logarithm, of positive numbers."""
    assert_agrees(model([node("Abs", "x", "a"), node("Sqrt", "a", "y"), node("Exp", "x", "e"), node("Log", "e", "z")], {"x": IMAGE}, ["y", "z"]))


def test_division_of_integers_drops_the_fraction() -> None:
    proto = model([node("Div", "x z", "y")], {"x": (6,), "z": (6,)}, ["y"], dtypes=dict.fromkeys("xyz", "int32"))
    assert_agrees(proto, feeds={"x": np.array([7, -7, 6, 1, 0, -9], np.int32), "z": np.array([2, 2, 3, 5, 4, -4], np.int32)})


TESTED = {case.operator for case in CASES} | {"Sqrt", "Log"} | {"LSTM", "GRU", "RNN"}  # the last three in test_sequences
ELSEWHERE = {"Tan", "Asin", "Acos", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "ReduceLogSum", "CastLike", "Swish", "QuickGelu", "FastGelu"}


def test_every_operator_is_tested() -> None:
    assert {name for _, name in OPERATORS} - ELSEWHERE == TESTED
