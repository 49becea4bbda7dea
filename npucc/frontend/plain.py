"""What the export spelled out in integers, as the operators that it stands for.

The one big idea: the node that ends a spelled out operator carries the plain form of it as metadata. That takes the node's place, and what was
spelled out is read by nothing any more.
"""

from __future__ import annotations

import base64

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto

from npucc.errors import ImportModelError
from npucc.export.model import PLAIN_FORM


def restore_plain_forms(model: ModelProto, file: str) -> None:
    """Put plain forms in the place of what was spelled out. Changes `model`. Raises ImportModelError for damaged metadata."""
    nodes, changed = [], False
    for node in model.graph.node:
        noted = next((entry.value for entry in node.metadata_props if entry.key == PLAIN_FORM), None)
        if noted is None:
            nodes.append(node)
            continue
        try:
            plain = GraphProto.FromString(base64.b64decode(noted))
        except (ValueError, DecodeError):
            raise ImportModelError(
                f"the metadata {PLAIN_FORM!r} is not an ONNX graph in base64",
                file=file,
                node=node.name,
                hint="export the package again, or delete it",
            ) from None
        nodes += plain.node
        model.graph.initializer.extend(plain.initializer)
        changed = True
    if changed:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
