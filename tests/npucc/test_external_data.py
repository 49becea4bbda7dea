"""Weights stored outside the model: read when they are needed, and in memory once."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx

from npucc.frontend import import_model
from npucc.frontend.load import load_model
from npucc.signature import ports_of_model
from tests.npucc.onnx_models import assert_agrees, model, node, normal

LAYERS, SIZE = 6, 700


def saved(folder: Path) -> Path:
    """Six layers of two megabytes, in one file next to the model."""
    nodes = [node("MatMul", f"h{i} w{i}", f"h{i + 1}") for i in range(LAYERS)]
    proto = model(nodes, {"h0": (1, SIZE)}, [f"h{LAYERS}"], {f"w{i}": normal(SIZE, SIZE, seed=i) / np.float32(SIZE**0.5) for i in range(LAYERS)})
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return folder / "m.onnx"


def test_weights_are_never_twice_in_memory(tmp_path: Path) -> None:
    path, stored = saved(tmp_path), 4 * LAYERS * SIZE**2
    assert load_model(path)[0].ByteSize() < 5000
    assert ports_of_model(path)["h0"] is not None
    tracemalloc.start()
    graph = import_model(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored <= sum(tensor.data.nbytes for tensor in graph.tensors.values() if tensor.data is not None)
    assert stored <= peak < 1.4 * stored


def test_they_are_the_same_weights(tmp_path: Path) -> None:
    path = saved(tmp_path)
    inside = assert_agrees(onnx.load(path))
    for name, tensor in import_model(path).tensors.items():
        if tensor.data is not None:
            np.testing.assert_array_equal(tensor.data, inside.tensors[name].data)
