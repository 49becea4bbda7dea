"""What transformers are made of, as ONNX and onnxruntime's own domain (com.microsoft) have it: rotary embeddings, fused steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.elementwise import activation
from npucc.frontend.operators.layout import take
from npucc.frontend.operators.matrix import conv, gemm
from npucc.frontend.operators.normalization import layer_norm, normalized, per_channel, rms_norm

MICROSOFT = "com.microsoft"


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
    return node.reshape(turned(node, x, shown, interleaved=bool(node.integer("interleaved", 0))), shape)


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


def turned(node: NodeImport, x: str, angles: Sequence[str], *, interleaved: bool) -> str:
    """x [batch, …, …, size] with its first features turned in pairs, by as many angles as there are cosines and sines."""
    shape, half = node.shape_of(x), node.shape_of(angles[0])[3]
    cos, sin = angles
    parts = [node.slice(x, 3, i, half, 2) if interleaved else node.slice(x, 3, i * half, half) for i in (0, 1)]
    real = node.binary("sub", node.binary("mul", parts[0], cos), node.binary("mul", parts[1], sin))
    imaginary = node.binary("add", node.binary("mul", parts[0], sin), node.binary("mul", parts[1], cos))
    rest = (node.slice(x, 3, 2 * half, shape[3] - 2 * half),) if 2 * half < shape[3] else ()
    if not interleaved:
        return node.emit("concat", (real, imaginary, *rest), ops.Concat(3))
    pairs = [node.reshape(each, (*shape[:3], half, 1)) for each in (real, imaginary)]
    result = node.reshape(node.emit("concat", pairs, ops.Concat(4)), (*shape[:3], 2 * half))
    return node.emit("concat", (result, *rest), ops.Concat(3)) if rest else result


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
    return [rms_norm(node, total, 2, node.real("epsilon", 1e-12)), "", "", total]


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
    return _group_norm(node, node.input(0))


def skip_group_norm(node: NodeImport) -> list[str]:
    """GroupNorm of input + skip + bias; the second result is that sum. A skip [N, C] and the bias [C] are added everywhere."""
    shape = node.shape(0)
    last = bool(node.integer("channels_last", 1))
    total = node.input(0)
    for index in (3, 4):
        if node.has(index):
            part = node.shape(index)
            spread = part if len(part) == 4 else (*part[:-1], 1, 1, part[-1]) if last else (*part, 1, 1)
            total = node.binary("add", total, node.reshape(node.input(index), spread))
    if node.shape_of(total) != shape:
        raise node.refuse(f"its skip or bias does not fit an input of shape {list(shape)}", hint="check the input shapes")
    return [_group_norm(node, total), total]


def _group_norm(node: NodeImport, x: str) -> str:
    last = bool(node.integer("channels_last", 1))
    x = node.transpose(x, (0, 3, 1, 2)) if last else x
    shape, groups = node.shape_of(x), node.integer("groups", 1)
    normal = normalized(node, x, (shape[0], groups, math.prod(shape[1:]) // groups), ops.LayerNorm(node.real("epsilon", 1e-5)))
    scaled = per_channel(node, normal, node.floats(1, "gamma").astype(np.float64), node.floats(2, "beta").astype(np.float64))
    scaled = node.table(("mul", "x", ("sigmoid", "x")), scaled) if node.integer("activation", 0) else scaled
    return node.transpose(scaled, (0, 2, 3, 1)) if last else scaled


TABLE: tuple[Importer, ...] = (
    Importer("RotaryEmbedding", rotary_embedding),
    Importer("RotaryEmbedding", microsoft_rotary_embedding, domain=MICROSOFT),
    Importer("SkipLayerNormalization", skip_layer_normalization, "constant scale and bias", domain=MICROSOFT),
    Importer("SkipSimplifiedLayerNormalization", skip_simplified_layer_normalization, domain=MICROSOFT),
    Importer("EmbedLayerNormalization", embed_layer_normalization, "constant scale and bias", domain=MICROSOFT),
    Importer("BiasGelu", bias_gelu, domain=MICROSOFT),
    *(Importer(name, fused_matmul, domain=MICROSOFT) for name in ("FusedMatMul", "TransposeMatMul")),
    Importer("FusedConv", _then_activation(conv, addend=3), "constant weights", domain=MICROSOFT),
    Importer("FusedGemm", _then_activation(gemm), domain=MICROSOFT),
    Importer("GroupNorm", group_norm, "constant scale and bias", domain=MICROSOFT),
    Importer("SkipGroupNorm", skip_group_norm, "constant scale and bias", domain=MICROSOFT),
)
