"""Made-up inputs: what they are where the model tells nothing, and that its batch normalizations choose them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import npucc
from npucc.feeds import Port, synthetic_feeds
from npucc.frontend import import_model
from npucc.quantize.made_up import Kind, feeds_of, made_up
from tests.npucc.onnx_models import model, node, normal

IMAGE = (1, 3, 24, 24)
PORT = Port("x", IMAGE, "float32")


def trained_on(kind: Kind) -> onnx.ModelProto:
    """Convolution and batch normalization, whose statistics are those of inputs of a kind."""
    weights = normal(6, 3, 3, 3)
    nodes = [node("Conv", "x w", "c"), node("BatchNormalization", "c s b m v", "y")]
    plain = {"w": weights, "s": np.ones(6, np.float32), "b": np.zeros(6, np.float32), "m": np.zeros(6, np.float32), "v": np.ones(6, np.float32)}
    values = [feed["x"] for feed in feeds_of(kind, [PORT], 32)]
    windows = np.stack([np.lib.stride_tricks.sliding_window_view(value[0], (3, 3), axis=(1, 2)) for value in values])
    results = np.einsum("nchwij,ocij->onhw", windows, weights).reshape(6, -1)
    statistics = {"m": results.mean(axis=1).astype(np.float32), "v": results.var(axis=1).astype(np.float32)}
    return model(nodes, {"x": IMAGE}, ["y"], {**plain, **statistics})


@pytest.mark.parametrize("kind", [Kind(1.5, 64.0, 128.0), Kind(0.0, 0.5, 0.0), Kind(2.0, 0.25, 0.5)])
def test_normalizations_tell_scale_and_offset_of_inputs(kind: Kind) -> None:
    found, wanted = (np.stack([feed["x"] for feed in feeds]) for feeds in (made_up(import_model(trained_on(kind))), feeds_of(kind, [PORT], 8)))
    assert abs(found.mean() - wanted.mean()) < 0.1 * wanted.std()
    assert 0.8 < found.std() / wanted.std() < 1.25


def test_a_compiled_model_covers_the_values_it_was_trained_on() -> None:
    package = npucc.compile(trained_on(Kind(1.5, 64.0, 128.0)))
    (record,) = package.program.inputs
    assert package.calibration == "synthetic"
    assert 255 <= 255 * float(record.scale) < 1000


def test_without_normalizations_they_are_random_numbers() -> None:
    found = made_up(import_model(model([node("Relu", "x", "y")], {"x": IMAGE}, ["y"])))
    for feed, wanted in zip(found, synthetic_feeds([PORT], count=len(found)), strict=True):
        np.testing.assert_array_equal(feed["x"], wanted["x"])
