"""Padding becomes part of the window operation after it.

The one big idea: a window operation has a padding value of its own (0 for a convolution, −∞ for a maximum); a Pad with that value, or with one
that makes no difference, is not needed. A Pad(−∞) left standing would also ruin the quantization range of its tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from npucc import ops
from npucc.graph import Editor, Node
from npucc.passes.rewrite import Result, Rewrite, Rule, merged_sources
from npucc.passes.values import lower_bound

VERY_LOW = -1e30  # no activation is as low; exporters write −∞ or the lowest float


def fold_pad(editor: Editor, node: Node) -> Result:
    """y = conv(pad(x, 1,1,1,1))  →  y = conv(x) pads=1,1,1,1   (average_pool that counts its padding, max_pool with a value no element lies below)"""
    pad = editor.producer(node.inputs[0])
    if pad is None or pad.op != "pad":
        return None
    assert isinstance(pad.attributes, ops.Pad)
    a = pad.attributes
    if a.mode != "constant":
        return f"the padding is {a.mode}, not constant"
    if any((*a.before[:2], *a.after[:2])):
        return "the padding is not only spatial"
    reason = _refuse_value(editor, node, pad, a.value)
    if reason:
        return reason
    attributes: Any = node.attributes
    added = (*a.before[2:], *a.after[2:])
    changed = replace(attributes, pads=tuple(old + new for old, new in zip(attributes.pads, added, strict=True)))
    if node.op == "average_pool":
        changed = replace(changed, count_include_pad=True)
    return Rewrite((replace(node, inputs=(pad.inputs[0], *node.inputs[1:]), attributes=changed, sources=merged_sources(pad, node)),))


def _refuse_value(editor: Editor, node: Node, pad: Node, value: float) -> str:
    """Why a padding value does not suit the window operation; "" if it does."""
    if isinstance(node.attributes, ops.Conv):
        return "" if value == 0 else f"the padding value is {value}, not 0"
    assert isinstance(node.attributes, ops.Pool)
    if node.op == "average_pool":
        if value != 0:
            return f"the padding value is {value}, not 0"
        return "the pool has padding of its own that it does not count" if any(node.attributes.pads) and not node.attributes.count_include_pad else ""
    if value <= VERY_LOW or value <= lower_bound(editor, pad.inputs[0]):
        return _refuse_own_padding(node, value)
    return f"the padding value {value} could exceed an element"


def _refuse_own_padding(node: Node, value: float) -> str:
    """A finite value next to the pool's own −∞: windows of padding alone would differ, which can't happen if the kernel is larger than the pads."""
    a = node.attributes
    assert isinstance(a, ops.Pool)
    return "" if value <= VERY_LOW or not any(a.pads) else f"the pool has padding of its own, and the padding value is {value}"


PADDING_RULES: tuple[Rule, ...] = (
    Rule("fold-pad", frozenset({"conv", "max_pool", "average_pool"}), fold_pad, "a window operation pads by itself"),
)  # fmt: skip
