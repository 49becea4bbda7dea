"""Copies of 16-bit tensors for matrix products, with a scale per channel.

The one big idea: a tensor that keeps 16 bits (a residual stream) is copied to 8 bits for the products that read it anyway. The copy may scale each
channel on the way, a product with whole numbers instead of a mere conversion, and the weights behind it take that back: a few loud channels no
longer set the steps of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from npucc import ops
from npucc.graph import Editor, Graph, Node
from npucc.quantize.chains import reads_channels
from npucc.quantize.precision import wide_roots
from npucc.quantize.repeats import repeated
from npucc.quantize.share import share_scales


def with_taps(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """The graph in which matrix products read what keeps 16 bits by rule through a product with ones, one for each channel; those products' names."""
    repeats = repeated(graph)
    groups = share_scales(graph, {}, repeats)[1]
    wide = wide_roots(graph, groups)
    editor, taps = Editor(graph), []
    for name, tensor in graph.tensors.items():
        place = (name, len(tensor.shape) - 1)
        readers = [node for node in graph.users(name) if node.op == "matmul" and reads_channels(graph, node, place)]
        if not readers or tensor.is_constant or tensor.given is not None or name in repeats or groups.root(name) not in wide:
            continue
        ones = editor.constant(f"{name}/channels", np.ones(tensor.shape[-1], np.float32))
        tapped = editor.add_tensor(replace(tensor, name=editor.fresh(f"{name}/by channel"), source="", wide=False))
        taps.append(editor.fresh(f"{tapped}:mul"))
        editor.add_node(Node(taps[-1], "mul", (name, ones), (tapped,), ops.Binary(), readers[0].sources), at=readers[0].name)
        for node in readers:
            editor.add_node(replace(node, inputs=(tapped, *node.inputs[1:])))
    return editor.freeze(), tuple(taps)


def without_idle(graph: Graph, taps: Sequence[str]) -> Graph:
    """The graph without those of the products that still have nothing but ones."""
    editor = Editor(graph)
    for node in (graph.nodes[name] for name in taps):
        factors = graph.tensors[node.inputs[1]].data
        if factors is not None and (factors == 1).all():
            editor.replace_input(node.outputs[0], node.inputs[0])
            editor.remove_node(node.name)
    return editor.freeze()
