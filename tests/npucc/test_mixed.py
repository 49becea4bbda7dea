"""Sensitivity per scale, and the choice of 16-bit tensors: what is measured, what it buys, what it must not cost."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import pytest

from isa.target import load_target
from npucc import compiler, ops, reference
from npucc.errors import QuantizeError
from npucc.evaluate import ErrorSum
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.loss import margin_deviation, points_lost, turned_over
from npucc.lowering import lower
from npucc.quantize import QuantizeOptions, quantize, sensitivity
from npucc.quantize.judge import QUIET, Attempt, Judge, paired_gain
from npucc.quantize.mixed import most_within, propose, take_back
from npucc.quantize.price import measure_prices, total_cycles
from npucc.quantize.sensitivity import Sensitivity, affordable_samples
from runtime import Machine
from tests.benchmarks.trained_like import images, resnet

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


def test_in_a_long_network_the_tensors_that_matter_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are measured in bundles, which are halved where they matter: those are chosen that are when each is measured alone."""
    graph, feeds = sensitive(), feeds_of()
    alone = wide_tensors(quantize(graph, feeds).graph)
    monkeypatch.setattr(sensitivity, "BUNDLES", 1)
    assert wide_tensors(quantize(graph, feeds).graph) == alone != set()


def test_the_estimate_is_near_what_is_measured() -> None:
    graph, feeds = sensitive(), feeds_of()
    mixed, plain = (quantize(graph, feeds, options=QuantizeOptions.parse(scheme)) for scheme in ("auto", "int8"))
    assert mixed.report.mixed.before == pytest.approx(sqnr(graph, plain.graph, feeds, "left"), abs=3.0)
    assert mixed.report.mixed.after == pytest.approx(sqnr(graph, mixed.graph, feeds, "left"), abs=3.0)


def test_ranges_chosen_by_measurement_hold_on_other_samples() -> None:
    """What clips the loud samples that the measurement lacks must not be chosen: on few samples it looked 3 dB better, and was 3 dB worse."""
    graph = compiler.float_graph(resnet((1, 2), 16, size=48, classes=20), {})
    few, others = images(8, 48, seed=100), images(16, 48, seed=200)
    (name,) = graph.outputs
    plain, measured = (quantize(graph, few, options=QuantizeOptions.parse(text)).graph for text in ("auto,method=mse", "auto"))
    assert sqnr(graph, measured, others, name) > sqnr(graph, plain, others, name) - 0.5


def test_a_group_gets_the_range_that_errs_least_at_the_outputs() -> None:
    """One value in thousands is large, and it is all that leaves the network: the least mean squared error would clip it."""
    net = FloatNet()
    net.input("x", 1, 32768)
    net.op("table", ["x"], "hidden", ops.Table(("leaky_relu", "x", 0.5)))
    net.op("slice", ["hidden"], "part", ops.Slice((0, 0), (1, 1), (1, 1)))
    random = np.random.default_rng(0)
    feeds = [{"x": np.concatenate([[60.0 + index], random.normal(0, 1, 32767)]).astype(np.float32)[None]} for index in range(8)]
    graph = net.graph("part")
    least, measured = (quantize(graph, feeds, options=QuantizeOptions.parse(f"auto,budget=0,method={method}")) for method in ("mse", "auto"))
    assert measured.report.mixed.after > least.report.mixed.after + 2


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


def noise_of(groups: dict[str, float], weights: float = 1e-5) -> Sensitivity:
    """Two samples of one output, with this error in each group."""
    return Sensitivity(("y", "y"), {name: np.full(2, each) for name, each in groups.items()}, np.full(2, weights))


def test_the_proposal_keeps_the_budget_and_takes_the_cheaper_of_equals() -> None:
    noise = noise_of({"a": 1e-2, "b": 1e-2})
    assert list(propose(noise, {"a": 4.0, "b": 1.0}, budget=4.5)) == ["b"]
    assert list(propose(noise, {"a": 4.0, "b": 1.0}, budget=6.0)) == ["b", "a"]
    assert list(propose(noise, {"a": 4.0, "b": 1.0}, budget=0.0)) == []
    assert list(propose(noise, {"a": np.inf, "b": 1.0}, budget=np.inf)) == ["b"]


