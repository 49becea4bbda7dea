"""Small integer graphs for the tests of the backend, built by hand: every operator, awkward sizes, made-up scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from npucc import ops
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS, Attributes

Builder = Callable[["Net"], None]


class Net:
    """Adds nodes one after another; scales and weights come from a seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.editor = Editor(name="net")

    def quant(self, scale: float | None = None, zero: int | None = None) -> Quant:
        scale = scale if scale is not None else float(self.random.uniform(0.02, 0.1))
        return Quant("s8", np.float32(scale), zero if zero is not None else int(self.random.integers(-20, 20)))

    def tensor(self, name: str, shape: tuple[int, ...], quant: Quant, data: np.ndarray | None = None, dtype: str = "float32") -> str:
        return self.editor.add_tensor(Tensor(name, shape, dtype, data, quant))

    def input(self, *shape: int, quant: Quant | None = None) -> str:
        name = self.editor.fresh("x")
        self.editor.inputs.append(self.tensor(name, shape, quant or self.quant()))
        return name

    def constant(self, shape: tuple[int, ...], quant: Quant | None = None) -> str:
        return self.tensor(self.editor.fresh("constant"), shape, quant or self.quant(), self.random.integers(-128, 128, shape).astype(np.int8))

    def op(
        self, op: str, inputs: list[str], attributes: Attributes | None = None, *, quant: Quant | None = None, shape: tuple[int, ...] | None = None
    ) -> str:
        """A node whose result takes the input's quant where the operator only moves data."""
        attributes = attributes or Attributes()
        tensors = self.editor.tensors
        shape = shape or OPS[op].shape(attributes, [tensors[name].shape for name in inputs])
        assert shape is not None
        if quant is None:
            quant = tensors[inputs[0]].quant if OPS[op].moves_data else self.quant()
        assert quant is not None
        result = self.tensor(self.editor.fresh(op), tuple(shape), quant)
        self.editor.add_node(Node(f"{result}_node", op, tuple(inputs), (result,), attributes, (f"onnx/{result}",)))
        return result

    def weights(self, shape: tuple[int, ...], axis: int) -> str:
        scales = self.random.uniform(0.0005, 0.004, shape[axis]).astype(np.float32)
        return self.tensor(self.editor.fresh("w"), shape, Quant("s8", scales, 0, axis), self.random.integers(-127, 128, shape).astype(np.int8))

    def bias(self, source: str, weights: str, count: int) -> str:
        left, right = self.editor.tensors[source].quant, self.editor.tensors[weights].quant
        assert left is not None
        assert right is not None
        return self.tensor(
            self.editor.fresh("b"), (count,), Quant("s32", left.scale * right.scale, 0, 0), self.random.integers(-3000, 3000, count).astype(np.int32)
        )

    def conv(self, x: str, outputs: int, kernel: tuple[int, int], attributes: ops.Conv | None = None, *, bias: bool = True) -> str:
        attributes = attributes or ops.Conv()
        weights = self.weights((outputs, self.editor.tensors[x].shape[1] // attributes.groups, *kernel), 0)
        return self.op("conv", [x, weights, *([self.bias(x, weights, outputs)] if bias else [])], attributes)

    def graph(self, *outputs: str) -> Graph:
        self.editor.outputs = list(outputs)
        return self.editor.freeze()


def convolutions(net: Net) -> Graph:
    x = net.input(1, 6, 13, 11)
    a = net.conv(x, 10, (3, 3), ops.Conv((1, 1), (1, 1, 1, 1), clamp=(0.0, 4.0)))
    b = net.conv(a, 10, (3, 3), ops.Conv((2, 2), (1, 0, 1, 2), groups=10))
    c = net.conv(b, 14, (1, 1), bias=False)
    d = net.conv(c, 14, (1, 5), ops.Conv((1, 2), (0, 4, 0, 4), (1, 2)))
    return net.graph(net.conv(d, 3, (2, 2), ops.Conv((3, 1), (2, 1, 1, 0), (2, 1))), b)


def grouped(net: Net) -> Graph:
    x = net.input(2, 12, 6, 7)
    small = net.conv(x, 8, (3, 3), ops.Conv(pads=(1, 1, 1, 1), groups=4))
    large = net.conv(x, 40, (1, 1), ops.Conv(groups=2))
    return net.graph(small, large)


def transposed(net: Net) -> Graph:
    x = net.input(1, 5, 4, 6)
    w = net.weights((5, 7, 2, 2), 1)
    a = net.op("conv_transpose", [x, w, net.bias(x, w, 7)], ops.ConvTranspose((2, 2)))
    w2 = net.tensor(net.editor.fresh("w"), (5, 3, 3, 4), Quant("s8", np.float32(0.002)), net.random.integers(-127, 128, (5, 3, 3, 4)).astype(np.int8))
    b = net.op("conv_transpose", [x, w2], ops.ConvTranspose((3, 2), (1, 0, 1, 1), (1, 2), output_padding=(2, 1), clamp=(0.0, 100.0)))
    w3 = net.tensor(net.editor.fresh("w"), (5, 2, 1, 1), Quant("s8", np.float32(0.01)), net.random.integers(-127, 128, (5, 2, 1, 1)).astype(np.int8))
    return net.graph(a, b, net.op("conv_transpose", [x, w3], ops.ConvTranspose((3, 3))))


def elementwise(net: Net) -> Graph:
    x, y = net.input(1, 9, 5, 6), net.input(1, 9, 5, 6)
    gate, row = net.input(1, 9, 1, 1), net.input(6)
    a = net.op("add", [x, y], ops.Binary((0.0, 6.0)))
    b = net.op("mul", [gate, a], ops.Binary())
    c = net.op("sub", [b, row], ops.Binary())
    d = net.op("div", [c, net.constant((1, 9, 1, 1))], ops.Binary())
    e = net.op("max", [d, net.op("min", [a, x], ops.Binary())], ops.Binary())
    f = net.op("table", [e], ops.Table(("tanh", "x")))
    boolean = Quant("u8", np.float32(1.0))
    g = net.op("compare", [f, x], ops.Compare("gt"), quant=boolean)
    return net.graph(net.op("where", [g, f, y]), net.op("add", [net.constant((5, 6)), x], ops.Binary()), g)


def matrices(net: Net) -> Graph:
    x = net.input(2, 3, 7, 10)
    w = net.weights((10, 9), 1)
    a = net.op("matmul", [x, w, net.bias(x, w, 9)], ops.MatMul((0.0, 8.0)))
    b = net.op("transpose", [x], ops.Transpose((0, 1, 3, 2)))
    c = net.op("matmul", [x, b], ops.MatMul())
    d = net.op("matmul", [c, a], ops.MatMul())
    e = net.op("table", [net.op("matmul", [net.input(1, 33), net.weights((33, 21), 1)], ops.MatMul())], ops.Table(("sigmoid", "x")))
    return net.graph(net.op("softmax", [c], ops.Softmax(-1)), d, net.op("softmax", [x], ops.Softmax(1)), e)


def windows(net: Net) -> Graph:
    x = net.input(1, 7, 9, 10)
    a = net.op("max_pool", [x], ops.Pool((3, 2), (2, 1), (1, 0, 1, 1)))
    b = net.op("average_pool", [x], ops.Pool((2, 3), (2, 2), (0, 1, 1, 1), count_include_pad=True))
    c = net.op("average_pool", [x], ops.Pool((3, 3), (1, 1), (1, 1, 1, 1)))
    return net.graph(a, b, c, net.op("max_pool", [x], ops.Pool((2, 2), (1, 1), dilations=(3, 2))))


def reductions(net: Net) -> Graph:
    x = net.input(2, 6, 5, 8)
    means = [net.op("reduce_mean", [x], ops.Reduce(axes)) for axes in ((2, 3), (1,), (0, 1, 2, 3), (3,))]
    rest = [net.op("reduce_sum", [x], ops.Reduce((0, 2))), net.op("reduce_max", [x], ops.Reduce((1, 3))), net.op("reduce_min", [x], ops.Reduce((2,)))]
    return net.graph(*means, *rest)


def normalization(net: Net) -> Graph:
    x = net.input(3, 5, 24)
    gamma, beta = (
        net.editor.add_tensor(Tensor(net.editor.fresh("p"), (24,), "float32", net.random.normal(1, 0.5, 24).astype(np.float32))) for _ in range(2)
    )
    uncentered = ops.LayerNorm(centered=False)
    plain = [net.op("layer_norm", [x], attributes) for attributes in (ops.LayerNorm(1e-3), uncentered)]
    scaled = [net.op("layer_norm", [x, gamma, beta], attributes) for attributes in (ops.LayerNorm(), uncentered)]
    return net.graph(*plain, *scaled)


def movement(net: Net) -> Graph:
    x = net.input(1, 4, 6, 5)
    y = net.conv(x, 4, (1, 1))
    quant = net.editor.tensors[y].quant
    z = net.op("table", [x], ops.Table("x"), quant=quant)
    cat = net.op("concat", [y, z, y], ops.Concat(1))
    piece = net.op("slice", [cat], ops.Slice((0, 3, 5, 0), (1, 6, 3, 5), (1, 1, -2, 1)))
    flat = net.op("reshape", [piece], ops.Reshape((1, 90)))
    odd = net.op("reshape", [net.op("transpose", [x], ops.Transpose((0, 3, 1, 2)))], ops.Reshape((2, 60)))
    pads = [net.op("pad", [x], ops.Pad((0, 1, 2, 0), (0, 0, 1, 3), 0.3, mode)) for mode in ("constant", "edge", "reflect", "wrap")]
    wide = net.op("expand", [net.op("slice", [x], ops.Slice((0, 0, 0, 2), (1, 4, 6, 1), (1, 1, 1, 1)))], ops.Expand((2, 4, 6, 5)))
    return net.graph(flat, odd, *pads, net.conv(wide, 3, (1, 1)), net.op("concat", [x, x], ops.Concat(2)))


def resizing(net: Net) -> Graph:
    x = net.input(1, 5, 4, 6)
    results = [
        net.op("resize", [x], ops.Resize("asymmetric", "floor", (8, 18), (2.0, 3.0))),
        net.op("resize", [x], ops.Resize("half_pixel", "round_prefer_floor", (7, 9), (7 / 4, 9 / 6))),
        net.op("resize", [x], ops.Resize("half_pixel", "round_prefer_ceil", (2, 3), (0.5, 0.5))),
        net.op("interpolate", [x], ops.Interpolate("half_pixel", (8, 12), (2.0, 2.0))),
        net.op("interpolate", [x], ops.Interpolate("align_corners", (7, 11), (7 / 4, 11 / 6))),
        net.op("interpolate", [x], ops.Interpolate("asymmetric", (2, 3), (0.5, 0.5))),
    ]
    return net.graph(*results)


def residual(net: Net) -> Graph:
    x = net.input(1, 8, 10, 9)
    a = net.conv(x, 8, (3, 3), ops.Conv(pads=(1, 1, 1, 1), clamp=(0.0, float("inf"))))
    b = net.conv(a, 8, (3, 3), ops.Conv(pads=(1, 1, 1, 1)))
    c = net.op("add", [b, x], ops.Binary((0.0, float("inf"))))
    gate = net.op("table", [net.conv(net.op("reduce_mean", [c], ops.Reduce((2, 3))), 8, (1, 1))], ops.Table(("sigmoid", "x")))
    d = net.op("mul", [c, gate], ops.Binary())
    pooled = net.op("reduce_mean", [d], ops.Reduce((2, 3)))
    flat = net.op("reshape", [pooled], ops.Reshape((1, 8)))
    return net.graph(net.op("softmax", [net.op("matmul", [flat, net.weights((8, 10), 1)], ops.MatMul())], ops.Softmax(1)))


def sixteen_bits(net: Net) -> Graph:
    """int16 activations among int8 ones, through every operator that takes them."""
    wide = Quant("s16", np.float32(0.0003))
    x = net.input(1, 6, 9, 8, quant=wide)
    narrow = net.op("table", [net.input(1, 6, 9, 8)], ops.Table(("tanh", "x")), quant=wide)
    a = net.op("add", [x, narrow], ops.Binary((0.0, 5.0)), quant=wide)
    b = net.conv(a, 7, (3, 3), ops.Conv((1, 2), (1, 1, 1, 1)))
    w = net.weights((6, 1, 3, 3), 0)
    c = net.op("conv", [a, w, net.bias(a, w, 6)], ops.Conv((1, 1), (1, 1, 1, 1), groups=6), quant=wide)
    d = net.op("mul", [c, net.op("reduce_mean", [x], ops.Reduce((2, 3)))], ops.Binary())
    e = net.op("max_pool", [c], ops.Pool((2, 2), (2, 2)))
    f = net.op("average_pool", [c], ops.Pool((3, 3), (2, 2), (1, 1, 1, 1)), quant=wide)
    g = net.op("interpolate", [x], ops.Interpolate("half_pixel", (18, 16), (2.0, 2.0)), quant=wide)
    rows = net.op("reshape", [net.op("pad", [x], ops.Pad((0, 0, 1, 0), (0, 0, 0, 2), 0.1))], ops.Reshape((1, 6, 100)))
    norm = net.op("layer_norm", [rows], ops.LayerNorm(), quant=wide)
    h = net.op("matmul", [norm, net.weights((100, 11), 1)], ops.MatMul())
    i = net.op("table", [c], ops.Table(("sigmoid", "x")))
    j = net.op("table", [net.conv(a, 5, (1, 1))], ops.Table(("tanh", "x")), quant=wide)
    k = net.op("add", [net.op("table", [c], ops.Table(("tanh", "x")), quant=wide), i], ops.Binary())
    last = net.op("softmax", [rows], ops.Softmax(-1)), net.op("reduce_max", [c], ops.Reduce((1,)))
    sizes = ops.Interpolate("asymmetric", (7, 12), (0.8, 1.5))
    narrowed, widened = net.op("interpolate", [x], sizes), net.op("interpolate", [net.input(1, 6, 9, 8)], sizes, quant=wide)
    row = net.op("reshape", [c], ops.Reshape((math.prod(net.editor.tensors[c].shape),)))
    whole = net.op("layer_norm", [row], ops.LayerNorm(), quant=Quant("s8", np.float32(0.04)))
    return net.graph(b, d, e, f, g, h, i, j, k, *last, narrowed, widened, whole)


def widths_in_turn(net: Net) -> Graph:
    """16 and 8 bits after each other in one layer; logarithms of 16 bits, whose tables have a second part."""
    x, logarithm = net.input(1, 8, 20, 20), ops.Table(("log", ("max", ("abs", "x"), 1e-3)))
    a = net.op("conv", [x, weights := net.weights((4, 8, 1, 1), 0), net.bias(x, weights, 4)], ops.Conv(), quant=Quant("s16", np.float32(2e-4)))
    b = net.op("table", [a], ops.Table(("mul", "x", ("sigmoid", "x"))))
    c = net.op("add", [b, net.input(1, 4, 20, 20)], ops.Binary(), quant=Quant("s16", np.float32(5e-4)))
    d = net.op("table", [c], logarithm, quant=Quant("s16", np.float32(3e-4), 5))
    return net.graph(c, d, net.op("table", [d], logarithm))


def gathered(net: Net) -> Graph:
    """Rows of constant tables and of a computed tensor, along several axes; and functions of int16 values that need no table."""
    index, wide, long = Quant("s32", np.float32(1.0)), Quant("s16", np.float32(0.001), 7), Quant("s32", np.float32(1e-6))
    rows, one = net.input(2, 5, quant=index), net.input(quant=index)
    a = net.op("gather", [net.constant((130, 6, 3)), rows], ops.Gather(0))
    table = net.tensor("table", (3, 130, 4), wide, net.random.integers(-3000, 3000, (3, 130, 4)).astype(np.int16))
    b = net.op("gather", [table, rows], ops.Gather(1))
    image = net.op("table", [net.input(1, 130, 4, 5)], ops.Table(("relu", "x")))
    c = net.op("gather", [image, rows], ops.Gather(1))
    d = net.op("gather", [image, one], ops.Gather(1))
    square = net.op("table", [b], ops.Table(("pow", "x", 2.0)), quant=long)
    power = net.op("add", [square, net.op("table", [b], ops.Table(("mul", "x", "x")), quant=long)], ops.Binary(), quant=long)
    root = net.op("table", [power], ops.Table(("sqrt", "x")), quant=wide)
    return net.graph(a, c, d, root, net.op("table", [root], ops.Table("x")))


GRAPHS: dict[str, Callable[[Net], Graph]] = {
    build.__name__: build
    for build in (
        convolutions,
        grouped,
        transposed,
        elementwise,
        matrices,
        windows,
        reductions,
        normalization,
        movement,
        resizing,
        residual,
        sixteen_bits,
        widths_in_turn,
        gathered,
    )
}
