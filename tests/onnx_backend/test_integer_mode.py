"""ONNX's own node tests in int8 mode: one per operator of the NPU, and those that are listed as staying below; the benchmark runs all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from onnx.backend.test.case.test_case import TestCase

from npucc import operators
from npucc.errors import NpuccError
from tests.benchmarks.onnx_backend import cases_of, data_sets
from tests.onnx_backend import integer_mode

#: operators of the NPU without such a test, as ONNX has none with a float input, none that integers can hold, or only listed ones
UNTESTED = frozenset(f"Bitwise{name}" for name in ("And", "Not", "Or", "Xor")) | frozenset(
    {"And", "BitShift", "Cast", "CastLike", "Equal", "GlobalLpPool", "If", "Loop", "Mod", "Not", "Or", "Round", "Trilu", "Xor"}
)


@cache
def cases() -> tuple[TestCase, ...]:
    """The tests of single operators of the NPU with float inputs, smallest first."""
    known = integer_mode.on_the_npu()
    single = [case for case in cases_of("node", "") if len(integer_mode.model_of(case).graph.node) == 1 and integer_mode.claimed(case, known)]
    return tuple(sorted(single, key=lambda case: (elements(case), case.name)))


def elements(case: TestCase) -> int:
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in integer_mode.model_of(case).graph.input]
    return sum(map(math.prod, shapes))


@pytest.mark.filterwarnings("ignore")
def test_every_operator_of_the_npu_reaches_30_db() -> None:
    below = integer_mode.listed()
    chosen: dict[str, TestCase] = {}
    for case in cases():
        if case.name not in below:
            chosen.setdefault(integer_mode.model_of(case).graph.node[0].op_type, case)
    results = [integer_mode.run_in_int8(case) for case in chosen.values()]
    assert [result for result in results if not result.passed] == []
    assert {name for name in integer_mode.on_the_npu() if "." not in name} - set(chosen) == UNTESTED


@pytest.mark.filterwarnings("ignore")
def test_what_is_listed_stays_below() -> None:
    """A listed test that passes has to leave the list."""
    below = integer_mode.listed()
    found = {case.name: case for case in cases_of("node", "|".join(f"^{name}$" for name in below))}
    assert set(found) == set(below), "names that no test has"
    assert [name for name, case in found.items() if integer_mode.run_in_int8(case).passed] == []
    assert all(below.values()), "a reason for each"


@pytest.mark.filterwarnings("ignore")
def test_what_is_said_to_run_on_the_host_does() -> None:
    rows = {row.name: row.place for row in operators.table()}
    surprises = [name for name, places in _placed(rows) if operators.HOST not in places]
    assert surprises == []


def _placed(rows: dict[str, str]) -> Iterator[tuple[str, set[str]]]:
    """(operator, where its nodes are placed) of tests of operators that the table places on the host."""
    for case in cases_of("node", ""):
        model = integer_mode.model_of(case)
        if [rows.get(node.op_type) for node in model.graph.node] != [operators.HOST] or model.graph.node[0].domain:
            continue
        inputs, _ = next(iter(case.data_sets or data_sets(integer_mode.folder(case), model.graph)))
        shapes = {value.name: np.shape(each) for value, each in zip(model.graph.input, inputs, strict=False) if hasattr(each, "shape")}
        try:
            yield model.graph.node[0].op_type, {row.place for row in operators.place(model, {n: s for n, s in shapes.items() if s})}
        except NpuccError:
            continue


def test_a_wrong_result_is_found() -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    assert integer_mode.decibels(x, x + np.float32(0.1)) < integer_mode.WANTED < integer_mode.decibels(x, x + np.float32(0.001))
    assert integer_mode.decibels(np.arange(3), np.array([0, 1, 3])) == -np.inf
