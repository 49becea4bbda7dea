"""The vector engine against plain Python arithmetic: float32 one operation at a time, integers as Python ints, exact fractions for fused steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import RuntimeFault
from runtime.kernels_elementwise import fused_multiply_add
from tests.runtime.harness import Array, execute, integers, limits

SETTINGS = settings(max_examples=60, deadline=None)
F = np.float32
seeds = st.integers(0, 2**32)
scales = st.one_of(st.sampled_from([0.5, 0.25, 1.0, 0.125, 1.5]), st.floats(2.0**-13, 10.0, width=32))
zeros = st.integers(-128, 127)


def round_half_even(value: Any) -> int:
    """rint of a float32, with Python's exact rational arithmetic."""
    return round(Fraction(float(value)))


def saturate(value: int, dtype: str, clamp: tuple[int, int] = (-128, 127)) -> int:
    low, high = (0, 255) if dtype == "u8" else limits(dtype)
    if clamp != (-128, 127):
        low, high = max(low, clamp[0]), min(high, clamp[1])
    return min(max(value, low), high)


def quantized(value: Any, scale: float, zero: int, dtype: str = "s8", clamp: tuple[int, int] = (-128, 127)) -> int:
    with np.errstate(all="ignore"):
        steps = F(value) / F(scale)
    if np.isnan(steps):
        return saturate(zero, dtype, clamp)
    if np.isinf(steps):
        return saturate(10**30 if steps > 0 else -(10**30), dtype, clamp)
    return saturate(round_half_even(steps) + zero, dtype, clamp)


def real(stored: Any, scale: float, zero: int) -> Any:
    return F(F(int(stored) - zero) * F(scale))


