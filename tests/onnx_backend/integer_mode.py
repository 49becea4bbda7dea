"""ONNX's own node tests in int8 mode: each is calibrated on its own inputs, run on the machine, and compared with the expected output.

The one big idea: a test's parameters (weights, shapes, indices) are graph inputs, in networks they are constants. So a test is compiled as it
is, and if that needs the host, once more with all inputs but the first as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase

import npucc
from isa.errors import IsaError
from npucc import arithmetic, operators
from npucc.errors import NpuccError
from npucc.frontend.prepare import NUMBERS
from npucc.graph import Graph
from runtime.errors import RuntimeFault
from tests.benchmarks.onnx_backend import by_onnxruntime, data_sets

WANTED = 30.0  # dB
LEAST_SHARE = 0.95  # of the tests
BELOW = Path(__file__).with_name("below_30_db.txt")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
HELD = NUMBERS - {TensorProto.BFLOAT16}
Feed = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """How a test went. `decibels`: of the worst output; infinite where all is exact, −infinite where integers differ. `reason`: why it did not
    run on the NPU alone."""

    name: str
    operators: tuple[str, ...]
    decibels: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason and self.decibels >= WANTED


def on_the_npu() -> frozenset[str]:
    """The operators that the table places on the NPU. Those of models that are quantized already have their own judge: test_quantized_models."""
    return frozenset(row.name for row in operators.table() if row.place not in (operators.HOST, operators.FOLDED) and not _is_quantized(row.name))


def _is_quantized(name: str) -> bool:
    return "Quantize" in name or "QLinear" in name or name.endswith("Integer")


@cache
def folded_operators() -> frozenset[str]:
    """Those that are computed when the model is compiled."""
    return frozenset(row.name for row in operators.table() if row.place == operators.FOLDED and not _is_quantized(row.name))


def claimed(case: TestCase, known: frozenset[str]) -> bool:
    """Whether the test has a float input, operators of the NPU (and constants) only, and types of 8 bits and more, and finite inputs."""
    model = model_of(case)
    names = {node.op_type for node in model.graph.node}
    folded = folded_operators()
    types = [value.type.tensor_type.elem_type for value in model.graph.input]
    held = all(value.type.tensor_type.elem_type in HELD for value in (*model.graph.input, *model.graph.output))
    return held and bool(names & known) and names <= known | folded and any(kind in FLOATS for kind in types) and fits(case)


def fits(case: TestCase) -> bool:
    """Whether integers can hold the test's inputs and the machine its outputs: neither NaN nor infinity goes in, something comes out."""
    model = model_of(case)
    data = [(list(map(_array, inputs)), list(map(_array, outputs))) for inputs, outputs in case.data_sets or data_sets(folder(case), model.graph)]
    finite = all(np.isfinite(each).all() for inputs, _ in data for each in inputs if each.dtype.kind == "f")
    return finite and all(each.size for _, outputs in data for each in outputs)


def model_of(case: TestCase) -> ModelProto:
    """The test's model."""
    return case.model or onnx.load(folder(case) / "model.onnx")


def folder(case: TestCase) -> Path:
    """Where the test's files are."""
    return Path(case.model_dir or "")


def run_in_int8(case: TestCase) -> Result:
    """Compile, run and compare every data set of the test."""
    model = model_of(case)
    names = tuple(dict.fromkeys(node.op_type for node in model.graph.node))
    worst = np.inf
    try:
        for inputs, wanted in case.data_sets or data_sets(folder(case), model.graph):
            feed = {value.name: _array(each) for value, each in zip(model.graph.input, inputs, strict=False)}
            outputs, reason, stored = _outputs(model, feed)
            if reason:
                return Result(case.name, names, -np.inf, reason)
            if moves := bool(stored) and _only_moves(model):
                wanted = _by_onnxruntime(model, stored) or wanted
            worst = min(worst, *(decibels(_array(want), have, exact=moves) for want, have in zip(wanted, outputs, strict=True)))
    except (NpuccError, IsaError, RuntimeFault) as error:
        return Result(case.name, names, -np.inf, error.message)
    except Exception as error:
        return Result(case.name, names, -np.inf, f"{type(error).__name__}: {error}")
    return Result(case.name, names, worst)


@cache
def _moving() -> frozenset[str]:
    return frozenset(row.name for row in operators.table() if row.place == operators.MOVES)


def _only_moves(model: ModelProto) -> bool:
    """Whether results are inputs in other places: operators that move, and no scatter that adds up."""
    nodes = model.graph.node
    return {node.op_type for node in nodes} <= _moving() and not any(each.name == "reduction" for node in nodes for each in node.attribute)


def _by_onnxruntime(model: ModelProto, feed: Feed) -> list[Any]:
    """What moving the values gives; [] where onnxruntime does not have the operator."""
    try:
        return list(by_onnxruntime(model, list(feed.values())))
    except Exception:
        return []


def _outputs(model: ModelProto, feed: Feed) -> tuple[list[Any], str, Feed]:
    """(the outputs, why that needs the host, the inputs as stored in integers; none where computed indices choose between two scales)."""
    reason = ""
    empty = tuple(name for name, value in feed.items() if not value.size)  # they have one possible value
    for constants in (empty, tuple(dict.fromkeys((*empty, *tuple(feed)[1:])))):
        part, rest = with_constants(model, {name: feed[name] for name in constants}), {n: v for n, v in feed.items() if n not in constants}
        try:
            shapes = {name: value.shape for name, value in rest.items() if value.shape}
            package = npucc.compile(part, calibration=[rest], shapes=shapes, quant="scheme=int8")
        except NpuccError as error:
            reason = reason or error.message
            continue
        if not package.host_nodes:
            first, outputs = package.graph.outputs[0], list(package.run(rest).outputs.values())
            if any(node.op == "where" for node in package.graph):
                return outputs, "", {}
            stored = {name: _as_stored(package.graph, name if name in package.graph.inputs else first, value) for name, value in feed.items()}
            return outputs, "", stored
        reason = package.host_nodes[0].reason
    return [], reason, {}


def _as_stored(graph: Graph, name: str, value: Any) -> Any:
    """A float value after rounding to the integers that stand for a tensor of the graph."""
    if value.dtype.kind != "f":
        return value
    quant = graph.quant(name)
    stored = arithmetic.quantize(value.astype(np.float32), quant)
    return np.asarray((stored.astype(np.float32) - np.float32(quant.zero)) * quant.scale, value.dtype)


def with_constants(model: ModelProto, values: Mapping[str, Any]) -> ModelProto:
    """The model with some of its inputs as initializers."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    kept = [value for value in copy.graph.input if value.name not in values]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    return copy


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def decibels(wanted: Any, found: Any, *, exact: bool = False) -> float:
    """Signal over error of the finite values; of integers, truth values and what must be exact infinite if they are equal, else −infinite."""
    if wanted.shape != found.shape:
        return -np.inf
    if wanted.dtype.kind != "f" or exact:
        return np.inf if np.array_equal(wanted, found) else -np.inf
    finite = np.isfinite(wanted)
    signal, error = (float(np.square(each[finite].astype(np.float64)).sum()) for each in (wanted, wanted - found))
    if not error:
        return np.inf
    return 10 * np.log10(signal / error) if signal else -np.inf


def listed() -> dict[str, str]:
    """The tests that are known to stay below, with the reason: `name: reason` per line."""
    lines = (line.partition(": ") for line in BELOW.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))
    return {name: reason for name, _, reason in lines}
