"""Each ONNX operator, in the opsets where it differs: the imported graph and the fused graph yield what onnxruntime yields for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from npucc.export import to_onnx
from npucc.frontend import OPERATORS, import_model
from npucc.frontend.operators import GROUPS
from tests.npucc.onnx_models import assert_agrees, model, node, normal, reals, run

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
    Case("Conv", "x w b", {"pads": [1, 0, 2, 1], "strides": [2, 1]}, {"b": normal(6)}, shapes={"x": IMAGE, "w": (6, 4, 3, 3)}),
    Case("Conv", "x w", {"group": 2, "dilations": [2, 1]}, shapes={"x": IMAGE, "w": (6, 2, 3, 2)}),
    Case("Conv", "x w b", {"pads": [2, 1]}, shapes={"x": LINE, "w": (6, 4, 3), "b": (6,)}),
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
    Case("GroupNormalization", "x s b", {"num_groups": 2}, {"s": normal(2), "b": normal(2)}, opset=18),
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
    Case("Resize", "x - f", {"nearest_mode": b"round_prefer_floor"}, {"f": reals([1, 1, 1.3])}, shape=(1, 2, 44)),  # ties but for rounding errors
    Case("Resize", "x - f", {"nearest_mode": b"round_prefer_ceil"}, {"f": reals([1, 1, 0.3])}, shape=(1, 2, 31)),
    Case("Resize", "x - f", {"axes": [2, 3]}, {"f": reals([2, 2])}, opset=18), Case("Resize", "x - f", {}, {"f": reals([1, 1, 2])}, shape=LINE),
]  # fmt: skip

MORE_RESIZES = [
    *(Case("Resize", "x - f", {"mode": b"cubic", "coordinate_transformation_mode": coordinates, **extra}, {"f": reals([1, 1, 1.7, 0.6])})
      for coordinates in (b"half_pixel", b"align_corners", b"asymmetric") for extra in ({}, {"exclude_outside": 1, "cubic_coeff_a": -0.5})),
    *(Case("Resize", "x - f", {"mode": mode, "antialias": 1}, {"f": reals([1, 1, 0.6, 0.4])}, opset=18) for mode in (b"linear", b"cubic")),
    *(Case("Resize", "x r f", {"mode": mode, "coordinate_transformation_mode": b"tf_crop_and_resize", "extrapolation_value": 3.0},
           {"r": reals([0, 0, 0.4, 0.6, 1, 1, 1.2, 0.6]), "f": reals([1, 1, 1.5, 0.8])}) for mode in (b"nearest", b"linear")),
    Case("Resize", "x - f", {"coordinate_transformation_mode": b"half_pixel_symmetric", "mode": b"linear"}, {"f": reals([1, 1, 1.9, 0.7])}, opset=19),
    Case("Resize", "x - - s", {"keep_aspect_ratio_policy": b"not_smaller", "axes": [2, 3]}, {"s": [10, 11]}, opset=18),
    Case("Resize", "x - f", {"mode": b"linear"}, {"f": reals([1, 1, 2, 1.5, 2])}, shape=(1, 2, 3, 4, 5)),
]  # fmt: skip

VOLUME = (2, 4, 5, 6, 7)
VOLUMES = [
    conv((6, 4, 3, 3, 2), image=VOLUME, bias=6, pads=[1, 0, 2, 0, 1, 1], strides=[2, 1, 2]),
    conv((8, 2, 2, 3, 3), image=VOLUME, group=2, dilations=[2, 1, 1]),
    conv((4, 3, 2, 3, 2), image=VOLUME, operator="ConvTranspose", bias=3, strides=[3, 2, 1], pads=[1, 0, 1, 0, 1, 0], output_padding=[1, 0, 0]),
    conv((4, 3, 3, 2, 2), image=VOLUME, operator="ConvTranspose", group=2, pads=[2, 0, 0, 2, 0, 0]),
    Case("MaxPool", attributes={"kernel_shape": [2, 3, 2], "strides": [2, 2, 1], "pads": [1, 0, 0, 0, 1, 1], "ceil_mode": 1}, shape=VOLUME),
    *(Case("AveragePool", attributes={"kernel_shape": [2, 3, 2], "strides": [2, 2, 1], "pads": [1, 0, 0, 0, 1, 1], "count_include_pad": counted},
           shape=VOLUME) for counted in (0, 1)),
    Case("AveragePool", attributes={"kernel_shape": [2, 3], "dilations": [2, 1], "pads": [1, 1, 0, 1]}, opset=19),
    *(Case("LpPool", attributes={"kernel_shape": [2, 3], "strides": [1, 2], "pads": [1, 1, 0, 1], "p": p}, opset=18) for p in (1, 2, 3)),
    *(Case("GlobalLpPool", attributes={"p": p}) for p in (1, 2)),
]  # fmt: skip

INDICES = {"i": np.random.default_rng(4).integers(-7, 7, (1, 4, 5, 9))}
TABLE = (5, 6)
INDEXING = [
    Case("GatherElements", "x i", {"axis": 2}, INDICES), Case("GatherElements", "x i", {}, {"i": [[4, 0], [-5, 2]]}, shape=TABLE),
    Case("GatherND", "x i", {}, {"i": [[0, 1, 2], [0, -1, 6]]}), Case("GatherND", "x i", {"batch_dims": 1}, {"i": [[[3], [1]]]}),
    Case("Compress", "x c", {"axis": 1}, {"c": np.array([True, False, True])}), Case("Compress", "x c", {}, {"c": np.array([False, True, True])}),
    *(Case("ScatterElements", "x i u", {"axis": 1, "reduction": word}, {"i": [[1, 1, 0], [5, -2, 5]]}, shape=TABLE, shapes={"u": (2, 3)}, opset=18)
      for word in (b"add", b"mul", b"max", b"min")),
    Case("ScatterElements", "x i u", {"axis": 1}, {"i": [[1, 3, 0], [5, -2, 4]]}, shape=TABLE, shapes={"u": (2, 3)}),
    Case("ScatterND", "x i u", {}, {"i": [[4], [-4]]}, shape=TABLE, shapes={"u": (2, 6)}),
    Case("ScatterND", "x i u", {"reduction": b"add"}, {"i": [[4, 1], [2, 2], [4, 1]]}, shape=TABLE, shapes={"u": (3,)}),
    Case("Scatter", "x i u", {"axis": 1}, {"i": [[1, 3, 0]]}, shape=TABLE, shapes={"u": (1, 3)}, opset=9),
    Case("ReverseSequence", "x n", {}, {"n": [5, 1, 3, 4, 2, 5]}, shape=(5, 6, 2)),
    *(Case(operator, attributes={"axis": axis, "keepdims": kept, "select_last_index": last}, dtypes={"y": "int64"})
      for operator in ("ArgMax", "ArgMin") for axis, kept, last in ((1, 1, 0), (-1, 0, 1))),
    Case("Hardmax", attributes={"axis": 1}), Case("Hardmax", attributes={"axis": 2}, opset=11),
    *(Case("TopK", "x k", {"axis": axis, "largest": largest}, {"k": [3]}, outputs="v i", dtypes={"i": "int64"})
      for axis, largest in ((1, 1), (-1, 0))),
    Case("OneHot", "x d v", {"axis": 1}, {"d": [4], "v": reals([-1, 2.5])}, shape=(2, 3), dtypes={"x": "int64"}),
    Case("Trilu", "x k", {"upper": 0}, {"k": np.int64(-1)}), Case("Trilu"),
    *(Case("CumSum", "x a", {"exclusive": exclusive, "reverse": back}, {"a": np.int64(axis)}) for exclusive, back, axis in ((0, 0, 1), (1, 1, -1))),
    Case("ReduceProd", attributes={"axes": [1, 3], "keepdims": 0}, shape=(2, 3, 4, 5)),
]  # fmt: skip

GRID = np.random.default_rng(6).uniform(-1.2, 1.2, (2, 3, 5, 2)).astype(np.float32)
LINEAR = [
    *(Case("GridSample", "x g", {"mode": mode, "padding_mode": padding}, {"g": GRID}, shape=(2, 3, 6, 4))
      for mode, padding in ((b"bilinear", b"zeros"), (b"nearest", b"border"), (b"bicubic", b"reflection"))),
    Case("RoiAlign", "x r b", {"output_height": 2, "output_width": 3, "spatial_scale": 0.5},
         {"r": reals([[0, 1, 9, 12], [2, 2, 14, 8]]), "b": [0, 0]}),
    Case("AffineGrid", "x s", {"align_corners": 1}, {"s": [2, 3, 4, 5]}, shape=(2, 2, 3), opset=20),
    Case("Col2Im", "x i b", {"strides": [2, 1], "pads": [1, 0, 0, 1], "dilations": [1, 2]}, {"i": [6, 7], "b": [2, 3]}, shape=(2, 18, 12), opset=18),
    Case("DFT", attributes={"axis": 1}, shape=(2, 6, 2)), Case("DFT", attributes={"axis": 1, "inverse": 1}, shape=(2, 5, 2)),
    Case("DFT", "x n", {"axis": 1, "onesided": 1}, {"n": np.int64(8)}, shape=(2, 6, 1)),
    Case("STFT", "x s w", {}, {"s": np.int64(4), "w": normal(8)}, shape=(2, 32, 1)),
]  # fmt: skip


def fused(operator: str, inputs: str, attributes: Mapping[str, Any], constants: Mapping[str, Any], **rest: Any) -> Case:
    """A node of onnxruntime's own domain."""
    return Case(operator, inputs, {"domain": "com.microsoft", **attributes}, constants, **rest)


