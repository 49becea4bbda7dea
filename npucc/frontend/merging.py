"""Weights that lie in the graph several times, once.

The one big idea: who writes a recurrence out step by step (an exporter, or the importer a Loop) gets a copy of its weights for each step, transposed
ones at least. Later stages know steps by the weights that they read, quantize each weight once and store it once.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from npucc.graph import Editor, Tensor
from npucc.ops import OPS


def merge_weights(editor: Editor) -> None:
    """Matrix operators that read equal constants read the first of them."""
    readers = [node for node in editor.nodes.values() if OPS[node.op].matrix]
    constants = {name: editor.tensors[name] for node in readers for name in node.inputs[1:] if name and editor.tensors[name].is_constant}
    shapes: dict[object, list[str]] = {}
    for name, tensor in constants.items():
        if tensor.given is None:
            shapes.setdefault((tensor.shape, tensor.dtype), []).append(name)
    firsts: dict[bytes, str] = {}
    same = {name: firsts.setdefault(_digest(constants[name]), name) for names in shapes.values() if len(names) > 1 for name in names}
    for node in readers:
        inputs = (node.inputs[0], *(same.get(name, name) for name in node.inputs[1:]))
        if inputs != node.inputs:
            editor.add_node(replace(node, inputs=inputs))


def _digest(tensor: Tensor) -> bytes:
    assert tensor.data is not None
    digest = hashlib.sha256(repr((tensor.shape, tensor.dtype)).encode())
    digest.update(np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).data)  # no copy: the data may lie in a file
    return digest.digest()
