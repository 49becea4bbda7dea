"""What transformers are made of, as ONNX and onnxruntime's own domain (com.microsoft) have it: attention, rotary embeddings, fused steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.elementwise import activation
from npucc.frontend.operators.indexing import select
from npucc.frontend.operators.layout import take
from npucc.frontend.operators.matrix import conv, gemm
from npucc.frontend.operators.normalization import layer_norm, per_channel, root_mean_square

MICROSOFT = "com.microsoft"
EXCLUDED = -math.inf  # the score of what is masked


# ---- rotary embeddings


def rotary_embedding(node: NodeImport) -> str:
    """Pairs of features turned by the angle of their position; x is [batch, heads, steps, size] or [batch, steps, heads · size]."""
    return _rotary(node, cos=1, sin=2, positions=3)


def microsoft_rotary_embedding(node: NodeImport) -> str:
    """The same, with the positions (or the first one, for all) as the second input."""
    if node.integer("is_packed_batching", 0):
        raise node.refuse("its batch is packed")
    return _rotary(node, cos=2, sin=3, positions=1)


def _rotary(node: NodeImport, *, cos: int, sin: int, positions: int) -> str:
    shape, rotated = node.shape(0), node.integer("rotary_embedding_dim", 0)
    flat = len(shape) == 3
    x = node.input(0)
    if flat:
        heads = node.integer("num_heads", 0) or shape[2] // (rotated or 2 * node.shape(cos)[-1])
        x = node.reshape(x, (*shape[:2], heads, shape[2] // heads))
    size = node.shape_of(x)[3]
    rotated = rotated or size
    steps = shape[1] if flat else shape[2]
    angles = [_angles(node, index, positions, steps, rotated // 2) for index in (cos, sin)]
    shown = [node.reshape(each, _beside(node.shape_of(each), flat=flat)) for each in angles]
    turned = _turn(node, node.slice(x, 3, 0, rotated), shown, interleaved=bool(node.integer("interleaved", 0)))
    if rotated < size:
        turned = node.emit("concat", (turned, node.slice(x, 3, rotated, size - rotated)), ops.Concat(3))
    return node.reshape(turned, shape)


def _beside(shape: tuple[int, ...], *, flat: bool) -> tuple[int, ...]:
    """[batch, steps, half] with a dimension for the heads."""
    return (shape[0], shape[1], 1, shape[2]) if flat else (shape[0], 1, shape[1], shape[2])


def _angles(node: NodeImport, cache: int, positions: int, steps: int, half: int) -> str:
    """Cosines or sines [batch or 1, steps, half] of the positions."""
    table = node.input(cache)
    if not node.has(positions):
        return node.slice(table, 2, 0, half)
    table = node.slice(table, 1, 0, half) if node.shape(cache)[1] != half else table
    if not node.is_constant(positions):
        if node.shape(positions) == (1,):
            raise node.refuse("the first position must be a constant", hint="give the position of every step")
        return node.emit("gather", (table, node.input(positions)), ops.Gather(0))
    wanted = np.asarray(node.constant(positions, "positions"))
    wanted = (wanted.reshape(1, 1) + np.arange(steps)) if wanted.size == 1 and wanted.ndim < 2 else wanted
    return take(node, table, 0, wanted)


def _turn(node: NodeImport, x: str, angles: Sequence[str], *, interleaved: bool) -> str:
    cos, sin = angles
    shape = node.shape_of(x)
    half = shape[3] // 2
    parts = [node.slice(x, 3, i, half, 2) if interleaved else node.slice(x, 3, i * half, half) for i in (0, 1)]
    real = node.binary("sub", node.binary("mul", parts[0], cos), node.binary("mul", parts[1], sin))
    imaginary = node.binary("add", node.binary("mul", parts[0], sin), node.binary("mul", parts[1], cos))
    if not interleaved:
        return node.emit("concat", (real, imaginary), ops.Concat(3))
    pairs = [node.reshape(each, (*shape[:3], half, 1)) for each in (real, imaginary)]
    return node.reshape(node.emit("concat", pairs, ops.Concat(4)), shape)


# ---- attention of onnxruntime's domain


def attention(node: NodeImport) -> list[str]:
    """Self-attention of x [batch, steps, width] with one product for queries, keys and values; the second result is [2, batch, heads, …]."""
    weights = node.floats(1, "weights")
    batch, steps, _ = node.shape(0)
    sizes = node.integers("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3
    bias = (node.new_constant(node.floats(2, "bias"), "bias"),) if node.has(2) else ()
    product = node.emit("matmul", (node.input(0), node.new_constant(weights, "weights"), *bias), ops.MatMul())
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


# ---- fused steps of onnxruntime's domain


def _sums(node: NodeImport, *indices: int) -> str:
    """The sum of the inputs that are there."""
    parts = [node.input(index) for index in indices if node.has(index)]
    total = parts[0]
    for part in parts[1:]:
        total = node.binary("add", total, part)
    return total


def skip_layer_normalization(node: NodeImport) -> list[str]:
    """LayerNorm of input + skip + bias; the fourth result is that sum."""
    total = _sums(node, 0, 1, 4)
    return [layer_norm(node, total, 2, 3, node.real("epsilon", 1e-12)), "", "", total]


def skip_simplified_layer_normalization(node: NodeImport) -> list[str]:
    """RMSNorm of input + skip + bias; the fourth result is that sum."""
    total = _sums(node, 0, 1, 3)
    scaled = root_mean_square(node, total, [len(node.shape(0)) - 1], node.real("epsilon", 1e-12))
    return [node.binary("mul", scaled, node.input(2)), "", "", total]


def embed_layer_normalization(node: NodeImport) -> list[str]:
    """LayerNorm of word + position + segment embeddings; the second result is the number of unmasked words, the third the sum."""
    batch, steps = node.shape(0)
    parts = [node.emit("gather", (node.input(2), node.input(0)), ops.Gather(0))]
    parts.append(node.emit("gather", (node.input(3), node.input(8)), ops.Gather(0)) if node.has(8) else node.slice(node.input(3), 0, 0, steps))
    if node.has(1) and node.has(4):
        parts.append(node.emit("gather", (node.input(4), node.input(1)), ops.Gather(0)))
    total = parts[0]
    for part in parts[1:]:
        total = node.binary("add", total, part)
    mask = node.input(7) if node.has(7) else node.new_constant(np.zeros((batch, 1)), "mask")
    count = node.reshape(node.reduce("reduce_sum", mask, [1]), (batch,))
    return [layer_norm(node, total, 5, 6, node.real("epsilon", 1e-12)), count, total]


def bias_gelu(node: NodeImport) -> str:
    """GELU of the sum of both inputs."""
    return node.table(scalar.gelu(tanh=False), node.binary("add", node.input(0), node.input(1)))


def fused_matmul(node: NodeImport) -> str:
    """alpha · A' · B', each transposed in its last two dimensions where asked."""
    if node.integer("transBatchA", 0) or node.integer("transBatchB", 0):
        raise node.refuse("transposes its batch dimensions")
    operands = []
    for index, name in ((0, "transA"), (1, "transB")):
        rank = node.rank(index)
        swap = (*range(rank - 2), rank - 1, rank - 2)
        operands.append(node.transpose(node.input(index), swap) if node.integer(name, 0) and rank > 1 else node.input(index))
    product = node.emit("matmul", operands, ops.MatMul())
    alpha = node.real("alpha", 1.0)
    return product if alpha == 1 else node.table(("mul", "x", alpha), product)


def _then_activation(run: Callable[[NodeImport], str], *, addend: int = 99) -> Callable[[NodeImport], str]:
    """An operator, plus one more input, through an activation function."""

    def fused(node: NodeImport) -> str:
        result = run(node)
        total = node.binary("add", result, node.input(addend)) if node.has(addend) else result
        name = node.word("activation", "")
        return activation(node, name, [float(value) for value in node.attribute("activation_params", [])], total) if name else total

    return fused


def group_norm(node: NodeImport) -> str:
    """GroupNorm of [N, H, W, C] (or [N, C, H, W]), through SiLU where asked."""
    last = bool(node.integer("channels_last", 1))
    x = node.transpose(node.input(0), (0, 3, 1, 2)) if last else node.input(0)
    shape, groups = node.shape_of(x), node.integer("groups", 1)
    flat = node.reshape(x, (shape[0], groups, math.prod(shape[1:]) // groups))
    normal = node.reshape(node.emit("layer_norm", (flat,), ops.LayerNorm(node.real("epsilon", 1e-5))), shape)
    scaled = per_channel(node, normal, node.floats(1, "gamma").astype(np.float64), node.floats(2, "beta").astype(np.float64))
    scaled = node.table(("mul", "x", ("sigmoid", "x")), scaled) if node.integer("activation", 0) else scaled
    return node.transpose(scaled, (0, 2, 3, 1)) if last else scaled


TABLE: tuple[Importer, ...] = (
    Importer("RotaryEmbedding", rotary_embedding),
    Importer("RotaryEmbedding", microsoft_rotary_embedding, domain=MICROSOFT),
    Importer("Attention", attention, "constant weights", domain=MICROSOFT),
    Importer("MultiHeadAttention", multi_head_attention, "separate queries, keys and values", domain=MICROSOFT),
    Importer("SkipLayerNormalization", skip_layer_normalization, "constant scale and bias", domain=MICROSOFT),
    Importer("SkipSimplifiedLayerNormalization", skip_simplified_layer_normalization, domain=MICROSOFT),
    Importer("EmbedLayerNormalization", embed_layer_normalization, "constant scale and bias", domain=MICROSOFT),
    Importer("BiasGelu", bias_gelu, domain=MICROSOFT),
    Importer("FusedMatMul", fused_matmul, domain=MICROSOFT),
    Importer("FusedConv", _then_activation(conv, addend=3), "constant weights", domain=MICROSOFT),
    Importer("FusedGemm", _then_activation(gemm), domain=MICROSOFT),
    Importer("GroupNorm", group_norm, "constant scale and bias", domain=MICROSOFT),
)