WORDS = (2, 5, 8)
CACHE = {"c": normal(9, 2, seed=7), "s": normal(9, 2, seed=8)}
SCALED = {"g": normal(8), "b": normal(8, seed=1), "o": normal(8, seed=2)}
PRODUCT = {"w": weights(8, 24), "b": normal(24)}
PAST = (1, 2, 6, 16)
QUERIES = {"c": normal(12, 8, seed=7), "s": normal(12, 8, seed=8), "t": np.array([4], np.int32), "u": np.array([8], np.int32)}
TRANSFORMERS = [
    fused("RotaryEmbedding", "x p c s", {"num_heads": 2}, {"p": [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], **CACHE}, shape=WORDS),
    fused("RotaryEmbedding", "x p c s", {"interleaved": 1}, {"p": [2], **CACHE}, shape=(2, 3, 5, 4)),
    fused("Attention", "x w b m", {"num_heads": 2, "unidirectional": 1},
          {**PRODUCT, "m": np.array([[1] * 5, [1, 1, 0, 0, 0]], np.int32)}, shape=WORDS),
    fused("Attention", "x w b m", {"num_heads": 4}, {**PRODUCT, "m": np.array([5, 2], np.int32)}, shape=WORDS),
    fused("MultiHeadAttention", "x k v b", {"num_heads": 2}, {"b": normal(24)}, shape=WORDS, shapes={"k": (2, 7, 8), "v": (2, 7, 8)}),
    fused("SkipLayerNormalization", "x z g b o", {}, SCALED, shape=WORDS),
    fused("SkipSimplifiedLayerNormalization", "x z g", {}, SCALED, shape=WORDS),
    fused("BiasGelu", "x o", {}, SCALED, shape=WORDS), fused("QuickGelu", "x", {}, {}), fused("FastGelu", "x o", {}, SCALED, shape=WORDS),
    fused("FusedMatMul", "x z", {"transB": 1, "alpha": 0.25}, {}, shape=WORDS),
    fused("ExpandDims", "x a", {}, {"a": np.int32(1)}, shape=WORDS), fused("ExpandDims", "x a", {}, {"a": np.int32(-1)}, shape=WORDS),
    fused("TransposeMatMul", "x z", {"transA": 1}, {}, shape=WORDS),
    *(fused("GroupQueryAttention", inputs, {"num_heads": 4, "kv_num_heads": 2, **extra}, {"n": np.array(steps, np.int32), **QUERIES}, shape=shape,
            shapes={"k": (1, shape[1], 32), "v": (1, shape[1], 32), "pk": PAST, "pv": PAST}, outputs="y k1 v1")
      for inputs, extra, steps, shape in (
          ("x k v - - t n", {"local_window_size": 3, "softcap": 2.0}, 5, (1, 5, 64)), ("x - - - - t n c s", {"do_rotary": 1}, 5, (1, 5, 128)),
          ("x k v pk pv u n c s", {"do_rotary": 1, "rotary_interleaved": 1}, 9, (1, 3, 64)))),
    fused("FusedConv", "x w b z", {"activation": b"LeakyRelu", "activation_params": [0.2], "pads": [1, 1, 1, 1]},
          {"w": weights(6, 4, 3, 3), "b": normal(6)}, shapes={"z": (1, 6, 7, 9)}),
    fused("FusedGemm", "x w b", {"activation": b"Relu", "transB": 1}, {"w": weights(6, 8), "b": normal(6)}, shape=(5, 8)),
    Case("SimplifiedLayerNormalization", "x g", {}, SCALED, shape=WORDS),
    Case("LRN", attributes={"size": 3, "alpha": 0.1, "bias": 2.0}), Case("MeanVarianceNormalization"),
    *(Case("Einsum", terms, {"equation": equation}, {}, shape=shape) for terms, equation, shape in (
        ("x", b"bii->bi", (3, 4, 4)), ("x z v", b"ij,jk,kl->il", (4, 4)), ("x z", b"...ij,...jk", (2, 4, 4)), ("x", b"ii", (5, 5)))),
]  # fmt: skip

