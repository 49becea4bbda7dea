"""The graph operators: one record each, with its attributes, arity, result shape and algebraic traits.

The one big idea: ~200 ONNX operators come down to these. Stages ask a record for its traits; none tests an operator's name.
All shapes are ONNX shapes. An optional input that is left out is the empty string.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import scalar

Shape = tuple[int, ...]
Clamp = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Attributes:
    """Base: the attributes of operators that have none."""

    def text(self) -> str:
        """` key=value …` of everything that is not the default."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f" {field.name}={value if not isinstance(value, tuple) else ','.join(map(str, value))}")
        return "".join(parts)


@dataclass(frozen=True, slots=True)
class Conv(Attributes):
    """2-D only (1-D is given a height of 1). `clamp` is applied to the real result (ReLU, ReLU6, Clip)."""

    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    clamp: Clamp = None


@dataclass(frozen=True, slots=True)
class ConvTranspose(Attributes):
    """Weights are [C, N/groups, kh, kw] as in ONNX; pads crop the result."""

    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    output_padding: tuple[int, int] = (0, 0)
    clamp: Clamp = None


@dataclass(frozen=True, slots=True)
class MatMul(Attributes):
    """a[…, M, K] · b[…, K, N] (+ bias[N]), batch dimensions broadcast as in numpy."""

    clamp: Clamp = None


@dataclass(frozen=True, slots=True)
class Binary(Attributes):
    """numpy broadcasting. `offset`: 128 where bytes are added or multiplied as unsigned ones, 0 where as signed ones (isa.spec, add)."""

    clamp: Clamp = None
    offset: int = 128


@dataclass(frozen=True, slots=True)
class Compare(Attributes):
    """kind: eq, ne, lt, le, gt, ge. The result is boolean (u8, 0 or 1)."""

    kind: str = "eq"


@dataclass(frozen=True, slots=True)
class Table(Attributes):
    """Any function of one variable, as an expression: "x", a float, or (function, argument, …) with the functions of npucc.scalar."""

    expression: scalar.Expression = "x"

    def text(self) -> str:
        return f" expression={scalar.text(self.expression)}"


@dataclass(frozen=True, slots=True)
class Quantize(Attributes):
    """clamp(rint(x / scale) + zero), and back to reals: what a pair of QuantizeLinear and DequantizeLinear does. dtype: s8, s16 or s32.

    `offset`: what was subtracted from the model's own integers, 128 for unsigned bytes."""

    dtype: str = "s8"
    scale: float = 1.0
    zero: int = 0
    offset: int = 128


@dataclass(frozen=True, slots=True)
class Pool(Attributes):
    """Result size is floor-based with the pads as given (ceil mode is turned into pads at import)."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    count_include_pad: bool = False


@dataclass(frozen=True, slots=True)
class Reduce(Attributes):
    """`axes` ascending and non-negative; dimensions are kept (a Reshape drops them)."""

    axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Softmax(Attributes):
    axis: int = -1


@dataclass(frozen=True, slots=True)
class LayerNorm(Attributes):
    """Over the last dimension: (x − mean) / sqrt(variance + epsilon) · gamma + beta (both [last], or left out).

    Not `centered`, as RMSNorm: x / sqrt(mean(x²) + epsilon) · gamma + beta.
    """

    epsilon: float = 1e-5
    centered: bool = True


@dataclass(frozen=True, slots=True)
class Resize(Attributes):
    """Spatial (last two) dimensions only; coordinates and nearest_mode as in ONNX."""

    coordinates: str = "half_pixel"
    nearest_mode: str = "round_prefer_floor"
    size: tuple[int, int] = (1, 1)
    scales: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Interpolate(Attributes):
    """Spatial (last two) dimensions only; coordinates as in ONNX."""

    coordinates: str = "half_pixel"
    size: tuple[int, int] = (1, 1)
    scales: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Concat(Attributes):
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Slice(Attributes):
    """Per dimension of the input: start (non-negative), result size, step (may be negative)."""

    starts: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Gather(Attributes):
    """Slices of the first input along `axis`, picked by the integers of the second; negative ones count from the end."""

    axis: int = 0


@dataclass(frozen=True, slots=True)
class Transpose(Attributes):
    permutation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reshape(Attributes):
    """Squeeze, Unsqueeze and Flatten too."""

    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Expand(Attributes):
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pad(Attributes):
    """mode: constant, edge, reflect, wrap. Non-negative counts per dimension (cropping is a Slice)."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    value: float = 0.0
    mode: str = "constant"


