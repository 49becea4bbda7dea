"""Quantization: ranges, shared scales, constants, options, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npucc import compiler, ops, reference
from npucc.errors import QuantizeError
from npucc.evaluate import compare
from npucc.export import to_onnx
from npucc.graph import Graph, Quant
from npucc.quantize import QuantizeOptions, quantize
from npucc.quantize.constants import Axes, constant_quant, quantize_matrix
from npucc.quantize.correct import correct_biases, shrunk_mean
from npucc.quantize.ranges import METHODS, Fit, Histogram, Range, activation_quant, choose_range, least_error_range, percentile_range

from .float_graphs import FloatNet, classifier, classifier_feeds, exact_session, run_session


def feeds_of(shape: tuple[int, ...], count: int = 4, scale: float = 1.0) -> list[dict[str, np.ndarray]]:
    return [{"x": (scale * np.random.default_rng(seed).normal(0, 1, shape)).astype(np.float32)} for seed in range(count)]


INT8 = QuantizeOptions(scheme="int8")


def quant_of(graph: Graph, name: str) -> tuple[float, int]:
    quant = graph.quant(name)
    return float(quant.scale), quant.zero


# ---- histograms and ranges

batches = st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=6)


@given(batches, st.randoms())
def test_a_histogram_does_not_depend_on_the_order(values: list[list[float]], random: object) -> None:
    forward, shuffled = Histogram(), Histogram()
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for batch in values:
        forward.add(np.asarray(batch, np.float32))
    for index in order:
        shuffled.add(np.asarray(values[index], np.float32))
    assert (forward.low, forward.high) == (shuffled.low, shuffled.high)
    assert forward.width == shuffled.width
    np.testing.assert_array_equal(forward.counts, shuffled.counts)


@given(batches)
def test_a_histogram_counts_every_value_in_its_bin(values: list[list[float]]) -> None:
    histogram, merged = Histogram(), Histogram()
    for batch in values:
        histogram.add(np.asarray(batch, np.float32))
        one = Histogram()
        one.add(np.asarray(batch, np.float32))
        merged.merge(one)
    flat = np.asarray([value for batch in values for value in batch], np.float32)
    assert histogram.counts.sum() == flat.size
    assert (histogram.low, histogram.high) == (min(0.0, float(flat.min())), max(0.0, float(flat.max())))
    np.testing.assert_array_equal(histogram.counts, merged.counts)
    if histogram.width:
        centres, counts = histogram.values()
        assert abs(float(centres @ counts) - float(flat.astype(np.float64).sum())) <= histogram.width * flat.size


def test_infinite_values_do_not_count() -> None:
    histogram = Histogram()
    histogram.add(np.array([-np.inf, 1.0, 2.0, np.inf], np.float32))
    assert histogram.observed == Range(0.0, 2.0)
    assert histogram.infinite == 2


def test_least_error_clips_a_long_tail_and_beats_the_whole_range() -> None:
    histogram = Histogram()
    histogram.add(np.random.default_rng(0).standard_t(3, 200_000).astype(np.float32))
    chosen, fit = least_error_range(histogram), Fit.of(histogram)
    assert chosen.width < 0.8 * histogram.observed.width
    assert fit.error(chosen) < 0.8 * fit.error(histogram.observed)
    for factor in (0.8, 1.25):
        other = Range(chosen.low * factor, chosen.high * factor)
        assert fit.error(chosen) <= fit.error(other)


def test_least_error_keeps_an_even_spread_whole() -> None:
    histogram = Histogram()
    histogram.add(np.linspace(-1, 3, 10_000, dtype=np.float32))
    chosen = least_error_range(histogram)
    assert chosen.low == pytest.approx(-1, abs=0.05)
    assert chosen.high == pytest.approx(3, abs=0.05)


def test_what_the_next_function_flattens_is_not_covered() -> None:
    histogram = Histogram()
    histogram.add(np.random.default_rng(0).normal(0, 10, 100_000).astype(np.float32))
    assert least_error_range(histogram).high > 20
    tanh, swish = (least_error_range(histogram, function) for function in (("tanh", "x"), ("hard_swish", "x")))
    assert -5 < tanh.low < -2
    assert 2 < tanh.high < 5
    assert -4 < swish.low < -2.5
    assert swish.high > 20


def test_a_percentile_leaves_the_same_share_out_at_either_end() -> None:
    histogram = Histogram()
    histogram.add(np.linspace(-1, 1, 20_001, dtype=np.float32))
    chosen = percentile_range(histogram, 90)
    assert chosen.low == pytest.approx(-0.9, abs=0.01)
    assert chosen.high == pytest.approx(0.9, abs=0.01)


def test_an_average_is_over_samples_and_joins_tensors() -> None:
    histogram, other = Histogram(), Histogram()
    for largest in (1.0, 2.0, 9.0):
        histogram.add(np.array([-largest, largest], np.float32))
        other.add(np.array([0.5, 20.0], np.float32))
    assert choose_range(histogram, "average") == Range(-4.0, 4.0)
    histogram.merge(other)
    assert choose_range(histogram, "average") == Range(-4.0, 20.0)


def test_entropy_gives_up_rare_outliers_and_keeps_an_even_distribution() -> None:
    random = np.random.default_rng(0)
    even, outliers = Histogram(), Histogram()
    even.add(random.uniform(-1, 1, 100_000).astype(np.float32))
    outliers.add(np.concatenate([random.normal(0, 1, 100_000), [60.0]]).astype(np.float32))
    assert choose_range(even, "entropy").high > 0.9
    assert 2 < choose_range(outliers, "entropy").high < 15


@pytest.mark.parametrize("method", [record.name for record in METHODS])
def test_every_range_method_serves_the_whole_quantizer(method: str) -> None:
    graph, feeds = classifier(), classifier_feeds(4)
    quantized = quantize(graph, feeds, options=QuantizeOptions.parse(f"int8,method={method}"))
    wanted = run_session(exact_session(to_onnx(graph)), feeds[0])["logits"]
    assert float(np.abs(reference.run_outputs(quantized.graph, feeds[0])["logits"] - wanted).max()) < 0.25 * float(np.abs(wanted).max())


@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_scales_cover_their_range_and_store_zero_exactly(low: float, high: float) -> None:
    quant = activation_quant(Range(low, high))
    scale = float(quant.scale)
    assert scale > 0
    assert -128 <= quant.zero <= 127
    if high - low > 1e-9:
        assert (-128 - quant.zero) * scale <= low + 0.51 * scale
        assert (127 - quant.zero) * scale >= high - 0.51 * scale


def test_a_dead_tensor_gets_a_harmless_scale() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(10, np.float32))
    assert float(activation_quant(choose_range(histogram, QuantizeOptions().default_method)).scale) == 1.0


# ---- constants


@given(st.integers(0, 10_000))
def test_no_accumulator_can_wrap(seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = (random.normal(0, 1, (4, 3, 3, 3)) * 10.0 ** random.uniform(-12, 2, (4, 1, 1, 1))).astype(np.float32)
    weights[random.integers(0, 4)] = 0
    bias = (random.normal(0, 1, 4) * 10.0 ** random.uniform(-6, 5, 4)).astype(np.float32)
    source = Quant("s8", np.asarray(10.0 ** random.uniform(-6, 1), np.float32), 3)
    constants = quantize_matrix(weights, bias, source, Axes(0, (1, 2, 3)))
    assert constants.bias is not None
    worst = np.abs(constants.weights.astype(np.int64)).sum(axis=(1, 2, 3)) * 255 + np.abs(constants.bias.astype(np.int64))
    assert worst.max() < 2**31
    assert np.isfinite(constants.weights_quant.scale).all()
    assert (constants.weights_quant.scale > 0).all()


def test_weights_use_all_of_127_steps_per_channel() -> None:
    weights = np.random.default_rng(0).normal(0, 1, (5, 7, 3, 3)).astype(np.float32) * np.array([1, 10, 0.1, 3, 1e-3], np.float32).reshape(5, 1, 1, 1)
    constants = quantize_matrix(weights, None, Quant("s8", np.asarray(0.1, np.float32)), Axes(0, (1, 2, 3)))
    assert constants.bias is None
    np.testing.assert_array_equal(np.abs(constants.weights).max(axis=(1, 2, 3)), 127)
    restored = constants.weights * constants.weights_quant.scale.reshape(5, 1, 1, 1)
    assert (np.abs(restored - weights) <= 0.501 * constants.weights_quant.scale.reshape(5, 1, 1, 1)).all()


@pytest.mark.parametrize("values", [[5.0], [0.1], [0.0, -3.7], [0.0, 1.0, 7.0], [-100.0, 100.0], [0.0]])
def test_single_values_and_whole_numbers_are_exact(values: list[float]) -> None:
    array = np.asarray(values)
    quant = constant_quant(array)
    steps = np.rint(array / float(quant.scale))
    assert np.abs(steps + quant.zero).max() <= 128
    np.testing.assert_allclose(steps * float(quant.scale), array, rtol=1e-6)


# ---- whole graphs


@pytest.mark.parametrize(
    "spec", ["int8", "int8,method=minmax", "method=percentile,percentile=99.9", "per_tensor=yes", "bias_correction=no", "bias_samples=0", "samples=3"]
)
def test_the_integer_graph_is_close_to_the_float_graph(spec: str) -> None:
    graph, feeds = classifier(), classifier_feeds()
    integer = quantize(graph, feeds, options=QuantizeOptions.parse(spec)).graph
    wanted = run_session(exact_session(to_onnx(graph)), feeds[0])
    errors = {error.name: error for error in compare(reference.run_outputs(integer, feeds[0]), wanted)}
    assert errors["logits"].sqnr_db > 25
    assert errors["probabilities"].sqnr_db > 25


def test_the_whole_integer_graph_equals_onnxruntime() -> None:
    integer = quantize(classifier(3), classifier_feeds(), options=INT8).graph
    session = exact_session(to_onnx(integer))
    for feeds in classifier_feeds(5):
        found, wanted = run_session(session, feeds), reference.run_outputs(integer, feeds)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)


def test_calibration_is_deterministic_and_takes_a_generator() -> None:
    first, second = (quantize(classifier(), feeds) for feeds in (classifier_feeds(), (feed for feed in classifier_feeds())))
    assert first.graph.text() == second.graph.text()
    assert first.report == second.report
    for name, tensor in first.graph.tensors.items():
        if tensor.data is not None:
            np.testing.assert_array_equal(tensor.data, second.graph.tensors[name].data)


def test_only_so_many_samples_are_taken() -> None:
    def endless() -> object:
        while True:
            yield classifier_feeds(1)[0]

    seen: list[tuple[str, int, int]] = []
    quantized = quantize(classifier(), endless(), options=QuantizeOptions(samples=3), progress=lambda *step: seen.append(step))  # type: ignore[arg-type]
    assert quantized.report.samples == 3
    assert not quantized.synthetic
    assert [step[1] for step in seen if step[0] == "calibrate"] == [1, 2, 3]


def test_without_samples_inputs_are_made_up_and_said_so() -> None:
    first, second = quantize(classifier(), None), quantize(classifier(), None)
    assert first.synthetic
    assert first.graph.text() == second.graph.text()


def test_where_data_moves_scales_are_shared() -> None:
    graph = quantize(classifier(), classifier_feeds(), options=INT8).graph
    assert quant_of(graph, "sum") == quant_of(graph, "pooled")
    assert quant_of(graph, "large") == quant_of(graph, "joined")
    assert quant_of(graph, "mean") == quant_of(graph, "flat")


def test_a_clamped_result_uses_the_whole_range_above_zero() -> None:
    graph = quantize(classifier(), classifier_feeds(), options=INT8).graph
    scale, zero = quant_of(graph, "stem")
    assert zero == -128
    assert 255 * scale <= 6.001


def test_a_softmax_has_a_scale_of_one_over_n() -> None:
    graph = quantize(classifier(), classifier_feeds(), options=INT8).graph
    scale, zero = quant_of(graph, "probabilities")
    assert zero == -128
    assert float(np.float32(1) / np.float32(scale)) == round(1 / scale)


def narrow_and_wide(*, reused: bool) -> Graph:
    net = FloatNet()
    net.input("x", 1, 4, 5, 5)
    net.op("table", ["x"], "narrow", ops.Table(("mul", "x", 0.05)))
    net.op("table", ["x"], "wide", ops.Table(("mul", "x", 5.0)))
    net.op("concat", ["narrow", "wide"], "joined", ops.Concat(1))
    net.op("table", ["narrow" if reused else "wide"], "again", ops.Table(("tanh", "x")))
    return net.graph("joined", "again")


def test_a_narrow_input_of_concat_keeps_its_scale_if_others_read_it() -> None:
    quantized = quantize(narrow_and_wide(reused=True), feeds_of((1, 4, 5, 5)))
    graph = quantized.graph
    assert quantized.report.rescaled == ("narrow",)
    assert quant_of(graph, "narrow")[0] < 0.05 * quant_of(graph, "joined")[0]
    assert quant_of(graph, "wide") == quant_of(graph, "joined")
    joined = next(node for node in graph if node.op == "concat")
    copy = graph.producer(joined.inputs[0])
    assert copy is not None
    assert (copy.op, copy.inputs, copy.attributes) == ("table", ("narrow",), ops.Table("x"))


def test_a_narrow_input_that_only_concat_reads_is_joined() -> None:
    quantized = quantize(narrow_and_wide(reused=False), feeds_of((1, 4, 5, 5)))
    assert quantized.report.rescaled == ()
    assert quant_of(quantized.graph, "narrow") == quant_of(quantized.graph, "joined")


@pytest.mark.parametrize("masked", [-1e4, -3.4e38, -np.inf], ids=str)
def test_masked_scores_do_not_widen_the_range(masked: float) -> None:
    net = FloatNet()
    net.input("x", 1, 4, 16, 16)
    allowed = net.constant("allowed", np.tril(np.ones((16, 16), bool)))
    net.op("where", [allowed, "x", net.constant("masked", np.array(masked, np.float32))], "scores")
    net.op("softmax", ["scores"], "weights", ops.Softmax(3))
    graph, feeds = net.graph("weights"), feeds_of((1, 4, 16, 16), scale=2.0)
    integer = quantize(graph, feeds).graph
    assert quant_of(integer, "scores")[0] < 40 / 255
    (error,) = compare(reference.run_outputs(integer, feeds[0]), run_session(exact_session(to_onnx(graph)), feeds[0]))
    assert error.sqnr_db > 30


def test_an_added_mask_is_exact_where_it_is_zero() -> None:
    net = FloatNet()
    net.input("x", 1, 4, 16, 16)
    mask = np.where(np.tril(np.ones((16, 16), bool)), 0, -10000).astype(np.float32)
    net.op("add", ["x", net.constant("mask", mask)], "scores")
    net.op("softmax", ["scores"], "weights", ops.Softmax(3))
    graph, feeds = net.graph("weights"), feeds_of((1, 4, 16, 16), scale=2.0)
    integer = quantize(graph, feeds).graph
    (error,) = compare(reference.run_outputs(integer, feeds[0]), run_session(exact_session(to_onnx(graph)), feeds[0]))
    assert error.sqnr_db > 30


def test_what_is_looked_up_and_added_to_scores_keeps_its_top_beside_a_mask() -> None:
    net = FloatNet()
    net.input("x", 1, 1, 16, 16)
    net.input("distance", 1, 1, 16, 16, dtype="int64")
    net.op("gather", [net.constant("by_distance", np.array([6.0, 3.0, -2.0, -np.inf], np.float32)), "distance"], "bias", ops.Gather(0))
    net.op("add", ["x", "bias"], "scores")
    net.op("softmax", ["scores"], "weights", ops.Softmax(3))
    graph, random = net.graph("weights"), np.random.default_rng(1)
    distances = random.integers(0, 4, (4, 1, 1, 16, 16))
    feeds = [{**feed, "distance": each} for feed, each in zip(feeds_of((1, 1, 16, 16)), distances, strict=True)]
    integer = quantize(graph, feeds).graph
    (error,) = compare(reference.run_outputs(integer, feeds[0]), run_session(exact_session(to_onnx(graph)), feeds[0]))
    assert error.sqnr_db > 30


def test_padding_with_minus_infinity_does_not_widen_the_range() -> None:
    net = FloatNet()
    net.input("x", 1, 2, 6, 6)
    net.op("pad", ["x"], "padded", ops.Pad((0, 0, 1, 1), (0, 0, 1, 1), -np.inf))
    net.op("max_pool", ["padded"], "y", ops.Pool((3, 3), (2, 2)))
    graph, feeds = net.graph("y"), feeds_of((1, 2, 6, 6))
    integer = quantize(graph, feeds).graph
    assert quant_of(integer, "y")[0] < 0.05
    (error,) = compare(reference.run_outputs(integer, feeds[0]), run_session(exact_session(to_onnx(graph)), feeds[0]))
    assert error.max_abs < 0.05


CORRECTIONS = {"from channel means": QuantizeOptions(bias_samples=0), "from samples": QuantizeOptions(bias_correction=False)}


def test_bias_correction_counts_what_a_function_lets_through() -> None:
    """The layer errs by what its input clips, and all of that lies where the function is flat: there is nothing to make up for."""
    net = FloatNet(1)
    net.input("x", 1, 1, 8, 8)
    net.op("conv", ["x", net.constant("w", np.full((1, 1, 1, 1), -1.0, np.float32))], "y", ops.Conv())
    net.op("table", ["y"], "z", ops.Table(("max", "x", -3.0)))
    graph = net.graph("z")
    feeds = feeds_of((1, 1, 8, 8), 8)
    plain = quantize(graph, feeds, options=QuantizeOptions(scheme="int8", bias_samples=0)).graph
    for feed in feeds:
        feed["x"][0, 0, 0] = 50
    corrected = correct_biases(graph, plain, feeds)
    bias = corrected.tensors["y/bias"].data
    assert bias is not None
    assert not bias.any()


def test_a_channel_with_an_infinite_mean_keeps_its_bias() -> None:
    net = FloatNet(1)
    net.input("x", 1, 1, 8, 8)
    net.op("conv", ["x", net.constant("w", np.array([1.0, 100.0], np.float32).reshape(2, 1, 1, 1))], "y", ops.Conv())
    net.op("table", ["y"], "z", ops.Table(("exp", "x")))
    graph, feeds = net.graph("z"), feeds_of((1, 1, 8, 8), 8)
    plain = quantize(graph, feeds, options=QuantizeOptions(scheme="int8", bias_samples=0)).graph
    bias = correct_biases(graph, plain, feeds).tensors["y/bias"].data
    assert bias is not None
    assert bias[1] == 0


@pytest.mark.parametrize("clamp", [None, (0.0, float("inf"))], ids=["plain", "relu"])
@pytest.mark.parametrize("options", CORRECTIONS.values(), ids=CORRECTIONS.keys())
def test_bias_correction_removes_the_mean_error(options: QuantizeOptions, clamp: tuple[float, float] | None) -> None:
    net = FloatNet(1)
    net.input("x", 1, 3, 12, 12)
    coarse = net.random.normal(0, 1, (6, 3, 3, 3)) * np.where(np.arange(27).reshape(1, 3, 3, 3) == 0, 40, 0.3)
    net.op("conv", ["x", net.constant("w", coarse.astype(np.float32))], "y", ops.Conv(clamp=clamp))
    graph = net.graph("y")
    feeds = [{"x": np.abs(feed["x"]) + 1} for feed in feeds_of((1, 3, 12, 12), 8)]
    session = exact_session(to_onnx(graph))

    def shift(how: QuantizeOptions) -> float:
        integer = quantize(graph, feeds, options=how).graph
        errors = [reference.run_outputs(integer, feed)["y"] - run_session(session, feed)["y"] for feed in feeds]
        return float(np.abs(np.mean(errors, axis=(0, 1, 3, 4))).max())

    assert shift(options) < 0.3 * shift(QuantizeOptions(bias_correction=False, bias_samples=0))


def test_the_mean_of_samples_that_disagree_is_distrusted() -> None:
    agreeing, disagreeing = np.full((8, 1), 2.0), np.array([[9.0], [-9.0]] * 4) + 0.5
    assert shrunk_mean(agreeing) == 2.0
    assert 0 < shrunk_mean(disagreeing) < 0.01
    assert shrunk_mean(agreeing[:1]) == 0.0


def test_one_weight_read_by_two_layers_is_stored_for_each() -> None:
    net = FloatNet()
    net.input("x", 1, 4, 5, 5)
    weights, bias = net.weights("w", 4, 4, 1, 1), net.bias("b", 4)
    net.op("conv", ["x", weights, bias], "a", ops.Conv(clamp=(0.0, 0.5)))
    net.op("conv", ["a", weights, bias], "y", ops.Conv())
    integer = quantize(net.graph("y"), feeds_of((1, 4, 5, 5))).graph
    first, second = (node.inputs for node in integer)
    assert first[1] == second[1]
    assert first[2] != second[2]


def test_add_takes_the_broadcast_operand_second() -> None:
    net = FloatNet()
    net.input("x", 1, 4, 5, 5)
    net.op("add", [net.constant("c", np.ones((4, 1, 1), np.float32)), "x"], "y")
    (node,) = quantize(net.graph("y"), feeds_of((1, 4, 5, 5))).graph
    assert node.inputs == ("x", "c")


def one_hot(dtype: str, classes: int) -> Graph:
    net = FloatNet()
    net.input("x", 1, 8, 1, dtype=dtype)
    net.op("compare", ["x", net.constant("classes", np.arange(classes, dtype=dtype))], "y", dtype="bool")
    return net.graph("y")


@pytest.mark.parametrize(("classes", "stored"), [(200, "s8"), (300, "s16")])
def test_whole_numbers_stay_exact(classes: int, stored: str) -> None:
    values = np.array([0, 1, 77, 127, 128, 150, 199, classes - 1], np.int32).reshape(1, 8, 1)
    integer = quantize(one_hot("int32", classes), [{"x": values}]).graph
    assert integer.quant("x").dtype == stored
    np.testing.assert_array_equal(reference.run_outputs(integer, {"x": values})["y"], values == np.arange(classes))


# ---- refusals


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(QuantizeError) as caught:
        action()
    return str(caught.value)


def test_feeds_that_do_not_fit_are_refused() -> None:
    graph, good = classifier(), classifier_feeds(1)[0]
    assert "sample 1" in message_of(lambda: quantize(graph, [good, {"y": good["x"]}]))
    assert "'x' is missing" in message_of(lambda: quantize(graph, [{}]))
    assert "[1, 3, 8, 8]" in message_of(lambda: quantize(graph, [{"x": good["x"][:, :, :8, :8]}]))
    assert "nan" in message_of(lambda: quantize(graph, [{"x": good["x"] * np.float32(np.nan)}]))
    assert "no calibration samples" in message_of(lambda: quantize(graph, []))


def test_nan_within_the_model_is_refused_with_its_node() -> None:
    net = FloatNet()
    net.input("x", 1, 4)
    net.op("table", ["x"], "root", ops.Table(("sqrt", "x")))
    message = message_of(lambda: quantize(net.graph("root"), [{"x": -np.ones((1, 4), np.float32)}]))
    assert "onnx/root" in message
    assert "NaN" in message


def test_faint_probabilities_keep_their_bits_exactly() -> None:
    """A detector's answer is 0.9 in a few samples and a millionth in the others, which 16 bits would store as zero."""
    net = FloatNet()
    net.input("x", 1, 16)
    net.op("matmul", ["x", net.constant("w", np.full((16, 8), 0.25, np.float32))], "hidden", ops.MatMul((0.0, np.inf)))
    net.op("matmul", ["hidden", net.constant("v", np.full((8, 1), 0.5, np.float32)), net.constant("b", np.full(1, -13.0, np.float32))], "logit")
    net.op("table", ["logit"], "sigmoid", ops.Table(("sigmoid", "x")))
    net.op("reshape", ["sigmoid"], "probability", ops.Reshape((1,)))
    graph = net.graph("probability")
    feeds = [{"x": np.full((1, 16), level, np.float32)} for level in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9)]
    quantized = quantize(graph, feeds, options=INT8).graph
    assert quantized.quant("probability").dtype == "s32"
    session = exact_session(to_onnx(quantized))
    for feed in feeds:
        found = reference.to_real(quantized.tensors["probability"], reference.run(quantized, feed)["probability"])
        np.testing.assert_array_equal(found.astype(np.float32), run_session(session, feed)["probability"])
        exact = 1 / (1 + np.exp(13 - 16 * feed["x"].max()))
        assert found.item() == pytest.approx(exact, rel=0.15)
    again = quantize(compiler.float_graph(to_onnx(quantized), {}), None).graph  # the exported model brings all its scales
    for feed in feeds:
        assert reference.run_outputs(again, feed)["probability"] == reference.run_outputs(quantized, feed)["probability"]


