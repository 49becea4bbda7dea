"""The integer Graph as two files of a package: `graph.json` (who is what) and `graph.bin` (the constants), and back.

The one big idea: the JSON is derived from the dataclasses of `npucc.ops`, so an operator with a new attribute needs no change here.
The same graph gives the same bytes. What is read back is checked as if a stranger had written it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from isa.errors import PackageError
from isa.program import DTYPES
from npucc import scalar
from npucc.errors import GraphError
from npucc.graph import Graph, Node, Quant, Tensor, make_graph
from npucc.ops import OPS, Attributes

VERSION = 1
JSON_NAME, BIN_NAME = "graph.json", "graph.bin"

_DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
_STORED = tuple(DTYPES)
_ALIGNMENT = 8
_MAX_DEPTH = 200  # nesting of an expression
_MAX_RANK = 16


def to_bytes(graph: Graph) -> tuple[bytes, bytes]:
    """(graph.json, graph.bin) of a graph."""
    blob = bytearray()
    tensors = [_tensor_record(tensor, blob) for tensor in graph.tensors.values()]
    record = {
        "version": VERSION, "name": graph.name, "inputs": list(graph.inputs), "outputs": list(graph.outputs),
        "tensors": tensors, "nodes": [_node_record(node, blob) for node in graph],
    }  # fmt: skip
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(), bytes(blob)


def from_bytes(text: bytes, blob: bytes, *, file: str = "") -> Graph:
    """The graph of (graph.json, graph.bin), verified. Raises PackageError."""
    try:
        record = json.loads(text.decode())
        if not isinstance(record, dict) or record.get("version") != VERSION:
            found = record.get("version") if isinstance(record, dict) else type(record).__name__
            raise _MalformedError(f"version is {found!r}, expected {VERSION}")
        tensors = [_tensor(entry, blob) for entry in _items(record, "tensors", dict)]
        nodes = [_node(entry, blob) for entry in _items(record, "nodes", dict)]
        _refuse_duplicates("tensor", [tensor.name for tensor in tensors])
        _refuse_duplicates("node", [node.name for node in nodes])
        known = {tensor.name: tensor for tensor in tensors}
        inputs, outputs = _items(record, "inputs", str), _items(record, "outputs", str)
        for name in (*inputs, *outputs):
            if name not in known:
                raise _MalformedError(f"graph input or output {name!r} is no tensor")
        graph = make_graph(_get(record, "name", str), nodes, known, inputs, outputs)
        _refuse_missing_scales(graph)
        return graph
    except GraphError as error:
        raise _damaged(error.message, file) from error
    except _MalformedError as error:
        raise _damaged(str(error), file) from None
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        AttributeError,
    ) as error:  # absurd sizes reach the shape rules of the operators
        raise _damaged(f"{type(error).__name__}: {error}", file) from error


class _MalformedError(Exception):
    """What is wrong with the record; becomes a PackageError that names the file."""


def _damaged(what: str, file: str) -> PackageError:
    return PackageError(f"{JSON_NAME}: {what}", file=file, hint="the package is damaged or was written by another version; compile the model again")


# writing


def _tensor_record(tensor: Tensor, blob: bytearray) -> dict[str, Any]:
    record: dict[str, Any] = {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
    if tensor.source:
        record["source"] = tensor.source
    if tensor.data is not None:
        record["data"] = _append(tensor.data, blob)
    if tensor.quant is not None:
        record["quant"] = _quant_record(tensor.quant, blob)
    return record


def _quant_record(quant: Quant, blob: bytearray) -> dict[str, Any]:
    scale = np.asarray(quant.scale, np.float32)
    record: dict[str, Any] = {"dtype": quant.dtype, "scale": _plain(float(scale)) if scale.ndim == 0 else _append(scale, blob)}
    if quant.zero:
        record["zero"] = int(quant.zero)
    if quant.axis is not None:
        record["axis"] = int(quant.axis)
    return record


def _append(array: np.ndarray[Any, Any], blob: bytearray) -> dict[str, Any]:
    """Put an array at the end of the constants, little endian, and say where."""
    blob.extend(bytes(-len(blob) % _ALIGNMENT))
    offset = len(blob)
    blob.extend(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
    return {"dtype": array.dtype.name, "shape": list(array.shape), "offset": offset}


def _node_record(node: Node, blob: bytearray) -> dict[str, Any]:
    record: dict[str, Any] = {"name": node.name, "op": node.op, "inputs": list(node.inputs), "outputs": list(node.outputs)}
    attributes = {
        field.name: _plain(getattr(node.attributes, field.name), blob)
        for field in dataclasses.fields(node.attributes)
        if getattr(node.attributes, field.name) != field.default
    }
    if attributes:
        record["attributes"] = attributes
    if node.sources:
        record["sources"] = list(node.sources)
    return record


def _plain(value: Any, blob: bytearray | None = None) -> Any:
    """A Python value as JSON: tuples become lists, numbers that JSON lacks {"float": "inf"}, bytes a place in the constants."""
    if isinstance(value, tuple):
        return [_plain(item, blob) for item in value]
    if isinstance(value, bytes) and blob is not None:
        return {"bytes": _append(np.frombuffer(value, np.uint8), blob)}
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"attribute value {value!r} of {type(value).__name__} can't be saved")  # a bug of npucc: attributes are plain values


# reading


def _get(record: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    value = record.get(key, default)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _MalformedError(f"{key!r} is {_short(value)}, expected {' or '.join(each.__name__ for each in kinds)}")
    return value


def _items(record: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = _get(record, key, list, [])
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _MalformedError(f"{key!r} holds {_short(value)}, expected {kind.__name__}")
    return list(values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _refuse_duplicates(kind: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _MalformedError(f"{kind} {name!r} is given twice")
        seen.add(name)


def _refuse_missing_scales(graph: Graph) -> None:
    """An integer graph has a scale for whatever is computed outside the host's segments, and for weights."""
    if all(tensor.quant is None for tensor in graph.tensors.values()):
        return
    for node in graph:
        for name in () if OPS[node.op].host else (*node.inputs, *node.outputs):
            tensor = graph.tensors.get(name)
            if tensor is not None and tensor.quant is None and (not tensor.is_constant or OPS[node.op].matrix):
                raise _MalformedError(f"tensor {name!r} of node {node.name!r} has no scale")


