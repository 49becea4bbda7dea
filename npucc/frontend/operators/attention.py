"""Attention as onnxruntime's own domain (com.microsoft) has it. (ONNX's own is a function, and written out as such.)

The one big idea: keys and values that come in as a cache stand before the new ones; a mask says which of them each query may see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.indexing import select
from npucc.frontend.operators.quantized import MICROSOFT
from npucc.frontend.operators.transformer import turned

EXCLUDED = -math.inf  # the score of what is masked


def attention(node: NodeImport) -> list[str]:
    """Self-attention of x [batch, steps, width] with one product for queries, keys and values; the second result is [2, batch, heads, …]."""
    batch, steps, _ = node.shape(0)
    sizes = node.integers("qkv_hidden_sizes") or [node.shape(1)[1] // 3] * 3
    bias = (node.new_constant(node.floats(2, "bias"), "bias"),) if node.has(2) else ()
    product = node.emit("matmul", (node.input(0), node.input(1), *bias), ops.MatMul())
    starts = (0, sizes[0], sizes[0] + sizes[1])
    heads = node.integer("num_heads", 1)
    parts = [_heads(node, node.slice(product, 2, start, size), heads) for start, size in zip(starts, sizes, strict=True)]
    if node.has(4):
        past = [node.reshape(node.slice(node.input(4), 0, i, 1), node.shape(4)[1:]) for i in (0, 1)]
        parts[1:] = [node.emit("concat", (old, new), ops.Concat(2)) for old, new in zip(past, parts[1:], strict=True)]
    result = _attend(node, parts, mask=3, bias=5)
    present = [node.reshape(part, (1, *node.shape_of(part))) for part in parts[1:]]
    return [_merged(node, result, (batch, steps, sizes[2])), node.emit("concat", present, ops.Concat(0))]


def multi_head_attention(node: NodeImport) -> list[str]:
    """Attention of queries, keys and values [batch, steps, width]; keys and values may be split into heads already."""
    if node.rank() != 3 or not (node.has(1) and node.has(2)):
        raise node.refuse("its queries, keys and values are packed")
    heads = node.integer("num_heads", 1)
    parts = [node.input(index) for index in range(3)]
    if node.has(3):
        bias = node.floats(3, "bias").reshape(-1)
        sizes = [node.shape_of(part)[-1] for part in parts]
        pieces = np.split(bias, np.cumsum(sizes)[:2])
        parts = [node.binary("add", part, node.new_constant(piece, "bias")) for part, piece in zip(parts, pieces, strict=True)]
    split = [_heads(node, part, heads) if len(node.shape_of(part)) == 3 else part for part in parts]
    for index in (6, 7):
        if node.has(index):
            split[index - 5] = node.emit("concat", (node.input(index), split[index - 5]), ops.Concat(2))
    result = _attend(node, split, mask=4, bias=5)
    batch, steps, _ = node.shape(0)
    return [_merged(node, result, (batch, steps, heads * node.shape_of(split[2])[3])), split[1], split[2]]


def _heads(node: NodeImport, x: str, heads: int) -> str:
    """[batch, steps, heads · size] as [batch, heads, steps, size]."""
    batch, steps, width = node.shape_of(x)
    return node.transpose(node.reshape(x, (batch, steps, heads, width // heads)), (0, 2, 1, 3))


def _merged(node: NodeImport, x: str, shape: tuple[int, ...]) -> str:
    return node.reshape(node.transpose(x, (0, 2, 1, 3)), shape)


def _attend(node: NodeImport, parts: Sequence[str], *, mask: int, bias: int) -> str:
    """softmax(q · kᵀ · scale, masked) · v; all [batch, heads, steps, size]."""
    query, key, value = parts
    scale = node.real("scale", 0.0) or 1 / math.sqrt(node.shape_of(query)[3])
    scores = node.emit("matmul", (query, node.transpose(key, (0, 1, 3, 2))), ops.MatMul())
    scores = node.table(("mul", "x", scale), scores)
    if node.has(bias):
        scores = node.binary("add", scores, node.input(bias))
    out = node.new_constant(EXCLUDED, "excluded")
    if node.has(mask):
        scores = select(node, _kept(node, mask, node.shape_of(scores)), scores, out)
    if node.integer("unidirectional", 0):
        steps, total = node.shape_of(scores)[2:]
        scores = select(node, node.new_constant(np.tri(steps, total, total - steps, dtype=bool), "causal"), scores, out)
    return node.emit("matmul", (node.emit("softmax", (scores,), ops.Softmax(3)), value), ops.MatMul())


def _kept(node: NodeImport, mask: int, scores: tuple[int, ...]) -> str:
    """Which scores count, by a mask [batch, keys] or [batch, queries, keys] of 0 and 1, or by the number of keys per batch entry."""
    shape, tensor = node.shape(mask), node.input(mask)
    if len(shape) == 1:
        if shape != (scores[0],):
            raise node.refuse(f"has a mask of shape {list(shape)}; supported are [batch], [batch, keys] and [batch, queries, keys]")
        keys = node.new_constant(np.arange(scores[3]), "positions")
        return node.emit("compare", (keys, node.reshape(tensor, (shape[0], 1, 1, 1))), ops.Compare("lt"), dtype="bool")
    if len(shape) not in (2, 3):
        raise node.refuse(f"has a mask of shape {list(shape)}; supported are [batch], [batch, keys] and [batch, queries, keys]")
    tensor = node.reshape(tensor, (shape[0], 1, shape[1] if len(shape) == 3 else 1, shape[-1]))
    if node.dtype_of(tensor) == "bool":
        return tensor
    return node.emit("compare", (tensor, node.new_constant(0.0, "zero")), ops.Compare("ne"), dtype="bool")


# ---- groups of queries that share keys and values

PLAIN = {"smooth_softmax": 0, "qk_output": 0, "sliding_window_cache": 0, "kv_cache_bit_width": 0}  # attributes that must have these values
LAST_INPUT = 10  # what follows: an additional key, quantized caches, norms, padded queries


def group_query_attention(node: NodeImport) -> list[str]:
    """Queries [batch, steps, heads · size]; keys and values of fewer heads, or all three packed in one; the cache, whole, is the other result.

    Of the keys in the cache those count that stand before the new ones: as many as total_sequence_length says if a prompt is all of it, else
    seqlens_k, which may be computed for a single step.
    """
    strange = next((name for name, value in PLAIN.items() if node.integer(name, value) not in (value, -1)), "")
    if strange or any(node.has(index) for index in range(LAST_INPUT + 1, len(node.inputs))):
        raise node.refuse(f"{strange or 'an input after attention_bias'} is not supported")
    heads, shared = node.integer("num_heads", 1), node.integer("kv_num_heads", 1)
    parts = _queries_keys_values(node, heads, shared)
    batch, _, steps, size = node.shape_of(parts[0])
    total, first = int(node.constant(6, "total_sequence_length").reshape(())), _first_step(node, steps)
    if node.integer("do_rotary", 0):
        angles = [_angles(node, cache, steps, first) for cache in (7, 8)]
        parts[:2] = [turned(node, part, angles, interleaved=bool(node.integer("rotary_interleaved", 0))) for part in parts[:2]]
    present = [_with_past(node, 3 + i, part, total, first) for i, part in enumerate(parts[1:])]
    keys, values = (node.slice(each, 2, 0, total) for each in present)
    grouped = (batch, shared, heads // shared * steps)
    scores = node.emit("matmul", (node.reshape(parts[0], (*grouped, size)), node.transpose(keys, (0, 1, 3, 2))), ops.MatMul())
    scores = node.table(_score(node, size), node.reshape(scores, (batch, heads, steps, total)))
    scores = node.binary("add", scores, node.input(LAST_INPUT)) if node.has(LAST_INPUT) else scores
    for seen in _seen(node, steps, total, first):
        scores = select(node, seen, scores, node.new_constant(EXCLUDED, "excluded"))
    weights = node.reshape(node.emit("softmax", (scores,), ops.Softmax(3)), (*grouped, total))
    result = node.reshape(node.emit("matmul", (weights, values), ops.MatMul()), (batch, heads, steps, size))
    return [_merged(node, result, (batch, steps, heads * size)), *present]


def _queries_keys_values(node: NodeImport, heads: int, shared: int) -> list[str]:
    """Each [batch, its heads, steps, size]."""
    if node.has(1):
        return [_heads(node, node.input(index), count) for index, count in enumerate((heads, shared, shared))]
    size = node.shape(0)[2] // (heads + 2 * shared)
    starts = (0, heads * size, (heads + shared) * size)
    return [_heads(node, node.slice(node.input(0), 2, start, n * size), n) for start, n in zip(starts, (heads, shared, shared), strict=True)]


def _first_step(node: NodeImport, steps: int) -> int | None:
    """Where the first new key stands; None where seqlens_k says that of a single step as the model runs."""
    if not node.has(3) or int(node.constant(6, "total_sequence_length").reshape(())) == steps:
        return 0
    if not node.is_constant(5):
        if steps > 1:
            raise node.refuse("has more than one new step after a cache of computed length (seqlens_k)", hint="give one step at a time")
        return None
    lengths = np.unique(node.constant(5, "seqlens_k"))
    if lengths.size > 1:
        raise node.refuse("the lengths in its batch differ (seqlens_k)", hint="give one sequence at a time")
    return int(lengths[0]) + 1 - steps


def _angles(node: NodeImport, cache: int, steps: int, first: int | None) -> str:
    """Cosines or sines [batch or 1, 1, steps, half] of the new steps."""
    given = next((index for index in (9, 5) if node.has(index) and (index == 9 or first is None)), None)
    if given is None or (given == 9 and node.is_constant(given)):
        start = first if given is None else int(node.constant(given, "position_ids").reshape(-1)[0])
        assert start is not None
        return node.reshape(node.slice(node.input(cache), 0, start, steps), (1, 1, steps, node.shape(cache)[1]))
    if steps > 1:
        raise node.refuse("the positions of several steps are computed (position_ids)", hint="leave them out")
    found = node.emit("gather", (node.input(cache), node.input(given)), ops.Gather(0))
    return node.reshape(found, (math.prod(node.shape(given)), 1, 1, node.shape(cache)[1]))


def _with_past(node: NodeImport, past: int, new: str, total: int, first: int | None) -> str:
    """The cache with the new keys or values in their place."""
    if not node.has(past):
        return new
    old, (_, _, length, _), steps = node.input(past), node.shape(past), node.shape_of(new)[2]
    if first is None:
        padded = node.emit("concat", (old, new), ops.Concat(2)) if total > length else old
        here = node.emit("compare", (_places(node, max(total, length)), _lengths(node)), ops.Compare("eq"), dtype="bool")
        return select(node, here, new, padded)
    parts = [node.slice(old, 2, 0, first)] if first else []
    rest = [node.slice(old, 2, first + steps, length - first - steps)] if length > first + steps else []
    return node.emit("concat", (*parts, new, *rest), ops.Concat(2)) if parts or rest else new


def _places(node: NodeImport, count: int, start: int = 0) -> str:
    return node.new_constant(np.arange(start, start + count).reshape(1, 1, count, 1), "places")


def _lengths(node: NodeImport) -> str:
    """seqlens_k, that is, the position of the single new step."""
    return node.reshape(node.input(5), (node.shape(5)[0], 1, 1, 1))


def _score(node: NodeImport, size: int) -> scalar.Expression:
    """A score of a product of queries and keys."""
    scaled: scalar.Expression = ("mul", "x", node.real("scale", 0.0) or 1 / math.sqrt(size))
    cap = node.real("softcap", 0.0)
    return ("mul", ("tanh", ("div", scaled, cap)), cap) if cap else scaled


def _seen(node: NodeImport, steps: int, total: int, first: int | None) -> Iterator[str]:
    """Which keys each query may see: none that come later, and no more than the window's before it."""
    window, causal = node.integer("local_window_size", -1), node.integer("causal", 1)
    if first is None:
        places = np.arange(total).reshape(1, 1, 1, total)
        limits = [(places, "le"), *([(places + window, "gt")] if window > 0 else [])]
        for limit, kind in limits:
            yield node.emit("compare", (node.new_constant(limit, "places"), _lengths(node)), ops.Compare(kind), dtype="bool")
        return
    ago = first + np.arange(steps)[:, None] - np.arange(total)
    seen = (ago >= 0) & (ago < (window if window > 0 else total)) if causal else np.ones(ago.shape, bool)
    if not seen.all():
        yield node.new_constant(seen, "seen")


TABLE: tuple[Importer, ...] = (
    Importer("Attention", attention, "constant weights", domain=MICROSOFT),
    Importer("MultiHeadAttention", multi_head_attention, "separate queries, keys and values", domain=MICROSOFT),
    Importer("GroupQueryAttention", group_query_attention, "constant total_sequence_length, no quantized cache", domain=MICROSOFT),
)
