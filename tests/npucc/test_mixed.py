"""Sensitivity per scale, and the choice of 16-bit tensors: what is measured, what it buys, what it must not cost."""

from __future__ import annotations

import numpy as np
import pytest

from isa.target import load_target
from npucc import ops, reference
from npucc.errors import QuantizeError
from npucc.evaluate import ErrorSum
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.lowering import lower
from npucc.quantize import QuantizeOptions, quantize
from npucc.quantize.mixed import QUIET, choose, prices
from npucc.quantize.sensitivity import Sensitivity, affordable_samples
from runtime import Machine

from .float_graphs import FloatNet, classifier, classifier_feeds, exact_session, run_session


def sqnr(graph: Graph, quantized: Graph, feeds: list[dict[str, np.ndarray]], output: str) -> float:
    session, total = exact_session(to_onnx(graph)), ErrorSum()
    for feed in feeds:
        total.add(reference.run_outputs(quantized, feed)[output], run_session(session, feed)[output])
    return total.sqnr_db


def sensitive() -> Graph:
    """A sum of a loud and a faint branch, of which only the faint part is left: 8 bits in the sum drown it."""
    net = FloatNet(1)
    net.input("x", 1, 512, 2, 2)
    net.op("conv", ["x", net.weights("w1", 8, 512, 3, 3), net.bias("b1", 8)], "stem", ops.Conv(pads=(1, 1, 1, 1), clamp=(0.0, np.inf)))
    net.op("mul", ["stem", net.constant("forty", np.full((1, 1, 1, 1), 40, np.float32))], "loud")
    net.op("conv", ["stem", net.weights("w2", 8, 8, 1, 1), net.bias("b2", 8)], "faint", ops.Conv())
    net.op("add", ["loud", "faint"], "sum")
    net.op("sub", ["sum", "loud"], "left")
    return net.graph("left")


def feeds_of(count: int = 6) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).normal(0, 1, (1, 512, 2, 2)).astype(np.float32)} for seed in range(count)]


def wide_tensors(graph: Graph) -> set[str]:
    return {name for name, tensor in graph.tensors.items() if tensor.quant is not None and tensor.quant.dtype == "s16" and not tensor.is_constant}


def test_the_tensor_that_drowns_the_result_gets_16_bits_and_the_result_is_saved() -> None:
    graph, feeds = sensitive(), feeds_of()
    plain, mixed = (quantize(graph, feeds, options=QuantizeOptions.parse(scheme)) for scheme in ("int8", "auto,budget=20"))
    assert wide_tensors(plain.graph) == set()
    assert "sum" in wide_tensors(mixed.graph)
    assert sqnr(graph, mixed.graph, feeds, "left") > sqnr(graph, plain.graph, feeds, "left") + 10
    assert mixed.report.mixed.after > mixed.report.mixed.before + 10
    assert {name for each in mixed.report.mixed.chosen for name in each.tensors} == wide_tensors(mixed.graph)


def test_the_estimate_is_near_what_is_measured() -> None:
    graph, feeds = sensitive(), feeds_of()
    quantized = quantize(graph, feeds, options=QuantizeOptions.parse("auto,budget=0"))
    assert not quantized.report.mixed.chosen
    assert quantized.report.mixed.before == pytest.approx(sqnr(graph, quantized.graph, feeds, "left"), abs=3.0)


@pytest.mark.parametrize("target", ["edge", "tiny"])
@pytest.mark.parametrize("scheme", ["auto", "int16"])
def test_the_machine_agrees_with_the_reference(scheme: str, target: str) -> None:
    feeds = classifier_feeds(6)
    quantized = quantize(classifier(), feeds, options=QuantizeOptions.parse(scheme), target=load_target(target)).graph
    lowered = lower(quantized, load_target(target))
    result = Machine(lowered.program, lowered.constants).run(feeds[0], dump=True)
    expected = reference.run(quantized, feeds[0])
    assert result.raw
    for name, stored in {**result.tensors, **result.raw}.items():
        np.testing.assert_array_equal(stored, expected[name], err_msg=name)


def test_all_in_16_bits_is_better_than_all_in_8_and_onnxruntime_reads_it() -> None:
    graph, feeds = classifier(), classifier_feeds(8)
    plain, whole = (quantize(graph, feeds, options=QuantizeOptions.parse(scheme)).graph for scheme in ("int8", "int16"))
    assert sqnr(graph, whole, feeds, "logits") > sqnr(graph, plain, feeds, "logits") + 3
    # without the option onnxruntime rounds the inputs of matrix products to 8 bits
    session = exact_session(to_onnx(whole), option="session.qdq_matmulnbits_accuracy_level")
    found = run_session(session, feeds[0])["logits"]
    np.testing.assert_allclose(found, reference.run_outputs(whole, feeds[0])["logits"], atol=2e-4 * float(np.abs(found).max()))


def test_the_choice_keeps_the_budget_and_takes_the_cheaper_of_equals() -> None:
    groups = {"a": ("a",), "b": ("b",)}
    noise = Sensitivity(("y", "y"), {"a": np.array([1e-2, 1e-2]), "b": np.array([1e-2, 1e-2])}, np.array([1e-5, 1e-5]))
    chosen, mixed = choose(noise, groups, {"a": 4.0, "b": 1.0}, budget=4.5)
    assert (chosen, mixed.price) == ({"b"}, 1.0)
    assert choose(noise, groups, {"a": 4.0, "b": 1.0}, budget=6.0)[0] == {"a", "b"}
    assert choose(noise, groups, {"a": 4.0, "b": 1.0}, budget=0.0)[0] == set()


def test_what_nobody_hears_is_left_alone() -> None:
    noise = Sensitivity(("y",), {"a": np.array([QUIET / 1000])}, np.array([0.0]))
    assert choose(noise, {"a": ("a",)}, {"a": 0.0}, budget=5.0)[0] == set()


def test_matrix_readers_make_a_tensor_expensive() -> None:
    graph = sensitive()
    for target in (None, load_target("edge")):
        found = prices(graph, {"x": ("x",), "stem": ("stem",), "sum": ("sum",)}, target)
        assert found["x"] > found["sum"]
        assert found["stem"] > found["sum"]


def test_a_large_graph_is_measured_with_fewer_samples() -> None:
    assert affordable_samples(classifier(), 10) > affordable_samples(classifier(), 10**6) == 1


@pytest.mark.parametrize("text", ["int4", "scheme=wide", "auto,budget=-1"])
def test_wrong_schemes_are_refused(text: str) -> None:
    with pytest.raises(QuantizeError):
        QuantizeOptions.parse(text)