CASES = [
    *CONVOLUTIONS, *MATRIX, *ELEMENTWISE, *POOLS, *REDUCTIONS, *NORMALIZATIONS, *LAYOUT, *RESIZES, *MORE_RESIZES, *VOLUMES, *INDEXING, *LINEAR,
    *TRANSFORMERS,
]  # fmt: skip


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


@pytest.mark.parametrize("skip", [(), (2, 4), (2, 1, 1, 4), (2, 3, 5, 4)], ids=str)
def test_group_norm_of_channels_last(skip: tuple[int, ...]) -> None:
    """onnxruntime has none on the CPU."""
    attributes = {"groups": 2, "activation": 1, "domain": "com.microsoft"}
    nodes = [node("SkipGroupNorm", "x g b k c", "y s", **attributes) if skip else node("GroupNorm", "x g b", "y", **attributes)]
    added = {"k": normal(*skip, seed=3), "c": normal(4, seed=4)} if skip else {}
    proto = model(nodes, {"x": (2, 3, 5, 4)}, ["y", "s"][: len(nodes[0].output)], {"g": normal(4), "b": normal(4, seed=1), **added})
    x = normal(2, 3, 5, 4, seed=2)
    feed = {"x": x}
    if skip:
        x = x + added["k"].reshape(2, *((1, 1) if len(skip) == 2 else skip[1:3]), 4) + added["c"]
    parts = x.reshape(2, 15, 2, 2)
    normed = ((parts - parts.mean((1, 3), keepdims=True)) / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape) * normal(4)
    normed += normal(4, seed=1)
    for found, expected in zip(run(to_onnx(import_model(proto)), feed), [normed / (1 + np.exp(-normed)), x], strict=False):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_embedding_of_words() -> None:
    tables = {"w": normal(6, 8, seed=4), "p": normal(9, 8, seed=5), "t": normal(2, 8, seed=6)}
    constants = {**tables, **SCALED, "k": np.array([[1, 1, 0], [1] * 3], np.int32)}
    inputs = {"x": (2, 3), "s": (2, 3)}
    nodes = [node("EmbedLayerNormalization", "x s w p t g b k", "y m", domain="com.microsoft")]
    feeds = {"x": np.array([[1, 5, 0], [2, 2, 3]], np.int32), "s": np.array([[0, 1, 1], [0, 0, 1]], np.int32)}
    assert_agrees(model(nodes, inputs, ["y", "m"], constants, dtypes=dict.fromkeys("xsm", "int32")), feeds=feeds)


