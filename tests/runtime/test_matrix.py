"""conv, dwconv and matmul against sums of Python and int64 integers, wrapped to 32 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import RuntimeFault
from tests.runtime.harness import Array, execute, integers

SETTINGS = settings(max_examples=60, deadline=None)


def wrap(values: Array) -> Array:
    return values.astype(np.int64).astype(np.int32)


def conv_oracle(
    x: Array,
    w: Array,
    outputs: tuple[int, int],
    *,
    stride: Any = (1, 1),
    dilation: Any = (1, 1),
    pad: Any = (0, 0, 0, 0),
    zero: int = 0,
    groups: int = 1,
) -> Array:
    """int64 sums, element by element, straight from the table's sentence."""
    height, width, channels = x.shape
    share, per_group = w.shape[2], w.shape[3] // groups
    y = np.zeros((*outputs, w.shape[3]), np.int64)
    for h, v, k, m in np.ndindex(*outputs, *w.shape[:2]):
        row, column = h * stride[0] + k * dilation[0] - pad[0], v * stride[1] + m * dilation[1] - pad[1]
        inside = 0 <= row < height and 0 <= column < width
        pixel = x[row, column].astype(np.int64) if inside else np.full(channels, zero, np.int64)
        for n in range(w.shape[3]):
            group = n // per_group
            y[h, v, n] += int((pixel[group * share : (group + 1) * share] * w[k, m, :, n]).sum())
    return y


