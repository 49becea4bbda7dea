"""Weights stored outside the model: read when they are needed, and in memory once."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest

from npucc import segments
from npucc.export import to_onnx
from npucc.frontend import import_model, import_whole
from npucc.frontend.load import load_model
from npucc.quantize.calibrate import float_session
from npucc.signature import ports_of_model
from runtime.errors import RuntimeFault
from tests.npucc.onnx_models import assert_agrees, model, node, normal

LAYERS, SIZE = 6, 700


def saved(folder: Path) -> Path:
    """Six layers of two megabytes, in one file next to the model."""
    nodes = [node("MatMul", f"h{i} w{i}", f"h{i + 1}") for i in range(LAYERS)]
    proto = model(nodes, {"h0": (1, SIZE)}, [f"h{LAYERS}"], {f"w{i}": normal(SIZE, SIZE, seed=i) / np.float32(SIZE**0.5) for i in range(LAYERS)})
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return folder / "m.onnx"


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    path, stored = saved(tmp_path), 4 * LAYERS * SIZE**2
    assert load_model(path)[0].ByteSize() < 5000
    assert ports_of_model(path)["h0"] is not None
    tracemalloc.start()
    graph = import_model(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored <= sum(tensor.data.nbytes for tensor in graph.tensors.values() if tensor.data is not None)
    assert peak < 0.2 * stored, "the file is mapped"


def test_float_mode_holds_them_once(tmp_path: Path) -> None:
    """As bytes of the segment; its shapes are read without a copy."""
    path, stored = saved(tmp_path), 4 * LAYERS * SIZE**2
    tracemalloc.start()
    (host,) = segments.host_nodes(import_whole(path))
    content = segments.attributes_of(host).model
    assert segments.outline_of(content).ByteSize() < 5000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored <= len(content) <= peak < 1.4 * stored
    feed = normal(1, SIZE)
    np.testing.assert_array_equal(segments.run(content, [feed])[0], segments.run(onnx.load(path).SerializeToString(), [feed])[0])
    for end in (1, 30, len(content) // 2, len(content) - 1):
        with pytest.raises(RuntimeFault, match="no ONNX model"):
            segments.outline_of(content[:end])


def test_onnxruntime_can_take_weights_that_are_no_part_of_the_model(tmp_path: Path) -> None:
    graph, feed = import_model(saved(tmp_path)), {"h0": normal(1, SIZE)}
    apart: dict[str, np.ndarray] = {}
    assert to_onnx(graph, apart=apart).ByteSize() < 5000
    assert sorted(apart) == [f"w{i}" for i in range(LAYERS)]
    session = float_session(to_onnx(graph, apart=apart), apart)
    whole = segments.run(to_onnx(graph).SerializeToString(), [feed["h0"]])
    np.testing.assert_array_equal(session.run(None, feed)[0], whole[0])


def test_they_are_the_same_weights(tmp_path: Path) -> None:
    path = saved(tmp_path)
    inside = assert_agrees(onnx.load(path))
    for name, tensor in import_model(path).tensors.items():
        if tensor.data is not None:
            np.testing.assert_array_equal(tensor.data, inside.tensors[name].data)
