"""Weights of 2 to 8 bits with a scale per block, as language models are exported in onnxruntime's own domain (com.microsoft).

The one big idea: several integers lie in each byte, the lowest bits first. Taken apart they are constants like those of DequantizeLinear.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.quantized import MICROSOFT
from npucc.frontend.steps import constant
from npucc.graph import Given


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` integers of `bits` bits in each row of bytes (the last dimension)."""
    flat = np.unpackbits(packed.astype(np.uint8), axis=-1, bitorder="little")[..., : count * bits]
    return np.packbits(flat.reshape(*packed.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]


def _dequantized(integers: np.ndarray, scale: np.ndarray, zero: np.ndarray, *, axis: int, block: int) -> tuple[np.ndarray, Given | None]:
    """Values, and how they are to be kept. A zero point that is no whole number leaves the values alone."""
    if np.array_equal(zero, np.rint(zero)):
        return constant(integers, scale, zero, TensorProto.UINT8, axis=axis, block=block)
    value, _ = constant(np.ones_like(integers), scale, None, TensorProto.UINT8, axis=axis, block=block)
    offset, _ = constant(np.ones_like(integers), zero.astype(np.float32), None, TensorProto.UINT8, axis=axis, block=block)
    return (integers - offset) * value, None


def matmul_n_bits(node: NodeImport) -> str:
    """A · Bᵀ + bias, B [N, blocks, bytes] in blocks of `block_size` along K."""
    depth, columns, bits, block = (node.integer(name, default) for name, default in (("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)))
    if not (depth > 0 and columns > 0 and 1 <= bits <= 8 and block > 0 and block * bits % 8 == 0):
        raise node.refuse(f"has K={depth}, N={columns}, bits={bits}, block_size={block}", hint="quantize the model again")
    if node.integer("weight_prepacked", 0):
        raise node.refuse("its weights are packed for one processor", hint="export the model without weight_prepacked")
    blocks = -(-depth // block)
    if node.has(4) and node.constant(4, "g_idx").tolist() != [index // block for index in range(depth)]:
        raise node.refuse("its columns are in another order (g_idx)")
    packed = node.constant(1, "B").reshape(columns, blocks, block * bits // 8)
    integers = unpacked(packed, bits, block).reshape(columns, -1)[:, :depth]
    zero = np.full((columns, blocks), 1 << (bits - 1))
    if node.has(3):
        given = node.constant(3, "zero points")
        zero = unpacked(given.reshape(columns, -1), bits, blocks) if given.dtype == np.uint8 else given.reshape(columns, blocks)
    scale = node.floats(2, "scales").reshape(columns, blocks)
    value, kept = _dequantized(integers.T, scale.T, zero.T, axis=0, block=block)
    bias = (node.input(5),) if node.has(5) else ()
    return node.emit("matmul", (node.input(0), node.new_constant(value, "weights", kept), *bias), ops.MatMul())


def gather_block_quantized(node: NodeImport) -> str:
    """Gather from a table that is quantized in blocks."""
    data, bits = node.constant(0, "data"), node.integer("bits", 4)
    zero = node.constant(3, "zero points") if node.has(3) else None
    if data.dtype == np.uint8:
        count = data.shape[-1] * 8 // bits
        data = unpacked(data, bits, count)
        zero = np.asarray(1 << (bits - 1)) if zero is None else unpacked(zero, bits, node.shape(2)[-1])
    axis, along = (node.axis(node.integer(name, default), data.ndim) for name, default in (("quantize_axis", 1), ("gather_axis", 0)))
    zero = np.zeros((), np.int64) if zero is None else zero.astype(np.int64)
    value, kept = _dequantized(data.astype(np.int64), node.floats(2, "scales"), zero, axis=axis, block=node.integer("block_size", 128))
    return node.emit("gather", (node.new_constant(value, "table", kept), node.input(1)), ops.Gather(along))


TABLE: tuple[Importer, ...] = (
    Importer("MatMulNBits", matmul_n_bits, "constant weights; a scale per channel takes the place of those per block", MICROSOFT),
    Importer("GatherBlockQuantized", gather_block_quantized, "constant table", MICROSOFT),
)