@st.composite
def convolutions(draw: st.DrawFn, *, grouped: bool) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride, dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pad = draw(st.tuples(*[st.integers(0, 2)] * 4))
    outputs = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    extra = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    size = [max(1, (outputs[a] - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1 - pad[a] - pad[a + 2] + extra[a]) for a in (0, 1)]
    return {
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "pad": pad,
        "outputs": outputs,
        "size": tuple(size),
        "zero": draw(st.integers(-128, 127)),
        "groups": draw(st.integers(2, 3)) if grouped else 1,
        "share": draw(st.sampled_from([1, 3, 30] if grouped else [1, 5, 70])),
        "per_group": draw(st.integers(1, 5)),
        "gap": draw(st.sampled_from([0, 3])),
        "dtype": draw(st.sampled_from(["s8", "s16"])),
        "constant": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "accumulate": draw(st.integers(0, 1)),
        "seed": draw(st.integers(0, 2**32)),
    }


def check_conv(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    groups = case["groups"]
    outputs = groups * case["per_group"]
    x = integers(rng, (*case["size"], groups * case["share"]), case["dtype"])
    w = integers(rng, (*case["kernel"], case["share"], outputs))
    operands = {"x": x, "w": w}
    before = rng.integers(-(2**31), 2**31, (*case["outputs"], outputs)).astype(np.int32)
    start = np.zeros_like(before)
    if case["accumulate"]:
        start = before
    elif case["bias"]:
        operands["b"] = start = rng.integers(-(2**31), 2**31, outputs).astype(np.int32)
    geometry = {name: case[name] for name in ("stride", "dilation", "pad", "zero", "groups")}
    constant = ("w",) if case["constant"] else ()
    got = execute(
        "conv", operands, result=(before.shape, "s32"), before=before, gap=case["gap"], constant=constant, accumulate=case["accumulate"], **geometry
    )
    np.testing.assert_array_equal(got, wrap(start + conv_oracle(x, w, case["outputs"], **geometry)))


@SETTINGS
@given(convolutions(grouped=False))
def test_conv(case: dict[str, Any]) -> None:
    check_conv(case)


@SETTINGS
@given(convolutions(grouped=True))
def test_grouped_conv(case: dict[str, Any]) -> None:
    check_conv(case)


@SETTINGS
@given(convolutions(grouped=True))
def test_dwconv(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    channels = case["share"]
    x, w = integers(rng, (*case["size"], channels), case["dtype"]), integers(rng, (*case["kernel"], channels))
    geometry = {name: case[name] for name in ("stride", "dilation", "pad", "zero")}
    bias = integers(rng, (channels,), "s32")
    expected = bias + conv_oracle(x, w[:, :, None, :], case["outputs"], groups=channels, **geometry)
    constant = ("w",) if case["constant"] else ()
    got = execute("dwconv", {"x": x, "w": w, "b": bias}, result=((*case["outputs"], channels), "s32"), gap=case["gap"], constant=constant, **geometry)
    np.testing.assert_array_equal(got, wrap(expected))
    before = integers(rng, got.shape, "s32")
    more = execute("dwconv", {"x": x, "w": w}, result=(got.shape, "s32"), before=before, accumulate=1, **geometry)
    np.testing.assert_array_equal(more, wrap(expected - bias + before))


@SETTINGS
@given(
    st.integers(1, 20),
    st.integers(1, 600),
    st.integers(1, 20),
    st.integers(-128, 127),
    st.integers(-128, 127),
    st.sampled_from(["s8", "s16"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_matmul(m: int, k: int, n: int, za: int, zb: int, dtype: str, constant: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = integers(rng, (m, k), dtype), integers(rng, (k, n)), integers(rng, (n,), "s32")
    expected = wrap((a.astype(np.int64) - za) @ (b.astype(np.int64) - zb) + c)
    got = execute("matmul", {"a": a, "b": b, "c": c}, result=((m, n), "s32"), constant=("b",) if constant else (), za=za, zb=zb)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("left", [-128, 127])
@pytest.mark.parametrize("right", [-128, 127])
@pytest.mark.parametrize("constant", [(), ("w",)], ids=["unknown", "constant"])
@pytest.mark.parametrize("channels", [1024, 1025, 1040, 1041, 9000])
def test_the_largest_sums_are_exact(left: int, right: int, constant: tuple[str, ...], channels: int) -> None:
    """K · 128 · 128 passes 2**24 at K = 1025: an odd product there must not be rounded."""
    x = np.full((1, 1, channels), left, np.int8)
    w = np.full((1, 1, channels, 2), right, np.int8)
    x[0, 0, -1], w[0, 0, -1] = 1, 1
    expected = left * right * (channels - 1) + 1
    got = execute("conv", {"x": x, "w": w}, result=((1, 1, 2), "s32"), constant=constant)
    assert got.tolist() == [[[expected, expected]]]


@pytest.mark.parametrize("constant", [(), ("b",)], ids=["unknown", "constant"])
@pytest.mark.parametrize("depth", [257, 258, 259, 515, 1027])
def test_the_largest_products_of_matmul_are_exact(depth: int, constant: tuple[str, ...]) -> None:
    """Zero points stretch the operands to 255: 255 · 255 · 259 passes 2**24."""
    a, b = np.full((1, depth), 127, np.int8), np.full((depth, 1), 127, np.int8)
    got = execute("matmul", {"a": a, "b": b}, result=((1, 1), "s32"), constant=constant, za=-128, zb=-128)
    assert got.item() == 255 * 255 * depth
    one_sided = execute("matmul", {"a": a, "b": b}, result=((1, 1), "s32"), constant=constant, za=-128)
    assert one_sided.item() == 255 * 127 * depth


def test_long_windows_are_exact() -> None:
    """3x3x512 windows of extreme values: K is cut and the parts are added as integers."""
    rng = np.random.default_rng(1)
    x = rng.choice(np.array([-128, 127], np.int8), (5, 5, 512))
    w = rng.choice(np.array([-128, 127], np.int8), (3, 3, 512, 4))
    for constant in ((), ("w",)):
        got = execute("conv", {"x": x, "w": w}, result=((3, 3, 4), "s32"), constant=constant)
        np.testing.assert_array_equal(got, conv_oracle(x, w, (3, 3)))


def test_sums_wrap_in_32_bits() -> None:
    x, w = np.full((1, 1, 4), 127, np.int8), np.full((1, 1, 4, 1), 127, np.int8)
    got = execute("conv", {"x": x, "w": w, "b": np.array([2**31 - 1], np.int32)}, result=((1, 1, 1), "s32"))
    assert got.item() == 2**31 - 1 + 4 * 127 * 127 - 2**32
    wide = np.full((1, 4000), -32768, np.int16)
    got = execute("matmul", {"a": wide, "b": np.full((4000, 1), -128, np.int8)}, result=((1, 1), "s32"), constant=("b",))
    assert got.item() == (4000 * 32768 * 128 + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("constant", [(), ("w",)], ids=["unknown", "constant"])
def test_wide_taps_of_dwconv_are_exact(constant: tuple[str, ...]) -> None:
    """33 x 33 taps of -128 · -128 pass 2**24, and any two of them 2**15 - 1."""
    x, w = np.full((33, 33, 1), -128, np.int8), np.full((33, 33, 1), -128, np.int8)
    x[0, 0, 0], w[0, 0, 0] = 1, 1
    assert execute("dwconv", {"x": x, "w": w}, result=((1, 1, 1), "s32"), constant=constant).item() == (33 * 33 - 1) * 128 * 128 + 1


@pytest.mark.parametrize(
    ("result", "attributes", "message"),
    [
        ((4, 4, 2), {}, "the last window ends at row 6 of an input of 5 rows"),
        ((3, 3, 2), {"groups": 2}, "x has 3 channels, but w has 3 in each of 2 groups"),
        ((3, 3, 2), {"stride": (0, 1)}, r"stride is \(0, 1\)"),
        ((5, 5, 2), {"pad": (1, 1, 1, 1), "zero": 300}, "zero is 300, but operand x holds s8"),
        ((3, 3, 2), {"accumulate": 1}, "accumulate=1 and the bias b exclude each other"),
        ((3, 3, 5), {}, "size n is 2 in operand w, but 5 in operand y"),
        ((3, 3, 2), {"colour": 1}, "no attribute 'colour'"),
    ],
)
def test_operands_that_do_not_fit_are_refused(result: tuple[int, ...], attributes: dict[str, Any], message: str) -> None:
    operands: dict[str, Array] = {"x": np.zeros((5, 5, 3), np.int8), "w": np.zeros((3, 3, 3, 2), np.int8), "b": np.zeros(2, np.int32)}
    with pytest.raises(RuntimeFault, match=message):
        execute("conv", operands, result=(result, "s32"), **attributes)
