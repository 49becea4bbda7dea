"""Host segments: their tensors over DRAM, the segment in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from isa.program import Tile, Value
from npucc import segments
from npucc.graph import Graph, Quant
from npucc.lowering.emitter import Emitter
from npucc.lowering.layers import Group
from npucc.lowering.views import View
from npucc.ops import OPS

_AS_IT_IS = Quant("f32", np.asarray(1.0, np.float32), 0)


def lower_host(emitter: Emitter, group: Group) -> None:
    """Take every input, run the segment, give every output. Stated by the tensors' own scales; the segment's number is its place in the graph."""
    node, graph = group.anchor, emitter.graph
    number = [each.name for each in segments.host_nodes(graph)].index(node.name)
    for port, (name, dtype) in enumerate(zip(node.inputs, segments.input_types(node), strict=True)):
        emitter.issue("take", _tile(emitter, name), port=port, q=_scale(graph, name), type=dtype)
    emitter.issue("host", segment=number)
    for port, name in enumerate(node.outputs):
        emitter.issue("give", _tile(emitter, name), port=port, q=_scale(graph, name))


def host_buffers(graph: Graph, views: Mapping[str, View]) -> frozenset[str]:
    """Buffers that the host reads or writes: they lie in DRAM, which is all that it sees."""
    names = (name for node in graph if OPS[node.op].host for name in (*node.inputs, *node.outputs))
    return frozenset(views[name].buffer for name in names if name in views)


def _tile(emitter: Emitter, name: str) -> Tile:
    data = emitter.graph.tensors[name].data
    if data is None:
        return emitter.tile(emitter.placement.views[name])
    quant = emitter.graph.tensors[name].quant
    view = emitter.constant(data, quant.dtype if quant else segments.RAW[str(data.dtype)])
    return replace(emitter.tile(view), shape=data.shape, strides=view.strides)


def _scale(graph: Graph, name: str) -> Value:
    quant = graph.tensors[name].quant or _AS_IT_IS
    return (float(quant.scale), quant.zero)
