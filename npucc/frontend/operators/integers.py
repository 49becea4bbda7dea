"""Division, shifts and bits of whole numbers.

The one big idea: x / d − (d − 1) / 2d rounded is the floor of x / d, for it never lies half way. So the largest multiple of d up to x is a sum,
rounded to steps of d: exact in 32 bits, where a table would interpolate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.graph import Given

LARGEST_DIVISOR = 1 << 15
BYTES = (TensorProto.INT8, TensorProto.UINT8)
#: types in which a negative number is one that takes more than 16 bits
WRAPPING = (TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64)


def _multiple(node: NodeImport, x: str, divisor: int, *, up: bool = False) -> str:
    """The largest multiple of the divisor that is not above x; the least that is not below, if `up`."""
    if divisor == 1:
        return x
    if not 0 < divisor <= LARGEST_DIVISOR:
        raise node.refuse(f"divides by {divisor}; supported are divisors from 1 to {LARGEST_DIVISOR}")
    halves = divisor - 1 if up else 1 - divisor
    offset = node.new_constant(halves / 2, "offset", Given("s16", np.asarray(0.5, np.float32), 0, np.asarray(halves, np.int16)))
    return node.emit("quantize", (node.binary("add", x, offset),), ops.Quantize("s32", float(divisor), 0, 0))


def _toward_zero(node: NodeImport, x: str, divisor: int) -> str:
    """The nearest multiple of the divisor between x and zero."""
    negative = node.emit("compare", (x, node.new_constant(0.0, "zero")), ops.Compare("lt"), dtype="bool")
    return node.emit("where", (negative, _multiple(node, x, divisor, up=True), _multiple(node, x, divisor)), ops.Attributes())


def _over(node: NodeImport, product: str, divisor: int) -> str:
    """A multiple of the divisor, divided by it."""
    if divisor == 1:
        return product
    scale, sign = np.asarray(1 / abs(divisor), np.float32), 1 if divisor > 0 else -1
    return _whole(node, "mul", product, node.new_constant(1 / divisor, "factor", Given("s16", scale, 0, np.asarray(sign, np.int16))))


def _whole(node: NodeImport, op: str, first: str, second: str) -> str:
    """A sum, difference or product that is a whole number, in steps of one."""
    return node.emit("quantize", (node.binary(op, first, second),), ops.Quantize("s32", 1.0, 0, 0))


def _single(node: NodeImport, index: int, what: str) -> int:
    value = node.constant(index, what)
    if value.size != 1:
        raise node.refuse(f"its {what} is not a single number")
    return int(value.reshape(()))


def _broadcast(node: NodeImport, result: str) -> str:
    return node.reshape(result, np.broadcast_shapes(node.shape(0), node.shape(1)))


def divide(node: NodeImport) -> str:
    """Of integers the quotient without its fraction."""
    if not node.is_integer(0):
        return node.binary("div", node.input(0), node.input(1))
    divisor = _single(node, 1, "divisor")
    return _broadcast(node, _over(node, _toward_zero(node, node.input(0), abs(divisor)), divisor))


def modulo(node: NodeImport) -> str:
    """a − b · floor(a / b), or with fmod the truncated quotient."""
    truncated = bool(node.integer("fmod", 0))
    x = node.input(0)
    if not node.is_integer(0):
        divisor = float(node.floats(1, "divisor").reshape(-1)[0]) if node.floats(1, "divisor").size == 1 else 0.0
        if not divisor:
            raise node.refuse("its divisor is not a single number")
        quotient = ("trunc" if truncated else "floor", ("div", "x", divisor))
        return _broadcast(node, node.table(("sub", "x", ("mul", divisor, quotient)), x))
    whole = _single(node, 1, "divisor")
    if truncated:
        return _broadcast(node, _whole(node, "sub", x, _toward_zero(node, x, abs(whole))))
    return _broadcast(node, remainder(node, x, whole))


def remainder(node: NodeImport, x: str, divisor: int) -> str:
    """What is left of a whole number over the nearest multiple of the divisor towards −∞ (negative divisors: +∞)."""
    return _whole(node, "sub", x, _multiple(node, x, abs(divisor), up=divisor < 0))


def bit_shift(node: NodeImport) -> str:
    """Times or over a power of two."""
    count, x, kind = _single(node, 1, "shift"), node.input(0), node.element_type(0)
    if kind in WRAPPING:
        raise node.refuse("its integers may have wrapped around to more than 16 bits")
    if node.word("direction", "") == "RIGHT":
        return _broadcast(node, _over(node, _multiple(node, x, 1 << count), 1 << count))
    if kind == TensorProto.INT8:
        raise node.refuse("shifts bits past the sign")
    shifted = node.table(("mul", "x", float(1 << count)), x)
    return _broadcast(node, remainder(node, shifted, 256) if kind == TensorProto.UINT8 else shifted)


def bitwise_not(node: NodeImport) -> str:
    """−1 − x, or 255 − x of unsigned bytes."""
    kind = node.element_type(0)
    if kind in WRAPPING:
        raise node.refuse("its result has more than 16 bits")
    return node.table(("sub", 255.0 if kind == TensorProto.UINT8 else -1.0, "x"), node.input(0))


def _common_bits(node: NodeImport, x: str, mask: int) -> str:
    """x & mask, run by run of ones in the mask: what x has above the lower end of a run, less what it has above the upper end."""
    total, low = "", 0
    while mask >> low:
        low += (mask >> low & -(mask >> low)).bit_length() - 1
        run = (~(mask >> low) & (mask >> low) + 1).bit_length() - 1
        part = _whole(node, "sub", _multiple(node, x, 1 << low), _multiple(node, x, 1 << low + run))
        total, low = part if not total else _whole(node, "add", total, part), low + run
    return total


def _bitwise(operator: str) -> Callable[[NodeImport], str]:
    """x & mask; x | mask = x + mask − (x & mask); x ^ mask = (x | mask) − (x & mask)."""

    def run(node: NodeImport) -> str:
        index = 0 if node.is_constant(0) else 1
        mask, x = _single(node, index, "mask"), node.input(1 - index)
        if not 0 < mask < LARGEST_DIVISOR:
            raise node.refuse(f"has the mask {mask}; supported are 1 to {LARGEST_DIVISOR - 1}")
        common = _common_bits(node, x, mask)
        if operator == "And":
            return _broadcast(node, common)
        stored = Given("s16", np.asarray(1.0, np.float32), 0, np.asarray(mask, np.int16))
        either = _whole(node, "sub", _whole(node, "add", x, node.new_constant(mask, "mask", stored)), common)
        return _broadcast(node, either if operator == "Or" else _whole(node, "sub", either, common))

    return run


TABLE: tuple[Importer, ...] = (
    Importer("Div", divide, "of integers: constant divisor"),
    Importer("Mod", modulo, "constant divisor"),
    Importer("BitShift", bit_shift, "constant shift"),
    Importer("BitwiseNot", bitwise_not, "up to 16 bits"),
    *(Importer(f"Bitwise{name}", _bitwise(name), "constant mask") for name in ("And", "Or", "Xor")),
)
