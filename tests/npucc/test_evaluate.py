"""Errors at the outputs, accuracy, and errors per layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from npucc import compiler, reference
from npucc.errors import DataError
from npucc.evaluate import LARGEST_DB, ErrorSum, compare, evaluate, float_runner, layer_errors, score_rows
from npucc.feeds import Sample
from npucc.graph import Editor, Graph
from npucc.quantize import QuantizeOptions, quantize
from tests.benchmarks.trained_like import images, resnet

from .float_graphs import classifier, classifier_feeds

Outputs = Mapping[str, np.ndarray]


def test_figures_of_one_output() -> None:
    wanted = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    found = np.array([[3.0, 4.5], [0.0, 0.0]], np.float32)
    (error,) = compare({"y": found, "other": found}, {"y": wanted})
    assert error.name == "y"
    assert error.sqnr_db == pytest.approx(10 * np.log10(26 / 1.25))
    assert error.cosine == pytest.approx((9 + 18) / np.sqrt(26 * (9 + 4.5**2)))
    assert error.max_abs == 1.0
    assert error.top1_agreement == 1.0


def test_equal_outputs_and_outputs_of_nothing() -> None:
    ones, zeros = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    (same,), (lost,), (nothing,) = (compare({"y": a}, {"y": b}) for a, b in ((ones, ones), (ones, zeros), (zeros, zeros)))
    assert (same.sqnr_db, same.cosine, same.max_abs) == (LARGEST_DB, 1.0, 0.0)
    assert (lost.sqnr_db, lost.cosine) == (-LARGEST_DB, 0.0)
    assert (nothing.sqnr_db, nothing.cosine) == (LARGEST_DB, 1.0)


def test_sums_over_samples_equal_sums_over_all() -> None:
    random = np.random.default_rng(0)
    wanted, found = random.normal(0, 1, (6, 5)), random.normal(0, 1, (6, 5))
    sums = ErrorSum()
    for x, y in zip(found, wanted, strict=True):
        sums.add(x[None], y[None])
    (whole,) = compare({"y": found}, {"y": wanted})
    streamed = sums.output("y")
    assert streamed.sqnr_db == pytest.approx(whole.sqnr_db)
    assert (streamed.max_abs, streamed.top1_agreement) == (whole.max_abs, whole.top1_agreement)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 10), (1, 10)),
        ((4, 10), (4, 10)),
        ((1, 10, 1, 1), (1, 10)),
        ((1, 64, 50), (64, 50)),
        ((10,), (1, 10)),
        ((1, 1, 32, 32), None),
        ((1, 1), None),
    ],
)
def test_what_is_a_score_vector(shape: tuple[int, ...], rows: tuple[int, int] | None) -> None:
    found = score_rows(np.zeros(shape, np.float32))
    assert (None if found is None else found.shape) == rows


def labelled(labels: list[int | None]) -> list[Sample]:
    return [Sample({"x": np.array([float(i)], np.float32)}, None if label is None else np.array([label])) for i, label in enumerate(labels)]


def one_hot_run(answers: list[int]) -> object:
    def run(feed: Mapping[str, np.ndarray]) -> Outputs:
        row = np.zeros((1, 3), np.float32)
        row[0, answers[int(feed["x"][0])]] = 1
        return {"extra": np.zeros((1, 2, 4, 4), np.float32), "scores": row}

    return run


def test_accuracy_and_its_drop() -> None:
    result = evaluate(one_hot_run([0, 1, 1, 2]), one_hot_run([0, 1, 2, 2]), labelled([0, 1, 2, 1]))  # type: ignore[arg-type]
    assert result.samples == 4
    assert (result.float_accuracy, result.npu_accuracy) == (0.75, 0.5)
    assert result.accuracy_drop_points == 25.0
    assert [output.top1_agreement for output in result.outputs] == [None, 0.75]
    as_dict = json.loads(json.dumps(result.as_dict()))
    assert as_dict["accuracy_drop_points"] == 25.0
    assert as_dict["outputs"]["scores"].keys() == {"name", "sqnr_db", "cosine", "max_abs", "top1_agreement"}


def test_without_labels_there_is_no_accuracy() -> None:
    result = evaluate(one_hot_run([0, 1]), one_hot_run([0, 1]), labelled([None, None]))  # type: ignore[arg-type]
    assert result.accuracy_drop_points is None
    assert "float_accuracy" not in result.as_dict()


def test_what_does_not_fit_is_refused() -> None:
    x = np.zeros((1, 3), np.float32)
    with pytest.raises(DataError, match="'y' is missing; found 'z'"):
        compare({"z": x}, {"y": x})
    with pytest.raises(DataError, match=r"\[1, 3\] and \[3\] differ"):
        compare({"y": x}, {"y": x[0]})
    with pytest.raises(DataError, match="no samples"):
        evaluate(one_hot_run([]), one_hot_run([]), [])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 labels fit no output"):
        evaluate(one_hot_run([0]), one_hot_run([0]), [Sample({"x": np.zeros(1, np.float32)}, np.array([1, 2]))])  # type: ignore[arg-type]


def test_errors_per_layer_find_the_bad_layer() -> None:
    graph, feeds = classifier(), classifier_feeds(4)
    integer = quantize(graph, feeds, options=QuantizeOptions(scheme="int8")).graph
    spoiled = spoil(integer, "depthwise", 24.0)
    rows = {row.tensor: row for row in layer_errors(spoiled, float_runner(graph), feeds[:2])}
    assert list(rows) == [node.outputs[0] for node in spoiled]
    assert rows["stem"].single_db == pytest.approx(rows["stem"].accumulated_db)
    assert rows["depthwise"].single_db < 15
    accumulated = {name: row.accumulated_db or 0.0 for name, row in rows.items()}
    assert accumulated["swish"] < 20
    assert rows["sum"].single_db > 30
    assert accumulated["sum"] < rows["sum"].single_db
    assert rows["swish/rescaled"].single_db > 20
    assert rows["stem"].nodes == ("onnx/stem",)
    json.dumps([row.as_dict() for row in rows.values()])


def test_layers_with_equalized_channels_are_compared_with_what_they_should_be() -> None:
    graph, feeds = compiler.float_graph(resnet((1,), 8, size=32, classes=10), {}), images(6, 32)
    quantized = quantize(graph, feeds, options=QuantizeOptions(scheme="int8"))
    scaled = [each.as_dict() for each in quantized.report.equalized]
    assert scaled
    rows = layer_errors(quantized.graph, float_runner(graph), feeds[:2], equalized=scaled)
    assert min(row.single_db for row in rows) > 25
    assert min(row.accumulated_db or 0.0 for row in rows) > 15


def test_values_outside_of_what_is_covered_are_counted() -> None:
    graph, feeds = classifier(), classifier_feeds(4)
    integer = quantize(graph, feeds, options=QuantizeOptions(scheme="int8")).graph
    exact = float_runner(graph)(feeds[0])["depthwise"]
    narrowed = spoil(integer, "depthwise", 0.25)
    (before,), (after,) = (
        [row for row in layer_errors(each, float_runner(graph), feeds[:1]) if row.tensor == "depthwise"] for each in (integer, narrowed)
    )
    low, high = after.covered
    assert (high - low) == pytest.approx((before.covered[1] - before.covered[0]) / 4)
    slack = (high - low) / 255 / 2
    assert after.saturated == pytest.approx(float(np.mean((exact < low - slack) | (exact > high + slack))))
    assert after.saturated > before.saturated
    assert after.seen == pytest.approx((float(exact.min()), float(exact.max())))


def spoil(graph: Graph, name: str, factor: float) -> Graph:
    """The graph with one tensor's scale much too coarse."""
    editor, tensor, quant = Editor(graph), graph.tensors[name], graph.quant(name)
    editor.tensors[name] = replace(tensor, quant=replace(quant, scale=np.asarray(quant.scale * np.float32(factor), np.float32)))
    return editor.freeze()


def test_stored_tensors_of_another_engine_can_be_given() -> None:
    graph, feeds = classifier(), classifier_feeds(1)
    integer = quantize(graph, feeds).graph

    def outputs_only(feed: Mapping[str, np.ndarray]) -> Outputs:
        return reference.run(integer, feed, keep=integer.outputs)

    rows = {row.tensor: row for row in layer_errors(integer, float_runner(graph), feeds, stored=outputs_only)}
    whole = {row.tensor: row for row in layer_errors(integer, float_runner(graph), feeds)}
    assert rows["logits"] == whole["logits"]
    assert rows["stem"].single_db == whole["stem"].single_db
    assert rows["stem"].accumulated_db is None