@dataclass(frozen=True, slots=True)
class Host(Attributes):
    """A part of the ONNX model that onnxruntime runs: a serialized ONNX model whose inputs and outputs are the node's, in order.

    `nodes`: (ONNX node, operator, why it is not on the NPU) of each node in it.
    """

    model: bytes = b""
    nodes: Any = ()

    def text(self) -> str:
        return " nodes=" + ",".join(f"{name}({operator})" for name, operator, _ in self.nodes)


@dataclass(frozen=True, slots=True)
class Operator:
    """One record. Traits: `moves_data`: the result holds only values of the inputs, so input and result share one scale;
    `elementwise`: each result element depends on one element of each (broadcast) input;
    `fixed_range`: the real range of the result, known without calibration; `indices`: the inputs that are positions, not values;
    `host`: runs outside the NPU, with any number of results; `float_only`: the last pass before quantization leaves none."""

    name: str
    attributes: type[Attributes]
    arity: tuple[int, int]
    shape: Callable[[Any, Sequence[Any]], Shape | None]
    meaning: str
    moves_data: bool = False
    elementwise: bool = False
    matrix: bool = False
    fixed_range: tuple[float, float] | None = None
    indices: tuple[int, ...] = ()
    host: bool = False
    float_only: bool = False


def _same(_: Attributes, shapes: Sequence[Shape]) -> Shape:
    return shapes[0]


def _broadcast(_: Attributes, shapes: Sequence[Shape]) -> Shape:
    return tuple(np.broadcast_shapes(*(shape for shape in shapes if shape is not None)))


def window_size(size: int, kernel: int, stride: int, dilation: int, pads: int) -> int:
    """Positions of a window along one dimension."""
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1


MANY = 1 << 30  # inputs
WRONG: Shape = (-1,)  # of operands that do not go together: no tensor has it


def _are_vectors(shapes: Sequence[Shape | None], size: int) -> bool:
    """Whether each, where it is given, is [size]."""
    return all(shape in (None, (size,)) for shape in shapes)


def _conv(a: Conv, shapes: Sequence[Shape]) -> Shape:
    (n, channels, h, w), (out, per_group, kh, kw) = shapes[0], shapes[1]
    if per_group * a.groups != channels or out % a.groups or not _are_vectors(shapes[2:], out):
        return WRONG
    top, left, bottom, right = a.pads
    return (n, out, window_size(h, kh, a.strides[0], a.dilations[0], top + bottom), window_size(w, kw, a.strides[1], a.dilations[1], left + right))


def _conv_transpose(a: ConvTranspose, shapes: Sequence[Shape]) -> Shape:
    (n, channels, h, w), (weights, out, kh, kw) = shapes[0], shapes[1]
    if weights != channels or channels % a.groups or not _are_vectors(shapes[2:], out * a.groups):
        return WRONG
    sizes = []
    for i, (size, kernel) in enumerate(((h, kh), (w, kw))):
        sizes.append((size - 1) * a.strides[i] + (kernel - 1) * a.dilations[i] + 1 + a.output_padding[i] - a.pads[i] - a.pads[i + 2])
    return (n, out * a.groups, sizes[0], sizes[1])


def _matmul(_: MatMul, shapes: Sequence[Shape]) -> Shape:
    left, right = shapes[0], shapes[1]
    if left[-1] != right[-2] or not _are_vectors(shapes[2:], right[-1]):
        return WRONG
    return (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])


def _pool(a: Pool, shapes: Sequence[Shape]) -> Shape:
    n, c, h, w = shapes[0]
    top, left, bottom, right = a.pads
    return (
        n,
        c,
        window_size(h, a.kernel[0], a.strides[0], a.dilations[0], top + bottom),
        window_size(w, a.kernel[1], a.strides[1], a.dilations[1], left + right),
    )


def _reduce(a: Reduce, shapes: Sequence[Shape]) -> Shape:
    return tuple(1 if i in a.axes else size for i, size in enumerate(shapes[0]))


def _concat(a: Concat, shapes: Sequence[Shape]) -> Shape:
    total = sum(shape[a.axis] for shape in shapes)
    return tuple(total if i == a.axis else size for i, size in enumerate(shapes[0]))