def test_what_has_no_8_bit_form_is_refused() -> None:
    net = FloatNet()
    net.input("x", 1, 2, 4, 4)
    net.input("w", 2, 2, 1, 1)
    net.op("conv", ["x", "w"], "y", ops.Conv())
    assert "onnx/y" in message_of(lambda: quantize(net.graph("y"), None))
    assert "from 0 to 40000" in message_of(lambda: quantize(one_hot("int32", 300), [{"x": np.full((1, 8, 1), 40000, np.int32)}]))
    twice = quantize(classifier(), None).graph
    assert "already" in message_of(lambda: quantize(twice, None))


def test_a_sample_that_the_model_cant_take_is_refused() -> None:
    """An index beyond the table, which only running the model finds."""
    net = FloatNet()
    net.input("ids", 1, 3, dtype="int64")
    net.op("gather", [net.constant("table", np.eye(4, dtype=np.float32)), "ids"], "rows", ops.Gather())
    net.op("table", ["rows"], "y", ops.Table(("tanh", "x")))
    with pytest.raises(QuantizeError, match=r"calibration sample.*indices"):
        quantize(net.graph("y"), [{"ids": np.array([[0, 1, 9]])}])


def test_broken_constants_are_refused() -> None:
    net = FloatNet()
    net.input("x", 1, 2, 4, 4)
    net.op("conv", ["x", net.constant("w", np.full((2, 2, 1, 1), np.inf, np.float32))], "y", ops.Conv())
    net.editor.tensors["y"] = replace(net.editor.tensors["y"])
    assert "y" in message_of(lambda: quantize(net.graph("y"), feeds_of((1, 2, 4, 4))))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4", "'int4'"),
        ("int8,method=best", "'best'"),
        ("method", "'method'"),
        ("samples=many", "'many'"),
        ("samples=0", "samples is 0"),
        ("bias_samples=-1", "bias_samples is -1"),
        ("percentile=20", "percentile is 20"),
        ("per_tensor=maybe", "'maybe'"),
        ("samples=2,samples=3", "twice"),
        ("percentile=nan", "'nan'"),
    ],
)
def test_wrong_options_are_refused(text: str, said: str) -> None:
    assert said in message_of(lambda: QuantizeOptions.parse(text))


def test_options_are_read() -> None:
    assert QuantizeOptions.parse("auto") == QuantizeOptions()
    assert QuantizeOptions.parse("auto") == QuantizeOptions(scheme="auto")
    assert QuantizeOptions.parse("int8,budget=2") == QuantizeOptions(scheme="int8", budget=2.0)
    expected = QuantizeOptions(
        method="percentile", percentile=99.5, samples=7, per_tensor=True, bias_correction=False, bias_samples=0
    )
    assert (
        QuantizeOptions.parse("method=percentile, percentile=99.5,samples=7,per_tensor=on,bias_correction=0,bias_samples=0")
        == expected
    )


def test_merging_histograms_changes_neither_the_other_nor_what_a_second_merge_gives() -> None:
    narrow, wide = Histogram(), Histogram()
    narrow.add(np.linspace(-1, 1, 1000).astype(np.float32))
    wide.add(np.array([900.0], np.float32))
    before = (narrow.width, narrow.counts.tolist())
    for _ in range(2):
        merged = Histogram()
        merged.merge(narrow)
        merged.merge(wide)
        assert merged.width == wide.width
        assert merged.counts.sum() == 1001
    assert (narrow.width, narrow.counts.tolist()) == before
