"""Compile time grows with the number of nodes, not with its square; tests/benchmarks/scaling.py measures up to 5,000."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto

from tests.benchmarks.scaling import SHAPES, chain, seconds

FEW, FACTOR = 80, 8


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.__name__))
def test_time_is_linear(shape: Callable[[int], ModelProto]) -> None:
    quick = {"quant": "int8,method=minmax,bias_samples=0"}  # what is done for each tensor alone can't grow faster
    seconds(chain(8), **quick)
    few, many = min(seconds(shape(FEW), **quick) for _ in range(2)), seconds(shape(FEW * FACTOR), **quick)
    assert many < 3 * FACTOR * few
