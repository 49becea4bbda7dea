"""ONNX's own backend tests in float mode: a fixed subset of them; tests/benchmarks/onnx_backend.py runs all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper as h

import npucc
from npucc import backend
from npucc.errors import NotHeldError
from tests.benchmarks.onnx_backend import KINDS, by_npucc, by_onnxruntime, cases_of, run_case

EVERY = 20  # one of so many tests runs here
#: test kind → the least number of these that onnxruntime passes, whatever its version
LEAST = {"node": 60, "simple": 1, "pytorch-converted": 2, "pytorch-operator": 1, "light": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_passes_what_onnxruntime_passes(kind: str) -> None:
    """Nothing is excluded."""
    found = sorted(cases_of(kind, "" if kind != "light" else "squeezenet"), key=lambda case: str(case.name))[::EVERY]
    passed = [case for case in found if not run_case(case, by_onnxruntime)]
    failures = {case.name: reason for case in passed if (reason := run_case(case, by_npucc))}
    assert failures == {}
    assert len(passed) >= LEAST[kind]


@pytest.mark.filterwarnings("ignore")  # of the cases as they are collected
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


def test_strings_run_on_the_host_and_have_no_package() -> None:
    port = h.make_tensor_value_info("x", onnx.TensorProto.STRING, [1])
    graph = h.make_graph([h.make_node("Identity", ["x"], ["y"])], "g", [port], [h.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)])
    prepared = backend.prepare(model)
    assert prepared.run([np.array(["a"], object)])[0].tolist() == ["a"]
    assert prepared.package is None
    with pytest.raises(NotHeldError, match="element type STRING"):
        npucc.compile(model, quant="none")
