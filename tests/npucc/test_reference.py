"""The integer reference against arithmetic in Python integers and fractions, and whole sums against naive loops."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npucc import ops, reference
from npucc.errors import DataError
from npucc.graph import Graph, Quant, Tensor
from npucc.ops import OPS

from .integer_graphs import GRAPHS, Net


def wrapped(total: int) -> int:
    """As a signed 32-bit number."""
    return (total + 2**31) % 2**32 - 2**31


def requantized(total: int, factor: np.float32, zero: int, low: int = -128, high: int = 127) -> int:
    """clamp(rint(float32(total) · factor) + zero): one rounding for each step, in exact fractions but for float32 itself."""
    product_ = np.float32(np.float32(total) * factor)
    nearest = round(Fraction(float(product_)))  # Python rounds halves to even
    return max(low, min(high, nearest + zero))


def factor_of(graph: Graph, x: str, w: str, y: str, channel: int) -> np.float32:
    sx, sw, sy = (graph.quant(name).scale for name in (x, w, y))
    scale = sw[channel] if sw.ndim else sw
    factor: np.float32 = np.float32(np.float32(np.float32(sx) * np.float32(scale)) / np.float32(sy))
    return factor


def stored_inputs(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.integers(-128, 128, graph.tensors[name].shape).astype(np.int8) for name in graph.inputs}


def convolution_by_loops(graph: Graph, stored: dict[str, np.ndarray]) -> np.ndarray:
    (node,) = graph
    a, (x, w, *bias), y = node.attributes, node.inputs, node.outputs[0]
    assert isinstance(a, ops.Conv)
    values, weights = stored[x].astype(int) - graph.quant(x).zero, graph.tensors[w].data
    assert weights is not None
    result = np.zeros(graph.tensors[y].shape, np.int64)
    per_group = weights.shape[0] // a.groups
    for n, c, i, j in product(*map(range, result.shape)):
        total = 0
        for g, k, m in product(*map(range, weights.shape[1:])):
            row, column = i * a.strides[0] + k * a.dilations[0] - a.pads[0], j * a.strides[1] + m * a.dilations[1] - a.pads[1]
            if 0 <= row < values.shape[2] and 0 <= column < values.shape[3]:
                total += int(values[n, c // per_group * weights.shape[1] + g, row, column]) * int(weights[c, g, k, m])
        if bias:
            data = graph.tensors[bias[0]].data
            assert data is not None
            total += int(data[c])
        low = -128 if a.clamp is None else max(-128, graph.quant(y).zero)
        result[n, c, i, j] = requantized(wrapped(total), factor_of(graph, x, w, y, c), graph.quant(y).zero, low)
    return result


@pytest.mark.parametrize(
    "attributes",
    [
        ops.Conv(),
        ops.Conv((2, 1), (1, 0, 2, 1)),
        ops.Conv(dilations=(1, 2), pads=(0, 2, 0, 2), groups=2),
        ops.Conv(groups=4, clamp=(0.0, float("inf"))),
    ],
    ids=str,
)
def test_convolution(attributes: ops.Conv) -> None:
    net = Net(1)
    graph = net.graph(net.conv(net.input(2, 4, 5, 6), 8, (3, 2), attributes))
    stored = stored_inputs(graph, 0)
    (node,) = graph
    np.testing.assert_array_equal(reference.run_node(graph, node, stored)[node.outputs[0]], convolution_by_loops(graph, stored))


@pytest.mark.parametrize(("groups", "per_channel"), [(1, True), (1, False), (2, False)])
def test_transposed_convolution_spreads_each_input(groups: int, per_channel: bool) -> None:
    net = Net(2)
    x = net.input(1, 4, 3, 4)
    shape = (4, 6 // groups, 3, 2)
    single = net.tensor("w1", shape, net.quant(0.002, 0), net.random.integers(-127, 128, shape).astype(np.int8))
    w = net.weights(shape, 1) if per_channel else single
    a = ops.ConvTranspose((2, 3), (1, 0, 0, 1), (1, 2), groups, (1, 0))
    graph = net.graph(net.op("conv_transpose", [x, w], a))
    stored, (node,) = stored_inputs(graph, 3), graph
    values, weights = stored[x].astype(int) - graph.quant(x).zero, graph.tensors[w].data
    assert weights is not None
    y = node.outputs[0]
    total = np.zeros(graph.tensors[y].shape, np.int64)
    for c, i, j, n, k, m in product(*map(range, values.shape[1:]), *map(range, weights.shape[1:])):
        row, column = i * 2 + k - 1, j * 3 + m * 2
        if 0 <= row < total.shape[2] and 0 <= column < total.shape[3]:
            total[0, c // (4 // groups) * shape[1] + n, row, column] += values[0, c, i, j] * int(weights[c, n, k, m])
    expected = [requantized(int(total[index]), factor_of(graph, x, w, y, index[1]), graph.quant(y).zero) for index in np.ndindex(*total.shape)]
    np.testing.assert_array_equal(reference.run_node(graph, node, stored)[y].ravel(), expected)


def test_product_of_activations() -> None:
    net = Net(3)
    a, b = net.input(2, 3, 5), net.input(5, 4)
    graph = net.graph(net.op("matmul", [a, b], ops.MatMul()))
    stored, (node,) = stored_inputs(graph, 4), graph
    y = node.outputs[0]
    left, right = stored[a].astype(int) - graph.quant(a).zero, stored[b].astype(int) - graph.quant(b).zero
    factor = factor_of(graph, a, b, y, 0)
    expected = [
        requantized(sum(int(left[p, m, k]) * int(right[k, n]) for k in range(5)), factor, graph.quant(y).zero)
        for p, m, n in np.ndindex(2, 3, 4)
    ]  # fmt: skip
    np.testing.assert_array_equal(reference.run_node(graph, node, stored)[y].ravel(), expected)


def test_accumulators_wrap_at_32_bits() -> None:
    assert reference.wrap(np.array([2**31, -(2**31) - 1, 2**32 + 5])).tolist() == [-(2**31), 2**31 - 1, 5]


@settings(max_examples=60)
@given(st.sampled_from(["add", "sub", "mul", "div", "max", "min"]), st.integers(0, 2**31))
def test_elementwise_is_the_nearest_step(op: str, seed: int) -> None:
    """Against exact fractions: within half a step, plus what a few float32 roundings can shift."""
    net = Net(seed)
    x, y = net.input(64, quant=net.quant()), net.input(64, quant=net.quant())
    graph = net.graph(net.op(op, [x, y], ops.Binary(), quant=net.quant(0.11)))
    stored, (node,) = stored_inputs(graph, seed), graph
    forms: dict[str, Callable[..., Fraction]] = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b, "max": max, "min": min,
    }  # fmt: skip
    found = reference.run_node(graph, node, stored)[node.outputs[0]].astype(int)
    quants = [graph.quant(name) for name in (x, y, node.outputs[0])]
    scales = [Fraction(float(quant.scale)) for quant in quants]
    for a, b, result in zip(stored[x], stored[y], found, strict=True):
        real = [Fraction(int(value) - quant.zero) * scale for value, quant, scale in zip((a, b), quants, scales, strict=False)]
        if op == "div" and real[1] == 0:
            continue
        wanted = max(Fraction(-128), min(Fraction(127), forms[op](*real) / scales[2] + quants[2].zero))
        assert abs(result - wanted) <= Fraction(1, 2) + Fraction(1, 10_000)


def test_pooling() -> None:
    net = Net(5)
    x = net.input(1, 2, 5, 6)
    largest = net.op("max_pool", [x], ops.Pool((3, 2), (2, 2), (1, 0, 0, 1)))
    inside = net.op("average_pool", [x], ops.Pool((3, 2), (2, 2), (1, 0, 0, 1)))
    whole = net.op("average_pool", [x], ops.Pool((3, 2), (2, 2), (1, 0, 0, 1), count_include_pad=True))
    graph = net.graph(largest, inside, whole)
    stored = stored_inputs(graph, 6)
    result = {name: value for node in graph for name, value in reference.run_node(graph, node, stored).items()}
    quant = graph.quant(x)
    for n, c, i, j in np.ndindex(*graph.tensors[largest].shape):
        window = stored[x][n, c, max(0, 2 * i - 1) : 2 * i + 2, 2 * j : 2 * j + 2].astype(int)
        assert result[largest][n, c, i, j] == window.max()
        for name, count in ((inside, window.size), (whole, 6)):
            step = np.float32(np.float32(quant.scale / graph.quant(name).scale) / np.float32(count))
            assert result[name][n, c, i, j] == requantized(int((window - quant.zero).sum()), step, graph.quant(name).zero)


def test_softmax_and_layer_norm_are_close_to_real_ones() -> None:
    net = Net(6)
    x = net.input(7, 40, quant=net.quant(0.06, 4))
    soft = net.op("softmax", [x], ops.Softmax(-1), quant=net.quant(1 / 256, -128))
    norm = net.op("layer_norm", [x], ops.LayerNorm(), quant=net.quant(0.03, 5))
    graph = net.graph(soft, norm)
    stored = stored_inputs(graph, 1)
    result = {name: value for node in graph for name, value in reference.run_node(graph, node, stored).items()}
    real = reference.to_real(graph.tensors[x], stored[x]).astype(np.float64)
    exponential = np.exp(real - real.max(axis=-1, keepdims=True))
    wanted = {soft: exponential / exponential.sum(-1, keepdims=True)}
    wanted[norm] = (real - real.mean(-1, keepdims=True)) / np.sqrt(real.var(-1, keepdims=True) + 1e-5)
    for name, value in wanted.items():
        step = float(graph.quant(name).scale)
        limited = np.clip(value, (-128 - graph.quant(name).zero) * step, (127 - graph.quant(name).zero) * step)
        assert np.abs(reference.to_real(graph.tensors[name], result[name]) - limited).max() <= 0.501 * step


def test_there_is_a_kernel_for_every_operator() -> None:
    assert reference.KERNELS.keys() == {name for name, record in OPS.items() if not record.host and not record.float_only}


@pytest.mark.parametrize("name", GRAPHS)
def test_keeping_few_tensors_changes_no_value(name: str) -> None:
    graph = GRAPHS[name](Net(1))
    random = np.random.default_rng(0)
    inputs = {name: random.normal(0, 2, graph.tensors[name].shape).astype(np.float32) for name in graph.inputs}
    everything = reference.run(graph, inputs)
    few = reference.run(graph, inputs, keep=graph.outputs)
    assert few.keys() == set(graph.outputs)
    for output, value in few.items():
        np.testing.assert_array_equal(value, everything[output])
    assert everything.keys() == {*graph.inputs, *(node.outputs[0] for node in graph)}


def test_inputs_are_stored_by_the_stated_formula() -> None:
    tensor = Tensor("x", (5,), quant=Quant("s8", np.asarray(0.5, np.float32), 3))
    real = np.array([0.25, 0.75, -0.25, 1e9, -1e9], np.float32)
    assert reference.to_stored(tensor, real).tolist() == [3, 5, 3, 127, -128]
    assert reference.to_real(tensor, np.array([3, 5], np.int8)).tolist() == [0.0, 1.0]


def test_wrong_inputs_are_refused() -> None:
    net = Net(0)
    graph = net.graph(net.conv(net.input(1, 2, 3, 3), 2, (1, 1)))
    with pytest.raises(DataError, match="'x' is missing"):
        reference.run(graph, {})
    with pytest.raises(DataError, match=r"\[1, 2, 3\], expected \[1, 2, 3, 3\]"):
        reference.run(graph, {"x": np.zeros((1, 2, 3), np.float32)})