def test_two_that_pay_only_together_are_proposed_together() -> None:
    both = noise_of({"a": 1e-4, "b": 1e-4})
    assert list(propose(both, {"a": 90.0, "b": 90.0}, budget=200.0)) == ["a", "b"]  # half the error: 3 dB
    alone = noise_of({"a": 1e-4}, weights=1e-4)
    assert list(propose(alone, {"a": 95.0}, budget=100.0)) == []
    assert list(propose(alone, {"a": 95.0}, budget=100.0, all_that_gain=True)) == ["a"]


def test_what_nobody_hears_is_left_alone() -> None:
    assert propose(noise_of({"a": QUIET / 1000}, weights=0.0), {"a": 0.0}, budget=5.0) == {}


def test_what_does_not_arrive_is_taken_back() -> None:
    """The network gains by a and c only; a block that must stay is looked at by halves, what costs nothing is not looked at."""
    price = {"free": -1.0, "a": 1.0, "b": 1.0, "c": 3.0, "d": 3.0}
    asked = []

    def attempt(roots: Set[str]) -> Set[str]:
        asked.append(roots)
        return roots

    def misses(fewer: Set[str], more: Set[str]) -> bool:
        return bool((more - fewer) & {"a", "c"})

    assert take_back(list(price), price, attempt, misses) == {"free", "a", "c"}
    assert all("free" in roots for roots in asked)
    assert take_back([], {}, attempt, misses) == frozenset()


def test_a_gain_is_as_sure_as_the_samples_agree() -> None:
    """Two networks on the same samples: an offset is sure however much the samples differ, noise of the same size is not."""
    random = np.random.default_rng(0)
    errors = 10 ** random.uniform(-5, -3.2, 32)  # where decibels count as they are
    noisy = errors * 10 ** random.normal(0, 0.1, 32)
    names, samples = ["y"] * 32, list(range(32))
    gain, error = paired_gain(names, samples, errors / 2, errors)
    assert gain == pytest.approx(10 * np.log10(2), rel=0.05)
    assert error < 0.02
    drawn = [paired_gain(names, samples, errors * 10 ** random.normal(0, 0.1, 32), errors)[0] for _ in range(200)]
    assert paired_gain(names, samples, noisy, errors)[1] == pytest.approx(np.std(drawn), rel=0.3)


def test_a_gain_that_one_sample_decides_buys_no_cycles() -> None:
    judge = Judge([{}] * 16, 16, (), tuple(("y", index) for index in range(16)))
    session = exact_session(to_onnx(sensitive()))
    poor, lucky, better = (Attempt(judge, session, [[error]] * 15 + [[last]]) for error, last in ((1e-3, 1e-1), (1e-3, 1e-3), (1e-4, 1e-2)))
    assert paired_gain(["y"] * 16, range(16), lucky.ratios(16), poor.ratios(16))[0] > 2
    assert not judge.surely_gains(lucky, poor, 0.5)
    assert judge.surely_gains(better, poor, 0.5)


def test_a_drop_is_kept_and_estimated_honestly() -> None:
    """The share of rows whose first two change places under normal error of that size, and no less than what is measured."""
    graph, feeds = classifier(), classifier_feeds(16)
    losses = {}
    for text in ("auto,drop=100", "auto,drop=0"):
        quantized = quantize(graph, feeds, options=QuantizeOptions.parse(text))
        losses[text] = quantized.report.mixed.loss
    assert losses["auto,drop=0"] <= losses["auto,drop=100"]
    rows = np.random.default_rng(0).normal(0, 1, (4000, 10)).astype(np.float32)
    noisy = rows + np.random.default_rng(1).normal(0, 0.05, rows.shape).astype(np.float32)
    probable = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    chosen = [each.argmax(axis=1)[:, None] for each in (rows, noisy)]
    lost = [np.take_along_axis(probable, each, axis=1).sum() for each in chosen]
    measured = (lost[0] - lost[1]) / len(rows)
    assert turned_over(rows, margin_deviation([(rows, noisy)])) == pytest.approx(measured, rel=0.3)