def _shape(record: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(_items(record, "shape", int))
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape) or math.prod(shape) >= 1 << 62:
        raise _MalformedError(f"shape {_short(list(shape))} is impossible")
    return shape


def _word(record: dict[str, Any], key: str, words: tuple[str, ...], default: str | None = None) -> str:
    value: str = _get(record, key, str, default)
    if value not in words:
        raise _MalformedError(f"{key!r} is {value!r}, expected one of {', '.join(words)}")
    return value


def _array(record: dict[str, Any], blob: bytes) -> np.ndarray[Any, Any]:
    """The array that a record points at; it must lie within the constants."""
    dtype = np.dtype(_word(record, "dtype", _DTYPES)).newbyteorder("<")
    shape, offset = _shape(record), _get(record, "offset", int)
    size = math.prod(shape) * dtype.itemsize
    if offset < 0 or offset + size > len(blob):
        raise _MalformedError(f"{size} bytes at {offset} lie outside the {len(blob)} bytes of {BIN_NAME}")
    return np.frombuffer(blob, dtype, math.prod(shape), offset).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _tensor(record: dict[str, Any], blob: bytes) -> Tensor:
    name, shape = _get(record, "name", str), _shape(record)
    data = _array(_get(record, "data", dict), blob) if "data" in record else None
    if data is not None and data.shape != shape:
        raise _MalformedError(f"tensor {name!r} has shape {list(shape)}, but its constant has {list(data.shape)}")
    quant = _quant(_get(record, "quant", dict), shape, blob) if "quant" in record else None
    return Tensor(name, shape, _word(record, "dtype", _DTYPES), data, quant, _get(record, "source", str, ""))


def _quant(record: dict[str, Any], shape: tuple[int, ...], blob: bytes) -> Quant:
    axis = _get(record, "axis", int) if "axis" in record else None
    stored = record.get("scale")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinity, refused below
        scale = _array(stored, blob) if isinstance(stored, dict) and "offset" in stored else np.asarray(_value(stored), np.float32)
    if scale.dtype != np.float32 or not np.isfinite(scale).all() or not (scale > 0).all():
        raise _MalformedError(f"scale {_short(stored)} is not a positive number")
    wanted = () if axis is None else (shape[axis],) if -len(shape) <= axis < len(shape) else None
    if scale.shape != wanted:
        raise _MalformedError(f"{scale.shape} scales for axis {axis} of shape {list(shape)}")
    return Quant(_word(record, "dtype", _STORED), scale, _get(record, "zero", int, 0), axis)


def _node(record: dict[str, Any], blob: bytes) -> Node:
    name, op = _get(record, "name", str), _word(record, "op", tuple(OPS))
    attributes = _attributes(OPS[op].attributes, _get(record, "attributes", dict, {}), name, blob)
    inputs, outputs, sources = (tuple(_items(record, key, str)) for key in ("inputs", "outputs", "sources"))
    if not outputs:
        raise _MalformedError(f"node {name!r} has no output")
    return Node(name, op, inputs, outputs, attributes, sources)


def _attributes(kind: type[Attributes], record: dict[str, Any], node: str, blob: bytes) -> Attributes:
    known = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, stored in record.items():
        if key not in known:
            raise _MalformedError(f"node {node!r} has unknown attribute {key!r}")
        is_place = isinstance(stored, dict) and list(stored) == ["bytes"] and isinstance(stored["bytes"], dict)
        value = _array(stored["bytes"], blob).tobytes() if is_place else _value(stored)
        if not _is_like(value, known[key].default, str(known[key].type)):
            raise _MalformedError(f"node {node!r}: attribute {key} is {_short(value)}, expected {known[key].type}")
        values[key] = value
    return kind(**values)


def _value(stored: Any, depth: int = 0) -> Any:
    """The Python value of an attribute: lists become tuples, {"float": "inf"} the number."""
    if depth > _MAX_DEPTH:
        raise _MalformedError("an attribute is nested too deep")
    if isinstance(stored, list):
        return tuple(_value(item, depth + 1) for item in stored)
    if isinstance(stored, dict):
        if list(stored) != ["float"] or stored["float"] not in ("inf", "-inf", "nan"):
            raise _MalformedError(f"{_short(stored)} is no attribute value")
        return float(stored["float"])
    return stored


def _is_like(value: Any, default: Any, kind: str) -> bool:
    """Whether an attribute has the type that its field says (`Any` takes everything)."""
    if kind == "Any":
        return True
    if kind == "scalar.Expression":
        return scalar.is_expression(value)
    if kind == "Clamp":
        return value is None or (_numbers(value, int | float) and len(value) == 2)
    if isinstance(default, tuple):
        wanted = int | float if "float" in kind else int
        return _numbers(value, wanted) and ("..." in kind or len(value) == len(default))
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _numbers(value: Any, kind: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
