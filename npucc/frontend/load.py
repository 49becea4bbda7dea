"""Reading a model: bytes to a ModelProto that has all its tensors, or a clear error.

The one big idea: nothing in the file is believed. Sizes are checked before memory is asked for, and external data must lie in the model's folder.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper

from npucc.errors import ImportModelError

LARGEST_FILE = 2**31 - 1  # protobuf's own limit
OLDEST_OPSET = 7
#: element types whose stored bytes are those of a numpy array
MAPPED = {
    getattr(TensorProto, name): np.dtype(stored)
    for name, stored in (("FLOAT", "<f4"), ("INT8", "i1"), ("UINT8", "u1"), ("INT16", "<i2"), ("UINT16", "<u2"), ("INT32", "<i4"), ("INT64", "<i8"))
}


def load_model(model: str | Path | ModelProto, *, any_opset: bool = False) -> tuple[ModelProto, str]:
    """(a private copy of the model, the file name for messages). Raises ImportModelError.

    `any_opset`: nothing but onnxruntime will read its operators. External data is looked for and stays where it is (see `external_bytes`), so that
    it is never in memory twice.
    """
    if isinstance(model, ModelProto):
        copy = ModelProto()
        copy.CopyFrom(model)
        _take_external_data(copy, None, "")
        _check_header(copy, "", any_opset=any_opset)
        return copy, ""
    path = Path(model)
    file = str(path)
    proto = _parse(_read(path), file)
    _check_header(proto, file, any_opset=any_opset)
    _take_external_data(proto, path.parent, file)
    return proto, file


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ImportModelError("this is a folder, not an ONNX file", file=str(path), hint="give the path of the .onnx file in it")
        if size > LARGEST_FILE:
            raise ImportModelError(
                f"the file has {size} bytes; an ONNX file has at most {LARGEST_FILE}", file=str(path), hint="store large weights as external data"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise ImportModelError("there is no such file", file=str(path), hint="check the path of the model") from None
    except OSError as error:
        raise ImportModelError(f"the file can't be read: {error.strerror or error}", file=str(path)) from None


def _parse(content: bytes, file: str) -> ModelProto:
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except (DecodeError, RecursionError):
        raise ImportModelError(
            "this is not an ONNX model, or it is damaged (the protobuf does not parse)", file=file, hint="export or download the model again"
        ) from None
    return proto


def _check_header(model: ModelProto, file: str, *, any_opset: bool) -> None:
    if not model.HasField("graph") or not model.ir_version:
        raise ImportModelError("this is not an ONNX model (it has no graph and no IR version)", file=file, hint="export or download the model again")
    if not model.graph.output:
        raise ImportModelError("the model's graph has no outputs", file=file, hint="export the model again with its outputs")
    opset = default_opset(model)
    newest = onnx.defs.onnx_opset_version()
    if not any_opset and not OLDEST_OPSET <= opset <= newest:
        raise ImportModelError(
            f"the model uses ONNX opset {opset}; supported are {OLDEST_OPSET} to {newest}",
            file=file,
            hint="convert it with onnx.version_converter, or export it again",
        )


def default_opset(model: ModelProto) -> int:
    """The version of the standard operators (1 if the model does not say)."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def _tensors(graph: GraphProto) -> list[TensorProto]:
    """Every stored tensor of the graph: initializers and attributes, in subgraphs too."""
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            found += _attribute_tensors(attribute)
    return found


def _attribute_tensors(attribute: AttributeProto) -> list[TensorProto]:
    if attribute.type == AttributeProto.TENSOR:
        return [attribute.t]
    if attribute.type == AttributeProto.TENSORS:
        return list(attribute.tensors)
    if attribute.type == AttributeProto.GRAPH:
        return _tensors(attribute.g)
    return [tensor for graph in attribute.graphs for tensor in _tensors(graph)]


def _take_external_data(model: ModelProto, folder: Path | None, file: str) -> None:
    """Stored tensors of the main graph get the place of their data written out; others get the data."""
    stays = len(model.graph.initializer)
    for number, tensor in enumerate(_tensors(model.graph)):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        if folder is None:
            raise ImportModelError(
                f"tensor {tensor.name!r} is stored outside the model, and a ModelProto does not say where",
                file=file,
                hint="pass the path of the model, or load it with its external data",
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path, offset, length = _external_place(tensor.name, entries, folder, file)
        tensor.ClearField("external_data")
        for key, value in (("location", path), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        if number >= stays:
            tensor.raw_data = external_bytes(tensor)
            tensor.data_location = TensorProto.DEFAULT
            tensor.ClearField("external_data")


def external_array(tensor: TensorProto) -> np.ndarray[Any, np.dtype[Any]]:
    """The value of a tensor that `load_model` left outside. Where the file has it as numpy does, it is mapped, and takes no memory."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype, offset, length = MAPPED.get(tensor.data_type), int(place["offset"]), int(place["length"])
    if dtype is None or not length or offset % dtype.itemsize or length != dtype.itemsize * math.prod(tensor.dims):
        inside = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=external_bytes(tensor))
        return numpy_helper.to_array(inside)
    return np.asarray(np.memmap(place["location"], dtype, "r", offset, tuple(tensor.dims)))


def external_bytes(tensor: TensorProto) -> bytes:
    """The data of a tensor that `load_model` left outside."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    with Path(place["location"]).open("rb") as stream:
        stream.seek(int(place["offset"]))
        return stream.read(int(place["length"]))


def whole_bytes(model: ModelProto, file: str) -> bytes:
    """The serialized model with the data that `load_model` left outside, tensor by tensor: messages of protobuf that follow each other add up.

    Raises ImportModelError for more than one file of ONNX can hold."""
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    rest = ModelProto()
    rest.CopyFrom(model)
    del rest.graph.initializer[:]
    rest.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL)
    size = rest.ByteSize() + sum(_length(tensor) for tensor in outside)
    if size > LARGEST_FILE:
        raise ImportModelError(
            f"the model has {size} bytes with its external data; a host segment has at most {LARGEST_FILE}", file=file,
            hint="compile it to integers (without quant none)",
        )  # fmt: skip
    stream = io.BytesIO(rest.SerializeToString(deterministic=True))
    stream.seek(0, io.SEEK_END)
    for tensor in outside:
        inside = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=external_bytes(tensor))
        stream.write(ModelProto(graph=GraphProto(initializer=[inside])).SerializeToString())
    return stream.getvalue()


def _length(tensor: TensorProto) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def _external_place(name: str, entries: dict[str, str], folder: Path, file: str) -> tuple[Path, int, int]:
    """(file, offset, length) of the bytes that an external data record points to; it must name a plain file inside `folder`."""
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
        root = folder.resolve()
        path = (root / location).resolve()
        inside = bool(location) and path.is_relative_to(root) and path.is_file()
        size = path.stat().st_size if inside else 0
    except (ValueError, OSError):
        raise ImportModelError(
            f"tensor {name!r} has a malformed external data record: {entries}", file=file, hint="save the model again with its external data"
        ) from None
    if not inside:
        raise ImportModelError(
            f"tensor {name!r} refers to external data {location!r}, which is not a file inside the model's folder",
            file=file, hint="put the external data next to the model; paths that leave its folder are refused",
        )  # fmt: skip
    length = size - offset if length is None else length
    if offset < 0 or length < 0 or offset + length > size:
        raise ImportModelError(
            f"tensor {name!r} refers to bytes {offset} to {offset + length} of {location!r}, which has {size}",
            file=file,
            hint="the external data file is damaged or from another model",
        )
    return path, offset, length