def test_points_lost_are_of_answers_where_there_are_some() -> None:
    """Silent samples, masked classes, probabilities a little over one, and features beside scores are no reason to give up."""
    random = np.random.default_rng(0)
    scores = [random.normal(0, 4, (1, 5)).astype(np.float32) for _ in range(8)]
    masked = [np.where(np.arange(5) == index % 5, np.float32(-np.inf), rows) for index, rows in enumerate(scores)]
    features = [random.normal(0, 0.01, (1, 50)).astype(np.float32) for _ in range(8)]
    wanted = [{"y": rows, "f": each} for rows, each in zip(masked, features, strict=True)]
    found = [{"y": rows + np.float32(0.01), "f": -each} for rows, each in zip(masked, features, strict=True)]
    lost = points_lost(["f", "y"], wanted, found)
    assert len(lost) == 8
    assert max(lost) < 0.5
    assert min(points_lost(["f"], wanted, found)) == 100
    quiet = [{"f": each * (index > 0)} for index, each in enumerate(features)]
    assert max(points_lost(["f"], quiet, [{"f": each["f"] + np.float32(1e-5)} for each in quiet])) < 0.1
    sure = [{"p": np.full((1, 1), value, np.float32)} for value in (0.999, 0.2)]
    assert max(points_lost(["p"], sure, [{"p": each["p"] * np.float32(1.002)} for each in sure])) < 0.1


def test_prices_are_what_the_compiled_program_takes() -> None:
    """One group more in 16 bits: the sum of the layers' cycles grows by its price (what it does to its neighbours' transfers left aside)."""
    graph, target = sensitive(), load_target("edge")
    integer = quantize(graph, feeds_of(), options=QuantizeOptions.parse("int8")).graph
    groups = {"x": ("x",), "stem": ("stem",), "sum": ("sum",)}
    found = measure_prices(integer, groups, target)
    assert found.extra["x"] > found.extra["sum"]
    for root, names in groups.items():
        assert total_cycles(integer, names, target) - found.cycles == pytest.approx(found.extra[root], abs=0.02 * found.cycles)


def test_a_large_graph_is_measured_with_fewer_samples() -> None:
    assert affordable_samples(classifier(), 10) > affordable_samples(classifier(), 10**7) == 1


@pytest.mark.parametrize("text", ["int4", "scheme=wide", "auto,budget=-1", "auto,drop=-2", "int8,drop=1"])
def test_wrong_schemes_are_refused(text: str) -> None:
    with pytest.raises(QuantizeError):
        QuantizeOptions.parse(text)


def test_a_constant_that_is_joined_to_a_priced_tensor_is_priced_with_it() -> None:
    net = FloatNet()
    net.input("x", 1, 1, 4)
    net.op("table", ["x"], "t", ops.Table(("tanh", "x")))
    net.op("concat", [net.constant("k", np.full((1, 1, 4), -0.3, np.float32)), "t", "x"], "y", ops.Concat(0))
    feeds = [{"x": np.random.default_rng(seed).normal(0, 1, (1, 1, 4)).astype(np.float32)} for seed in range(4)]
    assert quantize(net.graph("y"), feeds, target=load_target("edge")).graph.outputs == ("y",)


@pytest.mark.parametrize(("price", "taken"), [((0, 0, 0, 50, 50), 2), ((0, 5, 5, 5, 5), 4), ((0, 31, 40, 50, 60), 0), ((0, 1, 2, np.inf, np.inf), 2)])
def test_groups_that_cost_more_together_are_taken_as_far_as_the_budget_goes(price: tuple[float, ...], taken: int) -> None:
    assert most_within("abcd", lambda roots: price[len(roots)], 30.0) == taken
