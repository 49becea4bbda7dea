"""Host segments in the machine: what goes over, what comes back, when, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from isa import Program, check, parse_program
from isa.errors import CheckError
from runtime import Machine, RuntimeFault, simulate
from runtime.host import from_host, to_host

Array = np.ndarray[Any, np.dtype[Any]]

TEXT = """
.npu 1
.target t host_latency=1000 dram_latency=10
.memory dram=0x1000
.input "x" s8[2,4] @0x0 scale=0.5 zero=1
.output "y" s8[2,4] @0x100 scale=0.25 zero=-2
.output "n" s64[2] @0x200 scale=1.0 zero=0 type=int64
.layer "host" host nodes="TopK"
  take @0x0:s8[2,4] q=0.5,1
  host segment=3
  give @0x100:s8[2,4] q=0.25,-2
  give @0x200:s64[2] port=1
"""


def program(text: str = TEXT) -> Program:
    return parse_program(text)


def double(segment: int, inputs: Sequence[Array]) -> list[Array]:
    """Twice the input, and the number of the segment with 2**40."""
    return [inputs[0] * np.float32(2), np.array([segment, 2**40])]


def test_values_cross_by_the_stated_formula() -> None:
    check(program())
    x = np.array([[-1, 0, 0.5, 1], [1.5, 100, 63, -64.5]], np.float32)
    for order in ("program", "random"):
        run = Machine(program(), host=double).run({"x": x}, order=order)
        taken = (np.clip(np.rint(x / 0.5) + 1, -128, 127) - 1) * 0.5
        np.testing.assert_array_equal(run.raw["y"], np.clip(np.rint(2 * taken / 0.25) - 2, -128, 127))
        np.testing.assert_array_equal(run.outputs["n"], [3, 2**40])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_raw_tensors_go_over_unchanged(dtype: str) -> None:
    info = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    values = np.array([info.min, info.max, 1], dtype)
    assert to_host(values, 1.0, 0, np.dtype(dtype)).tobytes() == values.tobytes()
    assert from_host(values, 1.0, 0, np.dtype(dtype)).tobytes() == values.tobytes()


def test_conversions_saturate_and_round_to_even() -> None:
    reals = np.array([0.25, 0.75, 1e30, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(from_host(reals, 0.5, 3, np.dtype(np.int8)), [3, 5, 127, -128, 3])
    np.testing.assert_array_equal(from_host(np.array([-5, 300, 2**62]), 1.0, -128, np.dtype(np.int8)), [-128, 127, 127])
    np.testing.assert_array_equal(to_host(np.array([0, 1, 3], np.int8), 0.5, 0, np.dtype(np.int64)), [0, 0, 2])
    np.testing.assert_array_equal(to_host(np.array([0, 1], np.uint8), 1.0, 0, np.dtype(bool)), [False, True])


def test_a_segment_costs_its_latency_and_its_transfers() -> None:
    timeline = simulate(program())
    burst = 2  # 32 bytes at 25.6 per cycle
    assert timeline.total_cycles == (10 + burst) + 1000 + 2 * (10 + burst)  # take, host, give, give
    assert timeline.layers[0].work.dram_read_bytes == 8
    assert timeline.layers[0].work.dram_write_bytes == 8 + 16


def test_a_machine_without_a_host_says_so() -> None:
    with pytest.raises(RuntimeFault, match="the program has host segment 3, but the machine has no host"):
        Machine(program()).run({"x": np.zeros((2, 4), np.float32)})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([np.zeros((2, 4), np.float32)], "the last segment has 1 outputs"),
        ([np.zeros((4, 2), np.float32), np.zeros(2, np.int64)], r"shape \[4, 2\], but the program holds \[2, 4\]"),
    ],
)
def test_results_that_do_not_fit_are_refused(results: list[Array], message: str) -> None:
    with pytest.raises(RuntimeFault, match=message):
        Machine(program(), host=lambda *_: results).run({"x": np.zeros((2, 4), np.float32)})


def test_gaps_between_ports_are_refused() -> None:
    with pytest.raises(RuntimeFault, match="is given inputs"):
        Machine(program(TEXT.replace("q=0.5,1", "port=1 q=0.5,1")), host=double).run({"x": np.zeros((2, 4), np.float32)})


def test_the_checker_orders_the_host_with_the_other_queues() -> None:
    racing = TEXT + "  ld %0x0:s8[2,4], @0x100:s8[2,4]\n"
    with pytest.raises(CheckError, match="no event orders the ld queue after the host queue"):
        check(program(racing))
    check(program(TEXT.replace("q=0.25,-2\n", "q=0.25,-2 signal=ld.0\n") + "  ld %0x0:s8[2,4], @0x100:s8[2,4] wait=host.0\n"))
    with pytest.raises(CheckError, match="nothing has written"):
        check(program(TEXT.replace("take @0x0", "take @0x400")))
