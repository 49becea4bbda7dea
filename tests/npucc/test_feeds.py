"""DATA files: what fits is streamed as it is, what does not fit is refused with a message that says what to do."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npucc.errors import DataError
from npucc.feeds import Port, check_feed, open_dataset, synthetic_feeds

X = Port("x", (1, 3, 4, 4))
IDS = Port("ids", (1, 8), "int64")


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_samples_stacked_in_front_of_the_models_shape(tmp_path: Path) -> None:
    x = np.arange(2 * 48, dtype=np.float32).reshape(2, 1, 3, 4, 4)
    dataset = open_dataset(write(tmp_path / "a.npz", x=x), [X])
    assert len(dataset) == 2
    assert [feed["x"].tolist() for feed in dataset] == x.tolist()


def test_the_sample_axis_may_stand_for_a_batch_of_one(tmp_path: Path) -> None:
    x = np.arange(3 * 48, dtype=np.float16).reshape(3, 3, 4, 4)
    dataset = open_dataset(write(tmp_path / "a.npz", x=x, labels=np.array([7, 8, 9])), [X])
    samples = list(dataset.samples())
    assert [sample.feed["x"].shape for sample in samples] == [(1, 3, 4, 4)] * 3
    assert samples[2].feed["x"].dtype == np.float32
    assert np.array_equal(samples[2].feed["x"][0], x[2])
    assert [sample.labels.tolist() for sample in samples if sample.labels is not None] == [[7], [8], [9]]


def test_rows_are_taken_in_groups_where_the_model_has_a_batch(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    dataset = open_dataset(write(tmp_path / "a.npz", x=x, labels=np.arange(6)), [Port("x", (3, 2))])
    samples = list(dataset.samples())
    assert [sample.feed["x"].tolist() for sample in samples] == [x[:3].tolist(), x[3:].tolist()]
    assert samples[1].labels is not None
    assert samples[1].labels.tolist() == [3, 4, 5]


def test_rows_that_fill_no_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 5 rows, which is no multiple of the model's batch of 3\n  hint: leave 2 rows out"):
        open_dataset(write(tmp_path / "a.npz", x=np.zeros((5, 2), np.float32)), [Port("x", (3, 2))])


def test_open_sizes_are_those_of_the_data(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "a.npz", x=np.zeros((5, 3, 16, 24), np.float32)), [Port("x", (None, 3, None, None))])
    assert dataset.shapes == {"x": (1, 3, 16, 24)}


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name, value in (("b", 2.0), ("a", 1.0)):
        write(tmp_path / f"{name}.npz", x=np.full((2, 3, 4, 4), value, np.float32))
    dataset = open_dataset(tmp_path, [X], limit=3)
    assert len(dataset) == 3
    assert [float(feed["x"].max()) for feed in dataset] == [1.0, 1.0, 2.0]


def test_fortran_order_is_read_right(tmp_path: Path) -> None:
    x = np.asfortranarray(np.arange(2 * 48, dtype=np.float32).reshape(2, 3, 4, 4))
    (first, second) = open_dataset(write(tmp_path / "a.npz", x=x), [X])
    assert np.array_equal(second["x"][0], x[1])
    assert np.array_equal(first["x"][0], x[0])


def test_samples_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one sample is read at a time."""
    largest = 0
    read = zipfile.ZipExtFile.read

    def spy(self: zipfile.ZipExtFile, count: int = -1) -> bytes:
        nonlocal largest
        content = read(self, count)
        largest = max(largest, len(content))
        return content

    path = write(tmp_path / "a.npz", x=np.zeros((500, 3, 4, 4), np.float32))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", spy)
    assert sum(1 for _ in open_dataset(path, [X])) == 500
    assert 0 < largest <= 48 * 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"y": np.zeros((1, 3, 4, 4))}, r"there is no array 'x'; the file holds 'y'"),
    "shape": (
        {"x": np.zeros((1, 3, 5, 4))},
        r"array 'x' has shape \[1, 3, 5, 4\]\n  hint: expected \[samples,1,3,4,4\] for input x float32\[1,3,4,4\]",
    ),
    "empty": ({"x": np.zeros((0, 3, 4, 4))}, r"there are no samples"),
    "text": ({"x": np.zeros((1, 3, 4, 4), "U4")}, r"array 'x' holds <U4\n  hint: samples and labels are plain numbers"),
    "labels": ({"x": np.zeros((2, 3, 4, 4)), "labels": np.zeros(3, int)}, r"labels have shape \[3\] for 2 samples"),
    "float labels": ({"x": np.zeros((2, 3, 4, 4)), "labels": np.zeros(2)}, r"labels are float64\n  hint: expected class numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_opened(case: str, tmp_path: Path) -> None:
    arrays, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(write(tmp_path / "a.npz", **arrays), [X])
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def test_counts_that_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", x=np.zeros((2, 3, 4, 4)), ids=np.zeros((3, 8), int))
    with pytest.raises(DataError, match=r"different numbers of samples \('x': 2, 'ids': 3\)"):
        open_dataset(path, [X, IDS])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number(value: float, tmp_path: Path) -> None:
    x = np.zeros((2, 3, 4, 4))
    x[1, 2, 3, 0] = value
    dataset = open_dataset(write(tmp_path / "a.npz", x=x), [X])
    with pytest.raises(DataError, match=rf"a.npz, sample 1: input 'x' is {value} at \[0, 2, 3, 0\]"):
        list(dataset)


def test_too_large_for_float32_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input 'x' is 1e\\+300"):
        list(open_dataset(write(tmp_path / "a.npz", x=np.full((1, 3, 4, 4), 1e300)), [X]))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds object"):
        open_dataset(write(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object)), [X])


def test_a_header_that_lies_about_its_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3, 4, 4)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue() + bytes(100))
    with pytest.raises(DataError, match="but holds 100 bytes"):
        open_dataset(tmp_path / "a.npz", [X])


def test_damaged_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", x=np.zeros((2, 3, 4, 4)))
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        list(open_dataset(path, [X]))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 no zip either"])
def test_no_zip_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        open_dataset(tmp_path / "a.npz", [X])


def test_no_such_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_dataset(tmp_path / "a.npz", [X])
    with pytest.raises(DataError, match=r"holds no \.npz file"):
        open_dataset(tmp_path, [X])


def test_check_feed_takes_what_fits() -> None:
    feed = check_feed({"x": np.zeros((1, 3, 4, 4)), "ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}, [X, IDS])
    assert feed["x"].dtype == np.float32
    assert feed["ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": np.zeros((3, 4, 4))}, r"input 'x' has shape \[3, 4, 4\]\n  hint: expected x float32\[1,3,4,4\]"),
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((1, 3, 4, 4)), "y": 1}, "'y' is not an input"),
        ({"x": np.full((1, 3, 4, 4), "a")}, "input 'x' is <U1"),
    ],
)
def test_check_feed_refuses(feed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_feed(feed, [X])


def test_integers_are_never_rounded_or_wrapped() -> None:
    with pytest.raises(DataError, match="input 'ids' is float64\n  hint: the model takes int64"):
        check_feed({"ids": np.zeros((1, 8))}, [IDS])
    with pytest.raises(DataError, match="values from 300 to 300\n  hint: uint8 holds 0 to 255"):
        check_feed({"b": np.full((2,), 300)}, [Port("b", (2,), "uint8")])


def test_synthetic_feeds_are_the_same_every_time() -> None:
    first, again = (list(synthetic_feeds([X, IDS], count=2)) for _ in range(2))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    with pytest.raises(DataError, match="open sizes"):
        next(synthetic_feeds([Port("x", (None, 3))]))