TESTED = {case.operator for case in CASES} | {"Sqrt", "Log", "EmbedLayerNormalization"} | {"LSTM", "GRU", "RNN"}  # the last three in test_sequences
#: among ONNX's own tests in tests/onnx_backend
ELSEWHERE = {
    "Tan", "Asin", "Acos", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "ReduceLogSum", "CastLike", "Swish", "RMSNormalization", "CumProd",
    "IsNaN", "IsInf", "GroupNorm", "SkipGroupNorm",
    *("Div", "BitShift", "BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "TensorScatter"),  # in test_integers
}  # fmt: skip


def test_every_operator_is_tested() -> None:
    quantized = {record.name for group in ("quantized", "blocks") for record in GROUPS[group]}  # in test_quantized_models
    assert {name for _, name in OPERATORS} - ELSEWHERE - quantized == TESTED - ELSEWHERE


@pytest.mark.parametrize(
    ("operator", "indices", "updates", "attributes"),
    [
        *(("ScatterElements", (3, 2), (3, 2), {"axis": 1, "reduction": each}) for each in (b"none", b"add", b"max")),
        *(("ScatterND", (3, 2), (3, 4), {"reduction": each}) for each in (b"none", b"mul", b"min")),
        ("ScatterND", (2, 1), (2, 5, 4), {}), ("GatherElements", (3, 7), None, {"axis": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_computed_indices_may_count_from_the_end(
    operator: str, indices: tuple[int, ...], updates: tuple[int, ...] | None, attributes: dict[str, Any]
) -> None:
    random = np.random.default_rng(0)
    shape = (3, 5, 4) if operator == "ScatterND" else (3, 5)
    bounds = np.array(shape[: indices[-1]]) if operator == "ScatterND" else 5
    feeds = {"x": normal(*shape), "i": random.integers(-bounds, bounds, indices)} | ({"u": normal(*updates, seed=1)} if updates else {})
    inputs = {name: value.shape for name, value in feeds.items()}
    assert_agrees(model([node(operator, " ".join(feeds), "y", **attributes)], inputs, ["y"], opset=18, dtypes={"i": "int64"}), feeds=feeds)
