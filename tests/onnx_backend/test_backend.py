"""ONNX's own backend tests in float mode: a fixed subset of them; tests/benchmarks/onnx_backend.py runs all."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper as h

from npucc import backend
from npucc.errors import ImportModelError
from tests.benchmarks.onnx_backend import by_npucc, by_onnxruntime, cases_of, run_case

EVERY = 16  # one of so many node tests runs here
#: what the machine can't hold
EXCLUDED = (
    "string", "sequence", "optional", "strnorm", "_seq", "_opt", "regex", "label_encoder", "_empty", "zero", "size_one",
    "bfloat16", "float8", "int4", "float4",
)  # fmt: skip


def cases() -> list[Any]:
    found = [case for case in cases_of("node", "") if not any(word in case.name for word in EXCLUDED)]
    return sorted(found, key=lambda case: str(case.name))[::EVERY]


@pytest.mark.filterwarnings("ignore")
def test_passes_what_onnxruntime_passes() -> None:
    chosen = cases()
    assert len(chosen) > 80
    failures = {case.name: reason for case in chosen if not run_case(case, by_onnxruntime) and (reason := run_case(case, by_npucc))}
    assert failures == {}


def test_a_wrong_result_is_found() -> None:
    (case,) = cases_of("node", "^test_abs$")
    assert run_case(case, by_npucc) == ""
    assert "another result" in run_case(case, lambda _, inputs: [inputs[0]])


def test_run_node() -> None:
    x = np.array([3.0, 1.0, 2.0], np.float32)
    values, places = backend.run_node(h.make_node("TopK", ["x", "k"], ["v", "i"]), [x, np.array([2])])
    np.testing.assert_array_equal(values, [3, 2])
    np.testing.assert_array_equal(places, [0, 2])


def test_a_prepared_model_takes_several_shapes() -> None:
    port = h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])
    graph = h.make_graph([h.make_node("Neg", ["x"], ["y"])], "g", [port], [h.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 2])])
    model = backend.prepare(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)]))
    for size in (1, 3, 3):
        x = np.arange(2 * size, dtype=np.float32).reshape(size, 2)
        (y,) = model.run([x])
        np.testing.assert_array_equal(y, -x)


def test_only_the_cpu() -> None:
    assert backend.supports_device("CPU")
    assert not backend.supports_device("CUDA")


def test_strings_are_refused() -> None:
    port = h.make_tensor_value_info("x", onnx.TensorProto.STRING, [1])
    graph = h.make_graph([h.make_node("Identity", ["x"], ["y"])], "g", [port], [h.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])])
    with pytest.raises(ImportModelError, match="element type STRING"):
        backend.run_model(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)]), [np.array(["a"], object)])
