"""An ONNX model without the data of its large stored tensors: shapes and types need no second copy of the weights.

The one big idea: protobuf's wire format can be walked without understanding it. All bytes are copied but the data of long initializers.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

LONG = 1 << 16  # bytes of an initializer that is left empty
GRAPH, INITIALIZER = 7, 5  # field numbers of onnx.ModelProto and GraphProto
KEPT = frozenset({1, 2, 8})  # of TensorProto: dims, data_type, name
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types


def outline(content: bytes) -> onnx.ModelProto:
    """The model; its long initializers have their shape, type and name only. Raises DecodeError for bytes that are no model."""
    proto = onnx.ModelProto()
    proto.ParseFromString(bytes(_model(memoryview(content))))
    return proto


def _model(content: memoryview) -> bytearray:
    short = bytearray()
    for number, field, payload in _fields(content):
        short += _delimited(number, _graph(payload)) if number == GRAPH else field
    return short


def _graph(content: memoryview) -> bytearray:
    short = bytearray()
    for number, field, payload in _fields(content):
        is_long = number == INITIALIZER and len(payload) > LONG
        short += _delimited(number, b"".join(part for each, part, _ in _fields(payload) if each in KEPT)) if is_long else field
    return short


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(number, the whole field, its payload if that has a length) of each field of a message."""
    position = 0
    while position < len(content):
        start = position
        key, position = _varint(content, position)
        number, kind = divmod(key, 8)
        begin = position
        if kind == VARINT:
            _, position = _varint(content, position)
        elif kind == DELIMITED:
            length, begin = _varint(content, position)
            position = begin + length
        elif kind in (FIXED64, FIXED32):
            position += 8 if kind == FIXED64 else 4
        else:
            raise DecodeError(f"wire type {kind}")
        if position > len(content):
            raise DecodeError("a field is longer than its message")
        yield number, content[start:position], content[begin:position]


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = shift = 0
    while position < len(content) and shift < 70:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise DecodeError("a number has no end")


def _delimited(number: int, payload: bytes | bytearray) -> bytes:
    length, encoded = len(payload), bytearray()
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    return bytes([8 * number + DELIMITED, *encoded, length]) + payload
