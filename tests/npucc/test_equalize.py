"""Equalization: exact in float, refused where a scale would be seen, and what it saves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from npucc import compiler, ops, reference
from npucc.evaluate import float_runner, layer_errors
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.quantize import QuantizeOptions, quantize
from npucc.quantize.chains import find_chains
from npucc.quantize.equalize import equalize
from tests.benchmarks.trained_like import images, mobilenet, resnet

from .float_graphs import FloatNet, exact_session, run_session

SPREAD = np.float32(10.0) ** np.linspace(-1, 1, 8, dtype=np.float32)


def loud(net: FloatNet, name: str, *shape: int, into: bool = False) -> str:
    """Weights whose output channels differ a hundredfold, or whose input channels make up for it."""
    values = np.random.default_rng(len(name)).normal(0, 0.3, shape).astype(np.float32)
    factor = 1 / SPREAD[None, :, None, None] if into else SPREAD[:, None, None, None]
    return net.constant(name, values * factor)


def between(middle: Callable[[FloatNet, str], str], *, clamp: tuple[float, float] = (0.0, np.inf), output: bool = False) -> Graph:
    """A convolution, something, and a convolution that takes what came of it."""
    net = FloatNet(1)
    net.input("x", 1, 3, 12, 12)
    net.op("conv", ["x", loud(net, "first", 8, 3, 3, 3), net.bias("b", 8)], "y", ops.Conv(clamp=clamp))
    last = middle(net, "y")
    net.op("conv", [last, loud(net, "second", 6, 8, 3, 3, into=True)], "z", ops.Conv())
    return net.graph(*(["z", "y"] if output else ["z"]))


def residual(net: FloatNet, name: str) -> str:
    net.op("conv", [name, loud(net, "inner", 8, 8, 1, 1)], "branch", ops.Conv())
    net.op("add", [name, "branch"], "sum")
    return "sum"


def one(op: str, attributes: ops.Attributes) -> Callable[[FloatNet, str], str]:
    def middle(net: FloatNet, name: str) -> str:
        net.op(op, [name], "middle", attributes)
        return "middle"

    return middle


def feeds(count: int = 6) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).normal(0, 1, (1, 3, 12, 12)).astype(np.float32)} for seed in range(count)]


PASSES = {
    "nothing": lambda _, name: name,
    "residual": residual,
    "max pool": one("max_pool", ops.Pool((2, 2), (2, 2))),
    "average pool": one("average_pool", ops.Pool((2, 2), (1, 1))),
    "leaky relu": one("table", ops.Table(("leaky_relu", "x", 0.125))),
    "resize": one("resize", ops.Resize("asymmetric", "floor", (20, 20), (2.0, 2.0))),
}


@pytest.mark.parametrize("name", PASSES)
def test_the_float_network_stays_the_same_to_the_bit(name: str) -> None:
    graph = between(PASSES[name])
    equalized, _ = equalize(graph, feeds())
    channels = [np.abs(each.tensors["first"].data).max(axis=(1, 2, 3)) for each in (graph, equalized)]  # type: ignore[arg-type]
    assert channels[1].max() / channels[1].min() < channels[0].max() / channels[0].min() / 8
    before, after = (exact_session(to_onnx(each)) for each in (graph, equalized))
    for feed in feeds(2):
        np.testing.assert_array_equal(run_session(before, feed)["z"], run_session(after, feed)["z"])
    assert not equalized.tensors["y"].source


@pytest.mark.parametrize(
    "graph",
    [between(PASSES["nothing"], clamp=(0.0, 6.0)), between(PASSES["nothing"], output=True), between(one("table", ops.Table(("hard_swish", "x"))))],
    ids=["ReLU6", "a graph output", "hard-swish"],
)
def test_where_a_scale_would_be_seen_nothing_is_done(graph: Graph) -> None:
    assert not find_chains(graph)


def stream(loudest: float) -> Graph:
    """Two products between layer normalizations, with a residual connection around them; three channels are much louder than the others."""
    net, gains = FloatNet(2), np.ones(32, np.float32)
    gains[[3, 11, 20]] = loudest
    net.input("x", 1, 16, 32)
    net.op("layer_norm", ["x", net.constant("gains", gains), net.bias("shift", 32)], "normal", ops.LayerNorm(1e-5))
    quiet = (np.random.default_rng(3).normal(0, 0.2, (32, 48)) / gains[:, None]).astype(np.float32)
    net.op("matmul", ["normal", net.constant("up", quiet)], "wide", ops.MatMul((0.0, np.inf)))
    net.op("matmul", ["wide", net.weights("down", 48, 32)], "narrow", ops.MatMul())
    net.op("add", ["normal", "narrow"], "sum")
    net.op("layer_norm", ["sum", net.constant("even", np.ones(32, np.float32)), net.bias("last", 32)], "y", ops.LayerNorm(1e-5))
    return net.graph("y")


def tokens(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng([seed, index]).normal(0, 1, (1, 16, 32)).astype(np.float32)} for index in range(count)]


def test_what_products_read_of_a_residual_stream_is_scaled_by_channel() -> None:
    graph, samples, unseen = stream(20.0), tokens(16, 1), tokens(4, 2)
    wanted, int8 = exact_session(to_onnx(graph)), QuantizeOptions(scheme="int8")
    without = decibels(graph, QuantizeOptions.parse("int8,equalize=no"), samples, unseen, wanted)
    assert decibels(graph, int8, samples, unseen, wanted) > without + 3
    quantized = quantize(graph, samples, options=int8)
    integer, equalized = quantized.graph, [each.as_dict() for each in quantized.report.equalized]
    (tap,) = (node for node in integer if node.op == "mul")
    factors = integer.tensors[tap.inputs[1]]
    assert [each["tensor"] for each in equalized] == list(tap.outputs)
    np.testing.assert_array_equal(np.exp2(equalized[0]["powers"]), reference.to_real(factors, factors.data))  # type: ignore[arg-type]
    session = exact_session(to_onnx(integer))
    for feed in unseen:
        np.testing.assert_array_equal(reference.run_outputs(integer, feed)["y"], run_session(session, feed)["y"])
    errors = {row.name: row for row in layer_errors(integer, float_runner(graph), unseen, equalized=equalized)}
    assert errors[tap.name].single_db > 30
    assert errors[tap.name].accumulated_db > 30  # type: ignore[operator]


def test_where_channels_are_even_nothing_is_copied() -> None:
    quantized = quantize(stream(1.0), tokens(16, 1), options=QuantizeOptions(scheme="int8"))
    assert not quantized.report.equalized
    assert not [node for node in quantized.graph if node.op == "mul"]


PLAIN = QuantizeOptions.parse("int8,method=minmax,per_tensor=yes,rounding=nearest,equalize=no,bias_correction=no,bias_samples=0")


@pytest.mark.parametrize(
    ("model", "sound"),
    [(resnet((1, 2), 16, size=48, classes=20), 30), (mobilenet(((1, 16, 1, 1), (6, 24, 2, 2)), size=48, classes=20), 27)],
    ids=["residual", "inverted residual"],
)
def test_networks_with_trained_statistics_stay_sound_where_plain_scales_collapse(model: object, sound: float) -> None:
    graph = compiler.float_graph(model, {})  # type: ignore[arg-type]
    samples, unseen = images(32, 48, seed=100), images(8, 48, seed=200)
    wanted = exact_session(to_onnx(graph))
    plain, ours = (decibels(graph, options, samples, unseen, wanted) for options in (PLAIN, QuantizeOptions(scheme="int8")))
    assert ours > sound  # onnxruntime is exact in 8 bits
    assert plain < sound - 15


def decibels(graph: Graph, options: QuantizeOptions, samples: list, unseen: list, wanted: object) -> float:
    found = exact_session(to_onnx(quantize(graph, samples, options=options).graph))
    signal = noise = 0.0
    for feed in unseen:
        exact, have = (next(iter(run_session(session, feed).values())) for session in (wanted, found))
        signal, noise = signal + float((exact**2).sum()), noise + float(((have - exact) ** 2).sum())
    return 10 * float(np.log10(signal / noise))
