"""The compiled engine: chosen as asked, at work where it should be, and the same bytes as numpy (which `execute` compares)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import runtime
from runtime import Machine, RuntimeFault, kernels
from runtime.site import Site
from tests.runtime.harness import INSTALLED, execute, integers
from tests.runtime.test_machine import conv_program

needs_numba = pytest.mark.skipif("numba" not in INSTALLED, reason="numba is not installed: there is no compiled engine to compare")


def test_the_engine_is_chosen_by_argument_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "numpy")
    assert kernels.kernels_of() is kernels.KERNELS
    monkeypatch.setenv(kernels.VARIABLE, "abacus")
    with pytest.raises(RuntimeFault, match=r"unknown engine 'abacus'.*\n?.*numpy, numba"):
        kernels.kernels_of()
    assert kernels.kernels_of("numpy") is kernels.KERNELS


def test_without_numba_numpy_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    for name in ("fast", "native"):
        monkeypatch.delitem(sys.modules, f"runtime.{name}", raising=False)
        monkeypatch.delattr(runtime, name, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kernels.kernels_of() is kernels.KERNELS
    with pytest.raises(RuntimeFault, match=r"'numba' cannot be used: .*\n?.*npucc\[fast\]"):
        kernels.kernels_of("numba")


@needs_numba
def test_a_program_gives_the_same_bytes() -> None:
    built, constants, _ = conv_program()
    image = np.random.default_rng(0).normal(size=built.inputs[0].tile.shape).astype(np.float32)
    runs = [Machine(built, constants, engine=engine).run({"image": image}, dump=True) for engine in INSTALLED]
    for name in runs[0].tensors:
        assert (runs[0].tensors[name] == runs[1].tensors[name]).all()
    assert runs[0].raw.keys() == runs[1].raw.keys()
    assert all((runs[0].raw[name] == runs[1].raw[name]).all() for name in runs[0].raw)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """By instruction, whether the compiled engine took each one that was bound."""
    from runtime import fast

    found: dict[str, list[bool]] = {}

    def watched(name: str, bind: Callable[[Site], Any]) -> Callable[[Site], Any]:
        def bind_and_note(site: Site) -> Any:
            run = bind(site)
            found.setdefault(name, []).append(run is not None)
            return run

        return bind_and_note

    monkeypatch.setattr(fast, "KERNELS", {name: watched(name, bind) for name, bind in fast.KERNELS.items()})
    return found


@needs_numba
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 13])
@pytest.mark.parametrize("columns", [1, 16, 17, 40, 63, 64, 65, 130])
def test_products_of_every_size(rows: int, columns: int, bound: dict[str, list[bool]]) -> None:
    """Blocks of 6 rows and 64 columns, with all that can be left over; sums far beyond what float32 holds, up to the wrap in 32 bits."""
    from runtime import fast

    rng = np.random.default_rng(rows * columns)
    for depth in (1, 4, 7):
        a, b = integers(rng, (rows, depth)), integers(rng, (depth, columns))
        bias = rng.integers(-(2**31), 2**31, columns).astype(np.int32)
        expected = (a.astype(np.int64) - 5) @ (b.astype(np.int64) + 3)
        for constant in ((), ("b", "c")):
            found = execute("matmul", {"a": a, "b": b, "c": bias}, result=((rows, columns), "s32"), gap=3, constant=constant, za=5, zb=-3)
            assert (found == (expected + bias).astype(np.int32)).all()
            before = rng.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
            attributes: dict[str, Any] = {"za": 5, "zb": -3, "accumulate": 1}
            found = execute("matmul", {"a": a, "b": b}, result=((rows, columns), "s32"), before=before, constant=constant[:1], **attributes)
            assert (found == (expected + before).astype(np.int32)).all()
    assert bound["matmul"] == [fast.HAS_PRODUCTS] * 12


@needs_numba
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 4), (1, 7)])
def test_windows_of_every_kind(
    stride: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, int], products: bool, bound: dict[str, list[bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the processor's dot products, and without: then depthwise convolutions are plain loops, the others numpy's."""
    from runtime import fast

    monkeypatch.setattr(fast, "HAS_PRODUCTS", fast.HAS_PRODUCTS and products)
    rng = np.random.default_rng(sum(kernel) + stride[1])
    pad = (1, 2, 2, 0)
    size = [15 + pad[axis] + pad[axis + 2] - (kernel[axis] - 1) * dilation[axis] - 1 for axis in (0, 1)]
    outputs = [size[axis] // stride[axis] + 1 for axis in (0, 1)]
    x, bias = integers(rng, (15, 15, 19)), rng.integers(-9999, 9999, 19).astype(np.int32)
    attributes: dict[str, Any] = {"stride": stride, "dilation": dilation, "pad": pad, "zero": -7}
    for gap in (0, 2):
        for constant in ((), ("w", "b")):
            w = integers(rng, (*kernel, 19, 19))
            execute("conv", {"x": x, "w": w, "b": bias}, result=((*outputs, 19), "s32"), gap=gap, constant=constant, **attributes)
            w = integers(rng, (*kernel, 19))
            execute("dwconv", {"x": x, "w": w, "b": bias}, result=((*outputs, 19), "s32"), gap=gap, constant=constant, **attributes)
    assert bound["dwconv"] == [True] * 4
    assert bound["conv"] == [fast.HAS_PRODUCTS] * 4


@needs_numba
@pytest.mark.parametrize("name", ["conv", "dwconv"])
def test_inputs_larger_than_what_the_windows_read(name: str, bound: dict[str, list[bool]]) -> None:
    """What lies beyond the last window is not copied: there is no room for it."""
    from runtime import fast

    rng = np.random.default_rng(0)
    for size in ((4, 400), (400, 4)):
        for stride in ((1, 1), (2, 2)):
            x, w = integers(rng, (*size, 16)), integers(rng, (1, 1, 16, 16)[: 4 if name == "conv" else 3])
            found = execute(name, {"x": x, "w": w}, result=((2, 2, 16), "s32"), stride=stride)
            seen = x[: 2 * stride[0] : stride[0], : 2 * stride[1] : stride[1]].astype(np.int64)
            assert (found == (seen @ w[0, 0] if name == "conv" else seen * w[0, 0])).all()
    assert bound[name] == [fast.HAS_PRODUCTS or name == "dwconv"] * 4


@needs_numba
def test_the_vector_engine_is_compiled(bound: dict[str, list[bool]]) -> None:
    rng = np.random.default_rng(0)
    a, b, sums = integers(rng, (9, 70)), integers(rng, (9, 70)), rng.integers(-(2**31), 2**31, (4, 5, 33)).astype(np.int32)
    scales = (rng.random(33) * 1e-7).astype(np.float32)
    for gap in (0, 5):
        execute("add", {"a": a, "b": b}, result=((9, 70), "s8"), gap=gap, qa=(0.1, 3), qb=(0.2, -4), qy=(0.3, 5))
        execute("lut", {"x": a, "t": integers(rng, (256,))}, result=((9, 70), "s8"), gap=gap, constant=("t",), base=-128)
        execute("cvt", {"x": np.array(5, np.int8)}, result=((), "s8"))
        execute("requant", {"a": sums, "s": scales}, result=((4, 5, 33), "s8"), gap=gap, constant=("s",), zero=-9, clamp=(-100, 90))
    assert bound == {"add": [True] * 2, "lut": [True] * 2, "requant": [True] * 2, "cvt": [True] * 2}


@needs_numba
def test_sixteen_bits_are_compiled(bound: dict[str, list[bool]]) -> None:
    """Everything of one operand of 16 bits, or with such a result: the whole range, ties and saturation among it."""
    rng = np.random.default_rng(0)
    words, codes = integers(rng, (256, 256), "s16"), integers(rng, (256, 256))
    words.flat[: 1 << 16] = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
    sums, scales = rng.integers(-(2**31), 2**31, (4, 5, 33)).astype(np.int32), (rng.random(33) * 1e-4).astype(np.float32)
    for gap in (0, 6):
        for source, result in ((words, "s8"), (words, "s16"), (codes, "s16")):
            execute("cvt", {"x": source}, result=((256, 256), result), gap=gap, qx=(0.5, 3), qy=(1.0, -4))
        execute("lut", {"x": codes, "t": integers(rng, (256,), "s16")}, result=((256, 256), "s16"), gap=gap, constant=("t",), base=-128)
        execute("requant", {"a": sums, "s": scales}, result=((4, 5, 33), "s16"), gap=gap, constant=("s",), zero=-9, clamp=(-32768, 30000))
    assert bound == {"cvt": [True] * 6, "lut": [True] * 2, "requant": [True] * 2}
