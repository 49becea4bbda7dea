"""Logarithms of powers, as audio networks take them: small values matter as much as large ones."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto

import npucc
from npucc import arithmetic, reference
from npucc.graph import Quant

from .onnx_models import model, node, normal, run

SHAPE = (1, 4, 16, 16)


def mel_model() -> ModelProto:
    nodes = [node("Mul", "x x", "power"), node("Conv", "power w", "mel"), node("Add", "mel eps", "kept"), node("Log", "kept", "y")]
    return model(nodes, {"x": SHAPE}, ["y"], {"w": np.abs(normal(6, 4, 1, 1, seed=1)), "eps": np.float32(1e-6)})


def amplitude_model() -> ModelProto:
    """The logarithm of the square of a root of a sum of squares, as exporters leave it."""
    nodes = [
        node("Mul", "x x", "squares"), node("ReduceSum", "squares axes", "sum", keepdims=1), node("Sqrt", "sum", "root"),
        node("Pow", "root two", "power"), node("Add", "power eps", "kept"), node("Log", "kept", "y"),
    ]  # fmt: skip
    return model(nodes, {"x": SHAPE}, ["y"], {"axes": np.array([1]), "two": np.float32(2), "eps": np.float32(1e-6)})


@pytest.mark.parametrize(("proto", "spread", "least"), [(mel_model(), 1.0, 22), (amplitude_model(), 1.5, 30)])
def test_small_powers_keep_their_logarithm(proto: ModelProto, spread: float, least: float) -> None:
    random = np.random.default_rng(0)
    feeds = [{"x": (random.standard_normal(SHAPE) * np.exp(spread * random.standard_normal(SHAPE) - 3)).astype(np.float32)} for _ in range(6)]
    package = npucc.compile(proto, target="tiny", calibration=feeds[:4])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(package.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])
    for feed in feeds[4:]:
        result = package.run(feed)
        np.testing.assert_array_equal(result.raw["y"], reference.run(package.graph, feed)["y"])
        np.testing.assert_array_equal(result.outputs["y"], session.run(None, feed)[0])
        wanted = run(proto, feed)[0]
        assert 10 * np.log10(np.sum(wanted**2) / np.sum((result.outputs["y"] - wanted) ** 2)) > least


@pytest.mark.parametrize(("dtype", "steps"), [("s16", 32), ("s8", 1)])
def test_a_table_is_exact_where_a_line_is_not(dtype: str, steps: int) -> None:
    source = Quant("s16", np.asarray(1e-4, np.float32), -(2**15))
    result = Quant(dtype, np.asarray(14 / (2**16 if dtype == "s16" else 2**8), np.float32), 0)
    x = np.arange(-(2**15), 2**15)
    exact = arithmetic.quantize(np.log(np.maximum((x + 2**15) * np.float32(1e-4), np.float32(1e-3))), result)
    values = arithmetic.table(("log", ("max", "x", 1e-3)), source, result)
    found = np.rint(values.at(x) * 2.0**-values.fraction_bits)
    assert values.missing is not None
    assert np.abs(found - exact).max() <= steps
    assert arithmetic.table(("sigmoid", "x"), source, result).missing is None
