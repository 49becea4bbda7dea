"""Views against numpy: the same window, permutation or reshape of a real array must address the same elements."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from npucc.lowering.movement import pad_indices, segments
from npucc.lowering.views import View, common_refinement, merge_dimensions

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def elements(view: View, memory: np.ndarray) -> np.ndarray:
    """What the view shows of a flat int8 memory."""
    index = np.full(view.shape, view.offset)
    for dimension, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        index = index + (np.arange(size) * stride).reshape([-1 if d == dimension else 1 for d in range(len(view.shape))])
    return memory[index]


@st.composite
def views_with_arrays(draw: st.DrawFn) -> tuple[View, np.ndarray, np.ndarray]:
    """A view, the flat memory, and the numpy array that it must equal."""
    shape = draw(shapes)
    order = draw(st.permutations(range(len(shape))))
    memory = np.arange(int(np.prod(shape)))
    view = View.dense("b", shape, "s8", order)
    array = memory.reshape([shape[d] for d in order]).transpose(np.argsort(order))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)]
    window = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return view.window(starts, sizes), memory, array[window]


@given(views_with_arrays())
def test_windows_of_permuted_buffers_address_the_elements_of_the_array(case: tuple[View, np.ndarray, np.ndarray]) -> None:
    view, memory, array = case
    assert np.array_equal(elements(view, memory), array)


@given(views_with_arrays(), st.randoms())
def test_a_reshape_is_right_or_refused(case: tuple[View, np.ndarray, np.ndarray], random: object) -> None:
    view, memory, array = case
    flat = view.reshape((array.size,))
    if flat is not None:
        assert np.array_equal(elements(flat, memory), array.reshape(-1))
    half = (2, array.size // 2) if array.size % 2 == 0 else (1, array.size)
    halved = view.reshape(half)
    if halved is not None:
        assert np.array_equal(elements(halved, memory), array.reshape(half))


def test_a_dense_buffer_takes_every_reshape() -> None:
    view = View.dense("b", (2, 3, 4), "s8")
    for shape in ((24,), (6, 4), (2, 12), (1, 2, 3, 4), (4, 6), (3, 8)):
        assert view.reshape(shape) is not None, shape


def test_channels_last_images_do_not_flatten_without_a_copy() -> None:
    assert View.dense("b", (1, 8, 4, 4), "s8", (0, 2, 3, 1)).reshape((1, 128)) is None


@given(views_with_arrays())
def test_merging_dimensions_keeps_the_elements(case: tuple[View, np.ndarray, np.ndarray]) -> None:
    view, memory, array = case
    shape, (strides,) = merge_dimensions(view.shape, view.strides)
    merged = View(view.buffer, view.offset, shape, strides, "s8")
    assert np.array_equal(elements(merged, memory).reshape(-1), array.reshape(-1))


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=20))
def test_segments_reproduce_the_index_map(indices: list[int]) -> None:
    rebuilt = []
    for segment in segments(indices):
        rebuilt += [-1 if segment.step is None else segment.first + n * segment.step for n in range(segment.count)]
    assert rebuilt == indices


@given(st.integers(2, 6), st.integers(0, 4), st.integers(0, 4), st.sampled_from(["edge", "reflect", "wrap"]))
def test_pad_indices_equal_numpy_pad(size: int, before: int, after: int, mode: str) -> None:
    assert pad_indices(size, before, after, mode) == np.pad(np.arange(size), (before, after), mode=mode).tolist()  # type: ignore[call-overload]


def test_common_refinement() -> None:
    assert common_refinement((1, 8, 4, 4), (1, 128)) == (8, 4, 4)
    assert common_refinement((6, 4), (2, 12)) == (2, 3, 4)
    assert common_refinement((6, 4), (8, 3)) is None
