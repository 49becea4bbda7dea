"""Equalization: exact in float, refused where a scale would be seen, and what it saves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from npucc import compiler, ops
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