def _slice(a: Slice, shapes: Sequence[Shape]) -> Shape:
    spans = zip(a.starts, a.sizes, a.steps, shapes[0], strict=True)
    inside = all(0 <= place < whole for start, size, step, whole in spans if size for place in (start, start + (size - 1) * step))
    return a.sizes if inside else WRONG


def _transpose(a: Transpose, shapes: Sequence[Shape]) -> Shape:
    return tuple(shapes[0][i] for i in a.permutation) if sorted(a.permutation) == list(range(len(shapes[0]))) else WRONG


def _expand(a: Expand, shapes: Sequence[Shape]) -> Shape:
    return tuple(np.broadcast_shapes(a.shape, shapes[0]))


def _gather(a: Gather, shapes: Sequence[Shape]) -> Shape:
    data, indices = shapes
    return (*data[: a.axis], *indices, *data[a.axis + 1 :])


def _reshape(a: Reshape, shapes: Sequence[Shape]) -> Shape | None:
    return a.shape if math.prod(a.shape) == math.prod(shapes[0]) else WRONG


def _layer_norm(_: LayerNorm, shapes: Sequence[Shape]) -> Shape:
    return shapes[0] if _are_vectors(shapes[1:], shapes[0][-1]) else WRONG


TABLE: tuple[Operator, ...] = (
    Operator("conv", Conv, (2, 3), _conv, "2-D convolution (x, w[N,C/g,kh,kw], bias)", matrix=True),
    Operator("conv_transpose", ConvTranspose, (2, 3), _conv_transpose, "transposed 2-D convolution", matrix=True),
    Operator("matmul", MatMul, (2, 3), _matmul, "matrix product (a, b, bias[N])", matrix=True),
    *(
        Operator(name, Binary, (2, 2), _broadcast, f"{name} with broadcasting", elementwise=True)
        for name in ("add", "sub", "mul", "div", "max", "min")
    ),
    Operator("compare", Compare, (2, 2), _broadcast, "comparison; the result is boolean", elementwise=True),
    Operator("where", Attributes, (3, 3), _broadcast, "condition ? a : b", elementwise=True),
    Operator("table", Table, (1, 1), _same, "any function of one variable, by table", elementwise=True),
    Operator("quantize", Quantize, (1, 1), _same, "rounding to the steps of an already quantized model", float_only=True),
    Operator("max_pool", Pool, (1, 1), _pool, "largest value of each window", moves_data=True),
    Operator("average_pool", Pool, (1, 1), _pool, "mean of each window"),
    Operator("reduce_mean", Reduce, (1, 1), _reduce, "mean over axes (kept as 1)"),
    Operator("reduce_sum", Reduce, (1, 1), _reduce, "sum over axes (kept as 1)"),
    Operator("reduce_max", Reduce, (1, 1), _reduce, "maximum over axes (kept as 1)", moves_data=True),
    Operator("reduce_min", Reduce, (1, 1), _reduce, "minimum over axes (kept as 1)", moves_data=True),
    Operator("softmax", Softmax, (1, 1), _same, "softmax along one axis", fixed_range=(0.0, 1.0)),
    Operator("layer_norm", LayerNorm, (1, 3), _layer_norm, "layer normalization over the last dimension"),
    Operator("interpolate", Interpolate, (1, 1), lambda a, s: (*s[0][:-2], *a.size), "another size, linear in between"),
    Operator("resize", Resize, (1, 1), lambda a, s: (*s[0][:-2], *a.size), "another size, by the nearest element", moves_data=True),
    Operator("concat", Concat, (1, MANY), _concat, "concatenation", moves_data=True),
    Operator("slice", Slice, (1, 1), _slice, "strided slice", moves_data=True),
    Operator("gather", Gather, (2, 2), _gather, "slices of a table, picked by computed indices", moves_data=True, indices=(1,)),
    Operator("transpose", Transpose, (1, 1), _transpose, "permutation of dimensions", moves_data=True),
    Operator("reshape", Reshape, (1, 1), _reshape, "another shape, same order", moves_data=True),
    Operator("expand", Expand, (1, 1), _expand, "broadcast to a shape", moves_data=True),
    Operator("pad", Pad, (1, 1), lambda a, s: tuple(n + b + e for n, b, e in zip(s[0], a.before, a.after, strict=True)), "padding", moves_data=True),
    Operator("host", Host, (0, MANY), lambda *_: None, "a part of the ONNX model, run by onnxruntime on the host", host=True),
)
OPS: dict[str, Operator] = {record.name: record for record in TABLE}