# ---- requant -----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(
    st.sampled_from([(1, 7), (3, 2, 5), (9, 300), (4,), (2, 3, 1100)]),
    scales,
    st.integers(-128, 127),
    st.sampled_from([(-128, 127), (-20, 90), (0, 127)]),
    st.sampled_from(["s8", "s16"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 3]),
    seeds,
)
def test_requant(
    shape: tuple[int, ...], scale: float, zero: int, clamp: tuple[int, int], dtype: str, per_channel: bool, constant: bool, gap: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a = np.where(rng.random(shape) < 0.7, rng.integers(-600, 600, shape), rng.integers(-(2**31), 2**31, shape)).astype(np.int32)
    factors = (F(scale) * rng.choice(np.array([1.0, 0.5, 0.01], F), shape[-1])).astype(F)
    operands = {"a": a, "s": factors} if per_channel else {"a": a}
    got = execute(
        "requant",
        operands,
        result=(shape, dtype),
        gap=gap,
        constant=("s",) if constant and per_channel else (),
        scale=float(F(scale)),
        zero=zero,
        clamp=clamp,
    )
    each = np.broadcast_to(factors if per_channel else F(scale), shape)
    expected = [
        saturate(round_half_even(F(value) * factor) + zero, dtype, clamp)
        for value, factor in zip(a.reshape(-1).tolist(), each.reshape(-1), strict=True)
    ]
    assert got.reshape(-1).tolist() == expected


def test_requant_rounds_half_to_even_and_adds_the_zero_point_after() -> None:
    a = np.array([[1, 3, 5, -1, -3, -5, 2**31 - 1, -(2**31)]], np.int32)
    assert execute("requant", {"a": a}, result=(a.shape, "s8"), scale=0.5).tolist() == [[0, 2, 2, 0, -2, -2, 127, -128]]
    assert execute("requant", {"a": a}, result=(a.shape, "s8"), scale=0.5, zero=1).tolist() == [[1, 3, 3, 1, -1, -1, 127, -128]]


def test_requant_by_scales_that_are_not_finite() -> None:
    """NaN is stored as the zero point, infinities saturate."""
    a = np.arange(-50, 50, dtype=np.int32).reshape(1, 100)
    bad = np.array([np.nan, np.inf, -np.inf, 1.0] * 25, F)
    got = execute("requant", {"a": a, "s": bad}, result=(a.shape, "s8"), zero=5)
    with np.errstate(all="ignore"):
        expected = [quantized(value, 1.0, 5) for value in (a.astype(F) * bad).reshape(-1)]
    assert got.reshape(-1).tolist() == expected


@pytest.mark.parametrize("constant", [(), ("s",)])
@pytest.mark.parametrize("scale", [1e30, 3e38, np.inf])
def test_scales_without_measure_saturate(scale: float, constant: tuple[str, ...]) -> None:
    """In fp32.rne products may leave the range of float32, without a warning; nothing times infinity becomes the zero point."""
    sums_there = np.array([[2**31 - 1, 1, 0, -1, -(2**31)]], np.int32)
    operands = {"a": sums_there, "s": np.full(5, scale, np.float32)}
    found = execute("requant", operands, result=((1, 5), "s8"), constant=constant, zero=3)
    assert found.tolist() == [[127, 127, 3, -128, -128]]


# ---- elementwise -------------------------------------------------------------------------------------------------------


def fused(a: Any, b: Any, c: Any) -> np.float32:
    """float32(a * b + c), rounded once: Python rounds an exact fraction to float64; odd bits keep the second rounding right."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    below = F(float(exact))
    candidates = [np.nextafter(below, F(-np.inf)), below, np.nextafter(below, F(np.inf))]
    best = min(abs(Fraction(float(each)) - exact) for each in candidates)
    nearest = [each for each in candidates if abs(Fraction(float(each)) - exact) == best]
    return next((each for each in nearest if int(np.asarray(each).view(np.int32)) % 2 == 0), nearest[0])


@SETTINGS
@given(st.integers(0, 255), st.floats(2.0**-60, 2.0**60, width=32), st.floats(-(2.0**40), 2.0**40, width=32))
def test_fused_multiply_add_rounds_once(a: int, b: float, c: float) -> None:
    got = fused_multiply_add(np.array([a], F), np.array([b], F), np.array([c], F))
    assert got[0] == fused(a, b, c)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("a", "b"), [(130, 16519105), (205, 10475530)])
def test_fused_multiply_add_at_a_double_rounding_trap(a: int, b: int, sign: int) -> None:
    """a·b = 2^31 + 2: added to 2^55, float64 keeps only 2^31, half a step of float32; the rest decides the rounding."""
    got = fused_multiply_add(np.array([a], F), np.array([sign * b], F), np.array([sign * 2.0**55], F))
    assert got[0] == sign * (2.0**55 + 2.0**32) == fused(a, sign * b, sign * 2.0**55)


def test_mul_adds_the_zero_point_in_one_step() -> None:
    """Adding 67 and then 128 to the scaled product would round it to 46."""
    a, b = np.full((1, 1000), 93, np.int8), np.full((1, 1000), -107, np.int8)
    assert set(execute("mul", {"a": a, "b": b}, result=(a.shape, "s8"), qa=(0.0020600934512913227, 0), qy=(1.0, 67)).reshape(-1)) == {47}


def test_a_clamp_beyond_the_type_is_the_types_range() -> None:
    a = np.array([[-1000, 1000]], np.int32)
    assert execute("requant", {"a": a}, result=(a.shape, "s8"), clamp=(-300, 300)).tolist() == [[-128, 127]]
    assert execute("cvt", {"x": a}, result=(a.shape, "s8"), clamp=(-300, 50)).tolist() == [[-128, 50]]


def add_bytes(a: int, b: int, qa: Any, qb: Any, qy: Any, clamp: tuple[int, int]) -> int:
    ra, rb = F(F(qa[0]) / F(qy[0])), F(F(qb[0]) / F(qy[0]))
    start = F(F(qy[1] + 128) - fused(ra, qa[1] + 128, F(rb * F(qb[1] + 128))))
    return saturate(round_half_even(fused(a + 128, ra, fused(b + 128, rb, start))) - 128, "s8", clamp)


def mul_bytes(a: int, b: int, qa: Any, qb: Any, qy: Any, clamp: tuple[int, int]) -> int:
    ratio = F(F(F(qa[0]) * F(qb[0])) / F(qy[0]))
    return saturate(round_half_even(F(F(F((a - qa[1]) * (b - qb[1])) * ratio) + F(qy[1] + 128))) - 128, "s8", clamp)


def on_reals(function: Callable[[Any, Any], Any]) -> Callable[..., int]:
    def evaluate(a: int, b: int, qa: Any, qb: Any, qy: Any, clamp: tuple[int, int], dtype: str = "s8") -> int:
        with np.errstate(all="ignore"):
            return quantized(function(real(a, *qa), real(b, *qb)), qy[0], qy[1], dtype, clamp)

    return evaluate


REALS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "min": min,
}
BYTES = {**{name: on_reals(function) for name, function in REALS.items()}, "add": add_bytes, "mul": mul_bytes}


@pytest.mark.parametrize("name", list(BYTES))
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(scales, zeros),
    st.tuples(scales, zeros),
    st.tuples(scales, zeros),
    st.sampled_from([(-128, 127), (-30, 100)]),
    st.sampled_from([0, 2]),
    seeds,
)
def test_bytes_with_bytes(name: str, qa: Any, qb: Any, qy: Any, clamp: tuple[int, int], gap: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = integers(rng, (6, 50)), integers(rng, (6, 50))
    expected = [BYTES[name](int(p), int(q), qa, qb, qy, clamp) for p, q in zip(a.reshape(-1), b.reshape(-1), strict=True)]
    got = execute(name, {"a": a, "b": b}, result=(a.shape, "s8"), gap=gap, qa=qa, qb=qb, qy=qy, clamp=clamp)
    assert got.reshape(-1).tolist() == expected
    tiled_a, tiled_b = np.tile(a, (20, 1)), np.tile(b, (20, 1))  # large enough for the table
    table = execute(name, {"a": tiled_a, "b": tiled_b}, result=(tiled_a.shape, "s8"), gap=gap, qa=qa, qb=qb, qy=qy, clamp=clamp)
    np.testing.assert_array_equal(table, np.tile(got, (20, 1)))


@pytest.mark.parametrize("name", list(REALS))
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["s8", "u8", "s16", "s32"]),
    st.sampled_from(["s8", "s16", "s32"]),
    st.sampled_from(["s8", "u8", "s16", "s32", "s64"]),
    st.tuples(scales, zeros),
    st.tuples(scales, zeros),
    st.tuples(scales, zeros),
    seeds,
)
def test_mixed_types(name: str, first: str, second: str, result: str, qa: Any, qb: Any, qy: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = integers(rng, (5, 7), first), integers(rng, (5, 7), second)
    if first == second == result == "s8":
        first, a = "s16", a.astype(np.int16)
    evaluate = on_reals(REALS[name])
    expected = [evaluate(int(p), int(q), qa, qb, qy, (-128, 127), result) for p, q in zip(a.reshape(-1), b.reshape(-1), strict=True)]
    got = execute(name, {"a": a, "b": b}, result=(a.shape, result), qa=qa, qb=qb, qy=qy)
    if result == "s64":  # floats from 2**63 on saturate
        assert got.reshape(-1).tolist() == [min(max(value, -(2**63)), 2**63 - 1) for value in expected]
    else:
        assert got.reshape(-1).tolist() == expected


@pytest.mark.parametrize("name", list(REALS))
def test_floats_stay_floats(name: str) -> None:
    a = np.array([[1.5, -2.25, np.inf, 0.0, 3e38, np.nan]], F)
    b = np.array([[0.1, 3.0, np.inf, 0.0, 3e38, 1.0]], F)
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}[name]
    with np.errstate(all="ignore"):
        expected = ufunc(a, b)
    np.testing.assert_array_equal(execute(name, {"a": a, "b": b}, result=(a.shape, "f32")), expected)
    immediate = execute(name, {"a": a}, result=(a.shape, "f32"), imm=0.25)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(immediate, ufunc(a, F(0.25)))


def test_broadcast_by_strides_of_zero() -> None:
    rng = np.random.default_rng(3)
    a, b = integers(rng, (70, 9, 8)), integers(rng, (1, 1, 8))
    qa, qb, qy = (0.05, 3), (0.11, -7), (0.07, 9)
    whole = execute("add", {"a": a, "b": np.broadcast_to(b, a.shape).copy()}, result=(a.shape, "s8"), qa=qa, qb=qb, qy=qy)
    np.testing.assert_array_equal(execute("add", {"a": a, "b": b}, result=(a.shape, "s8"), broadcast=("b",), qa=qa, qb=qb, qy=qy), whole)


@pytest.mark.parametrize("dtype", ["s8", "u8", "s16", "s32"])
@pytest.mark.parametrize("op", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_cmp(op: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    a, b = integers(rng, (4, 40), dtype), integers(rng, (4, 40), dtype)
    b[:2] = a[:2]
    python: Callable[[Any, Any], bool] = getattr(operator, op)
    for qb in ((0.1, 3), (0.2, 3)):
        expected = [int(python(real(p, 0.1, 3), real(q, *qb))) for p, q in zip(a.reshape(-1), b.reshape(-1), strict=True)]
        assert execute("cmp", {"a": a, "b": b}, result=(a.shape, "u8"), op=op, qa=(0.1, 3), qb=qb).reshape(-1).tolist() == expected
    expected = [int(python(real(p, 0.1, 3), F(0.7))) for p in a.reshape(-1)]
    assert execute("cmp", {"a": a}, result=(a.shape, "u8"), op=op, qa=(0.1, 3), imm=0.7).reshape(-1).tolist() == expected


@SETTINGS
@given(st.sampled_from(["s8", "s16", "s32"]), st.tuples(scales, zeros), st.tuples(scales, zeros), st.tuples(scales, zeros), seeds)
def test_select(dtype: str, qa: Any, qb: Any, qy: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = integers(rng, (3, 50), dtype), integers(rng, (3, 50)), rng.integers(0, 2, (3, 50)).astype(np.uint8)
    got = execute("select", {"c": c, "a": a, "b": b}, result=(a.shape, "s8"), qa=qa, qb=qb, qy=qy)
    expected = [quantized(real(p, *qa) if k else real(q, *qb), *qy) for k, p, q in zip(c.reshape(-1), a.reshape(-1), b.reshape(-1), strict=True)]
    assert got.reshape(-1).tolist() == expected


@SETTINGS
@given(
    st.sampled_from(["s8", "u8", "s16", "s32"]),
    st.sampled_from(["s8", "u8", "s16", "s32", "f32"]),
    st.sampled_from(["cvt", "sqrt"]),
    st.tuples(scales, zeros),
    st.tuples(scales, zeros),
    seeds,
)
def test_cvt_and_sqrt(source: str, result: str, name: str, qx: Any, qy: Any, seed: int) -> None:
    x = integers(np.random.default_rng(seed), (3, 60), source)
    got = execute(name, {"x": x}, result=(x.shape, result), qx=qx, qy=qy).reshape(-1)
    with np.errstate(all="ignore"):
        values = [np.sqrt(real(each, *qx)) if name == "sqrt" else real(each, *qx) for each in x.reshape(-1)]
    if result == "f32":
        np.testing.assert_array_equal(got, np.array(values, F))
    else:
        assert got.tolist() == [quantized(value, qy[0], qy[1], result) for value in values]


@pytest.mark.parametrize("constant", [(), ("t",)], ids=["unknown", "constant"])
@pytest.mark.parametrize(
    ("dtype", "result", "length", "base"),
    [("s8", "s8", 256, -128), ("s8", "f32", 100, -30), ("u8", "s32", 256, 0), ("s16", "s8", 1000, -500), ("s32", "s32", 40, 3)],
)
def test_lut(dtype: str, result: str, length: int, base: int, constant: tuple[str, ...]) -> None:
    rng = np.random.default_rng(7)
    x = np.where(rng.random((5, 80)) < 0.5, rng.integers(-100 if dtype != "u8" else 0, 100, (5, 80)), integers(rng, (5, 80), dtype)).astype(
        integers(rng, (1,), dtype).dtype
    )
    table = rng.standard_normal(length).astype(F) if result == "f32" else integers(rng, (length,), result)
    expected = [table[min(max(int(each) - base, 0), length - 1)] for each in x.reshape(-1)]
    got = execute("lut", {"x": x, "t": table}, result=(x.shape, result), constant=constant, base=base)
    np.testing.assert_array_equal(got.reshape(-1), np.array(expected))


@pytest.mark.parametrize("constant", [(), ("t",)], ids=["unknown", "constant"])
@pytest.mark.parametrize(
    ("dtype", "result", "length", "base", "shift"),
    [("s16", "s16", 257, -32768, 8), ("s8", "s8", 17, -100, 3), ("s32", "s32", 2, -5, 15), ("s16", "s8", 65, -2048, 6)],
)
def test_interpolated_lut(dtype: str, result: str, length: int, base: int, shift: int, constant: tuple[str, ...]) -> None:
    rng = np.random.default_rng(11)
    x, table = integers(rng, (5, 300), dtype), integers(rng, (length,), result)
    got = execute("lut", {"x": x, "t": table}, result=(x.shape, result), constant=constant, base=base, shift=shift)
    for each, found in zip(x.reshape(-1).tolist(), got.reshape(-1).tolist(), strict=True):
        place = min(max(each - base, 0), (length - 1) << shift)
        index = min(place >> shift, length - 2)
        low, high = int(table[index]), int(table[index + 1])
        assert found == low + (((high - low) * (place - (index << shift)) + 2 ** (shift - 1)) >> shift)


@pytest.mark.parametrize(
    ("length", "dtype", "shift", "message"), [(1, np.int8, 2, "a table of 1 entries"), (9, np.int8, 16, "a shift of 16"), (9, np.float32, 2, "f32")]
)
def test_interpolated_tables_that_cannot_be(length: int, dtype: Any, shift: int, message: str) -> None:
    with pytest.raises(RuntimeFault, match=message):
        execute(
            "lut",
            {"x": np.zeros((1, 4), np.int8), "t": np.zeros(length, dtype)},
            result=((1, 4), "f32" if dtype == np.float32 else "s8"),
            shift=shift,
        )


def test_lut_needs_one_type() -> None:
    with pytest.raises(RuntimeFault, match="operand y holds s8, but operand t holds s16"):
        execute("lut", {"x": np.zeros((1, 4), np.int8), "t": np.zeros(256, np.int16)}, result=((1, 4), "s8"))


def test_fill() -> None:
    assert execute("fill", {}, result=((2, 3), "s8"), value=-3.0).tolist() == [[-3] * 3] * 2
    assert execute("fill", {}, result=((2, 3), "f32"), gap=1, value=0.25).tolist() == [[0.25] * 3] * 2
    for value in (300.0, 0.5, float("nan")):
        with pytest.raises(RuntimeFault, match="but operand y holds s8"):
            execute("fill", {}, result=((2, 3), "s8"), value=value)


# ---- windows and reductions --------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    kernel, stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pad = tuple(draw(st.integers(0, max(0, (kernel[side % 2] - 1) * dilation[side % 2]))) for side in range(4))
    outputs = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = tuple((outputs[a] - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1 - pad[a] - pad[a + 2] for a in (0, 1))
    case = {"kernel": kernel, "stride": stride, "dilation": dilation, "pad": pad}
    return {
        "attributes": case,
        "outputs": outputs,
        "size": tuple(max(1, side) for side in size),
        "seed": draw(seeds),
        "dtype": draw(st.sampled_from(["s8", "s16"])),
    }


def window(x: Array, case: dict[str, Any], h: int, w: int) -> list[Array]:
    """The taps inside x of one output."""
    (kernel, stride, dilation, pad), taps = (case["attributes"][name] for name in ("kernel", "stride", "dilation", "pad")), []
    for k, m in np.ndindex(*kernel):
        row, column = h * stride[0] + k * dilation[0] - pad[0], w * stride[1] + m * dilation[1] - pad[1]
        if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
            taps.append(x[row, column])
    return taps


@SETTINGS
@given(pools(), st.sampled_from([0, 2]))
def test_maxpool(case: dict[str, Any], gap: int) -> None:
    x = integers(np.random.default_rng(case["seed"]), (*case["size"], 5), case["dtype"])
    windows = {(h, w): window(x, case, h, w) for h, w in np.ndindex(*case["outputs"])}
    shape = (*case["outputs"], 5)
    if not all(windows.values()):
        with pytest.raises(RuntimeFault, match=r"wholly in the padding|steps over all"):
            execute("maxpool", {"x": x}, result=(shape, case["dtype"]), **case["attributes"])
        return
    got = execute("maxpool", {"x": x}, result=(shape, case["dtype"]), gap=gap, **case["attributes"])
    for (h, w), taps in windows.items():
        assert got[h, w].tolist() == np.max(taps, axis=0).tolist()


@SETTINGS
@given(pools(), scales, zeros, zeros, st.sampled_from(["inside", "window"]), st.sampled_from(["s8", "s16"]))
def test_avgpool(case: dict[str, Any], scale: float, zx: int, zy: int, count: str, result: str) -> None:
    x = integers(np.random.default_rng(case["seed"]), (*case["size"], 3), case["dtype"])
    if not all(window(x, case, h, w) for h, w in np.ndindex(*case["outputs"])):
        with pytest.raises(RuntimeFault, match=r"wholly in the padding|steps over all"):
            execute("avgpool", {"x": x}, result=((*case["outputs"], 3), result), **case["attributes"])
        return
    got = execute("avgpool", {"x": x}, result=((*case["outputs"], 3), result), scale=scale, zx=zx, zy=zy, count=count, **case["attributes"])
    taps_in_window = case["attributes"]["kernel"][0] * case["attributes"]["kernel"][1]
    for h, w in np.ndindex(*case["outputs"]):
        taps = window(x, case, h, w)
        factor = F(F(scale) / F(len(taps) if count == "inside" else taps_in_window))
        for c in range(3):
            total = sum(int(tap[c]) - zx for tap in taps)
            assert got[h, w, c] == saturate(round_half_even(F(F(total) * factor)) + zy, result)


def test_sums_of_large_windows_are_rounded_once() -> None:
    """512 · 2**15 + 3: one by one in float32, the last three would be lost, and the result would stay at the tie."""
    x = np.full((1024, 1, 1), -1, np.int16)
    x[:512], x[512:515] = 32767, 0
    got = execute("avgpool", {"x": x}, result=((1, 1, 1), "s16"), kernel=(1024, 1), scale=2001 / 2**15, zx=-1)
    assert got.item() == 1001 == round_half_even(F(F(2**24 + 3) * F(2001 / 2**25)))


@pytest.mark.parametrize("op", ["sum", "sumsq", "max", "min"])
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["s8", "s16", "s32"]),
    st.sampled_from(["s32", "s64"]),
    st.sampled_from([(1, 1, 5), (4, 1, 5), (4, 3, 1), (1, 3, 5), (4, 3, 5), (1, 1, 1)]),
    zeros,
    st.integers(0, 1),
    seeds,
)
def test_reduce(op: str, source: str, result: str, shape: tuple[int, ...], zero: int, accumulate: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, before = integers(rng, (4, 3, 5), source), integers(rng, shape, result)
    got = execute("reduce", {"x": x}, result=(shape, result), before=before, op=op, zero=zero, accumulate=accumulate)
    axes = tuple(axis for axis in range(3) if shape[axis] == 1)
    python = x.astype(object)
    if op in ("max", "min"):
        expected = (np.maximum if op == "max" else np.minimum).reduce(python, axis=axes, keepdims=True)
        expected = expected if not accumulate else np.where((before > expected) == (op == "max"), before.astype(object), expected)
    else:
        terms = (python - zero) ** (2 if op == "sumsq" else 1)
        expected = np.add.reduce(terms, axis=axes, keepdims=True) + (before.astype(object) if accumulate else 0)
    bits = 32 if result == "s32" else 64
    assert got.reshape(-1).tolist() == [(int(value) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for value in expected.reshape(-1)]


def test_reduce_refuses_narrow_results() -> None:
    with pytest.raises(RuntimeFault, match="op=max of s16 writes into s8"):
        execute("reduce", {"x": np.zeros((3, 4), np.int16)}, result=((1, 4), "s8"), op="max")


@SETTINGS
@given(st.tuples(scales, zeros), st.tuples(scales, zeros), st.sampled_from(["s8", "s16"]), seeds)
def test_resize(qx: Any, qy: Any, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = integers(rng, (4, 5, 3), dtype)
    tables = {}
    for name, outputs, size in (("r", 6, 4), ("q", 7, 5)):
        weight = rng.random(outputs).astype(F)
        table = np.zeros((outputs, 4), np.int32)
        table[:, 0], table[:, 1] = rng.integers(0, size, outputs), rng.integers(0, size, outputs)
        table[:, 2], table[:, 3] = (F(1) - weight).view(np.int32), weight.view(np.int32)
        tables[name] = table
    got = execute("resize", {"x": x, **tables}, result=((6, 7, 3), dtype), qx=qx, qy=qy)
    for h, w, c in np.ndindex(6, 7, 3):
        (i0, i1), (j0, j1) = tables["r"][h, :2], tables["q"][w, :2]
        (a0, a1), (b0, b1) = tables["r"][h, 2:].view(F), tables["q"][w, 2:].view(F)
        corners = [real(x[i, j, c], *qx) for i, j in ((i0, j0), (i0, j1), (i1, j0), (i1, j1))]
        total = F(F(F(F(b0 * a0) * corners[0]) + F(F(b1 * a0) * corners[1])) + F(F(b0 * a1) * corners[2])) + F(F(b1 * a1) * corners[3])
        assert got[h, w, c] == quantized(total, qy[0], qy[1], dtype)
    tables["r"][0, 0] = 4
    with pytest.raises(RuntimeFault, match="r holds positions"):
        execute("resize", {"x": x, **tables}, result=((6, 7, 3), dtype))
