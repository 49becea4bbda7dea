"""Whole numbers: what is computed with them is exact, in 8 bits and in 16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import npucc
from npucc.backend import prepare
from tests.npucc.onnx_models import model, node, run

RANGES = {"uint8": (0, 200), "int32": (-5000, 5000), "int64": (0, 30_000)}
OPERATIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("Div", 7, {}), ("Div", -5, {}), ("Div", 1, {}), ("Mod", 7, {}), ("Mod", -256, {}), ("Mod", 7, {"fmod": 1}),
    ("BitShift", 3, {"direction": "LEFT"}), ("BitShift", 3, {"direction": "RIGHT"}),
    ("BitwiseAnd", 90, {}), ("BitwiseOr", 15, {}), ("BitwiseXor", 85, {}), ("BitwiseNot", 0, {}),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "number", "attributes"), OPERATIONS, ids=str)
@pytest.mark.parametrize("dtype", RANGES)
def test_integers_stay_exact(operator: str, number: int, attributes: dict[str, Any], dtype: str) -> None:
    if (number < 0 and dtype == "uint8") or (operator == "BitShift" and dtype != "uint8"):
        return  # onnxruntime shifts unsigned integers only
    inputs = "x" if operator == "BitwiseNot" else "x m"
    constants = {"m": np.asarray(number, dtype)}
    proto = model([node(operator, inputs, "y", **attributes)], {"x": [64]}, ["y"], constants, opset=18, dtypes={"x": dtype, "y": dtype})
    feeds = [{"x": np.random.default_rng(seed).integers(*RANGES[dtype], 64).astype(dtype)} for seed in range(4)]
    package = npucc.compile(proto, calibration=feeds, host=False)
    proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 64
    real = prepare(proto)
    for feed in feeds:
        (wanted,) = run(proto, feed)
        assert np.array_equal(package.run(feed).outputs["y"], wanted)
        assert np.array_equal(real.run([feed["x"]])[0], wanted)


def test_any_and_all_of_booleans() -> None:
    nodes = [node("ReduceMax", "x axes", "any", keepdims=0), node("ReduceMin", "x axes", "all")]
    dtypes = dict.fromkeys(("x", "any", "all"), "bool")
    proto = model(nodes, {"x": [8, 3]}, ["any", "all"], {"axes": np.array([1])}, opset=20, dtypes=dtypes)
    feed = {"x": np.array([[bool(number >> bit & 1) for bit in range(3)] for number in range(8)])}
    found = npucc.compile(proto, calibration=[feed], host=False).run(feed).outputs
    assert np.array_equal(found["any"], feed["x"].any(axis=1))
    assert np.array_equal(found["all"], feed["x"].all(axis=1, keepdims=True))


def test_a_computed_divisor_is_left_to_the_host() -> None:
    proto = model([node("Div", "x z", "y")], {"x": [4], "z": [4]}, ["y"], dtypes={"x": "int64", "z": "int64", "y": "int64"})
    feeds = [{"x": np.arange(100, 104), "z": np.array([3, 7, 9, seed + 2])} for seed in range(4)]
    package = npucc.compile(proto, calibration=feeds)
    assert [each.op for each in package.graph] == ["host"]
    assert np.array_equal(package.run(feeds[0]).outputs["y"], [33, 14, 11, 51])


@pytest.mark.parametrize(("mode", "start"), [("linear", [2, 0]), ("circular", [5, 3])])
def test_a_cache_is_written_at_a_computed_position(mode: str, start: list[int]) -> None:
    nodes = [node("TensorScatter", "cache new at", "y", mode=mode), node("TensorScatter", "cache new", "z")]
    shapes = {"cache": (2, 3, 6, 4), "new": (2, 3, 2, 4), "at": (2,)}
    proto = model(nodes, shapes, ["y", "z"], opset=24, dtypes={"at": "int64"})
    random = np.random.default_rng(0)
    feeds: list[dict[str, np.ndarray]] = []
    for _ in range(6):
        feeds.append({name: random.normal(size=shapes[name]).astype(np.float32) for name in ("cache", "new")} | {"at": random.integers(0, 5, 2)})
    found = npucc.compile(proto, calibration=feeds, host=False).run(feeds[0] | {"at": np.array(start)}).outputs
    wanted = {name: feeds[0]["cache"].copy() for name in ("y", "z")}
    for batch, first in enumerate(start):
        wanted["y"][batch][:, [(first + step) % 6 for step in range(2)]] = feeds[0]["new"][batch]
    wanted["z"][:, :, :2] = feeds[0]["new"]
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() < 0.03
