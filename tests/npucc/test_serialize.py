"""The integer graph in a package: round trip to the byte, and no damaged record gets through or crashes."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isa.errors import PackageError
from npucc.graph import Graph, Node, Quant, Tensor, make_graph
from npucc.ops import OPS, Attributes, Concat, Conv, Slice, Table
from npucc.serialize import from_bytes, to_bytes


def quant(dtype: str = "s8", scale: Any = 0.1, zero: int = 0, axis: int | None = None) -> Quant:
    return Quant(dtype, np.asarray(scale, np.float32), zero, axis)


def example() -> Graph:
    """x → conv (clamped at infinity) → table → concat of it with itself → slice."""
    weights = np.arange(-27, 27, dtype=np.int8).reshape(2, 3, 3, 3)
    tensors = [
        Tensor("x", (1, 3, 8, 8), quant=quant(zero=-3), source="x"),
        Tensor("w", (2, 3, 3, 3), "float32", weights, quant(scale=[0.1, 1 / 3], axis=0)),
        Tensor("b", (2,), "float32", np.array([5, -70000], np.int32), quant("s32", [0.01, 0.02], axis=0)),
        Tensor("c", (1, 2, 4, 4), quant=quant(zero=-128), source="relu"),
        Tensor("t", (1, 2, 4, 4), quant=quant(scale=1e-38)),
        Tensor("k", (1, 4, 4, 4), quant=quant(scale=1e-38)),
        Tensor("y", (1, 4, 2, 4), quant=quant(scale=1e-38), source="y"),
    ]
    nodes = [
        Node("conv", "conv", ("x", "w", "b"), ("c",), Conv(strides=(2, 2), pads=(1, 1, 0, 0), clamp=(0.0, math.inf)), ("Conv_1", "Relu_2")),
        Node("act", "table", ("c",), ("t",), Table(("mul", "x", ("sigmoid", ("add", "x", 0.5)))), ("Mul_3",)),
        Node("cat", "concat", ("t", "t"), ("k",), Concat(axis=1)),
        Node("cut", "slice", ("k",), ("y",), Slice((0, 0, 3, 0), (1, 4, 2, 4), (1, 1, -2, 1))),
    ]
    return make_graph("example", nodes, {tensor.name: tensor for tensor in tensors}, ["x"], ["y"])


def parts(graph: Graph) -> tuple[Any, ...]:
    tensors = [
        (t.name, t.shape, t.dtype, t.source, None if t.data is None else (t.data.dtype, t.data.shape, t.data.tobytes()), t.quant and t.quant.key)
        for t in graph.tensors.values()
    ]
    return graph.name, tensors, list(graph.nodes.values()), graph.inputs, graph.outputs


def test_round_trip() -> None:
    graph = example()
    again = from_bytes(*to_bytes(graph))
    assert parts(again) == parts(graph)
    assert to_bytes(again) == to_bytes(graph)
    assert again.text() == graph.text()


def test_the_json_is_json() -> None:
    """No Infinity or NaN, which other readers refuse."""
    json.loads(to_bytes(example())[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("record", OPS.values(), ids=OPS)
def test_every_operators_attributes_survive(record: Any) -> None:
    """With each attribute away from its default."""
    from npucc import serialize

    other = {int: 3, float: 0.25, bool: True, str: "linear", tuple: (1, 2), type(None): (-math.inf, 6.0), bytes: b"abc"}
    values = {}
    for name, field in record.attributes.__dataclass_fields__.items():
        default = field.default
        values[name] = tuple(type(v)(v + 1) for v in default) if isinstance(default, tuple) and default else other[type(default)]
    values |= {"expression": ("tanh", "x")} if "expression" in values else {}
    attributes: Attributes = record.attributes(**values)
    blob = bytearray()
    stored = json.loads(json.dumps(serialize._node_record(Node("n", record.name, (), ("y",), attributes), blob)))
    assert serialize._node(stored, bytes(blob)).attributes == attributes


def damaged(change: Any) -> str:
    """The message for a record after a change."""
    text, blob = to_bytes(example())
    record = json.loads(text)
    change(record)
    with pytest.raises(PackageError) as caught:
        from_bytes(json.dumps(record).encode(), blob, file="a.npu")
    assert str(caught.value).startswith("a.npu: graph.json: ")
    return caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=99), "version is 99, expected 1"),
        (lambda r: r["nodes"][0].update(op="fly"), "'op' is 'fly', expected one of conv"),
        (lambda r: r["nodes"][0]["attributes"].update(strides=[1, "2"]), "node 'conv': attribute strides is (1, '2'), expected tuple[int, int]"),
        (lambda r: r["nodes"][0]["attributes"].update(strides=[0, 0]), "ZeroDivisionError"),
        (lambda r: r["nodes"][0]["attributes"].update(wings=2), "node 'conv' has unknown attribute 'wings'"),
        (lambda r: r["nodes"][0].update(outputs=[]), "node 'conv' has no output"),
        (lambda r: r["nodes"][2].update(inputs=["t", "nothing"]), "reads 'nothing', which nothing before it makes"),
        (lambda r: r["tensors"][0].update(shape=[1, 3, 8, -8]), "shape [1, 3, 8, -8] is impossible"),
        (lambda r: r["tensors"][0].update(shape=[1, 3, 12, 8]), "is recorded as"),
        (lambda r: r["tensors"][0].update(shape=[1 << 40, 1 << 40]), "is impossible"),
        (lambda r: r["tensors"][1]["data"].update(offset=1 << 50), "lie outside the"),
        (lambda r: r["tensors"][1]["data"].update(offset=-8), "lie outside the"),
        (lambda r: r["tensors"][1]["data"].update(dtype="object"), "'dtype' is 'object', expected one of"),
        (lambda r: r["tensors"][0]["quant"].update(scale=-1.0), "scale -1.0 is not a positive number"),
        (lambda r: r["tensors"][0]["quant"].update(scale=3.5e38), "is not a positive number"),
        (lambda r: r["tensors"][0]["quant"].update(scale={"float": "nan"}), "is not a positive number"),
        (lambda r: r["tensors"][1]["quant"].update(axis=7), "scales for axis 7"),
        (lambda r: r.update(outputs=["z"]), "graph input or output 'z' is no tensor"),
        (lambda r: r["tensors"].append(r["tensors"][0]), "tensor 'x' is given twice"),
        (lambda r: r["nodes"].append(r["nodes"][0]), "node 'conv' is given twice"),
    ],
)
def test_damage_is_named(change: Any, message: str) -> None:
    assert message in damaged(change)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}', b"[" * 100_000])
def test_no_record_at_all(text: bytes) -> None:
    with pytest.raises(PackageError):
        from_bytes(text, b"")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
RECORD, BLOB = json.loads(to_bytes(example())[0]), to_bytes(example())[1]


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), value=JSON)
def test_any_change_is_read_or_refused(position: int, value: Any) -> None:
    record = copy.deepcopy(RECORD)
    every = list(places(record))
    container, key = every[position % len(every)]
    container[key] = value
    with contextlib.suppress(PackageError):
        assert isinstance(from_bytes(json.dumps(record).encode(), BLOB), Graph)
