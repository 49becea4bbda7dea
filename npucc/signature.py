"""The inputs of a model, a graph and a program, each as ports: name, ONNX shape, element type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from isa import Program
from npucc.feeds import Port

if TYPE_CHECKING:
    import onnx

    from npucc.graph import Graph


def ports_of_model(model: str | Path | onnx.ModelProto) -> dict[str, Port | None]:
    """The inputs as the ONNX model declares them, before shapes are bound; None where it states no rank. Raises ImportModelError."""
    from npucc.frontend.load import load_model
    from npucc.frontend.prepare import numpy_name

    proto, _ = load_model(model, any_opset=True)  # who imports the model looks at its opset
    stored = {tensor.name for tensor in proto.graph.initializer} | {tensor.values.name for tensor in proto.graph.sparse_initializer}
    ports: dict[str, Port | None] = {}
    for value in proto.graph.input:
        if value.name in stored:
            continue
        tensor = value.type.tensor_type
        sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
        ports[value.name] = Port(value.name, sizes, numpy_name(tensor.elem_type)) if tensor.HasField("shape") and tensor.elem_type else None
    return ports


def ports_of_graph(graph: Graph) -> tuple[Port, ...]:
    """The inputs of a graph; every size is known."""
    return tuple(Port(name, graph.tensors[name].shape, graph.tensors[name].dtype) for name in graph.inputs)


def ports_of_program(program: Program) -> tuple[Port, ...]:
    """The inputs of a program, as they look from outside."""
    return tuple(Port(record.name, record.tile.shape, record.dtype) for record in program.inputs)
