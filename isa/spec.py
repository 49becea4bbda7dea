"""The instruction set as one table. Everything else (checks, printer, manual, strategies, decoder tests) is derived from it.

The one big idea: few instructions, each on whole tiles, each exact. Reductions run over integers, so their order does not
matter; floating point is IEEE-754 float32, elementwise, one rounding per stated operation. Common notation:

    real(x) = float32(x - zero) * scale      for integer tiles; float tiles are what they are
    quant(v, scale, zero) = clamp(rint(v / scale) + zero, lo, hi)   rint: half to even; for a float result: v
"""

from __future__ import annotations

from dataclasses import dataclass

from isa.program import DTYPES, Value
from isa.target import REQUANTIZE

INTEGERS = ("s8", "u8", "s16", "s32")
ANY = ("s8", "u8", "s16", "s32", "s64", "f32")
#: element types outside the NPU, by numpy's names: of a program's inputs and outputs, and of what a host segment takes and gives
OUTSIDE_TYPES = ("float32", "float16", "float64", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@dataclass(frozen=True, slots=True)
class Operand:
    """One tile operand: where it may live, what it may hold, how it is read.

    `dims` names its dimensions; the same letter must have the same size everywhere in the instruction; `*` is "any number".
    `packed`: it may be weights in one of the formats of `isa.packing`.
    """

    name: str
    role: str  # write | update (read and written) | read
    spaces: tuple[str, ...]
    dtypes: tuple[str, ...]
    dims: str = "*"
    optional: bool = False
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Attribute:
    """One `key=value`. `kind`: int, float, ints (comma separated), quant (scale,zero), word."""

    name: str
    kind: str
    default: Value
    meaning: str
    count: int = 1
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InstructionSpec:
    name: str
    queue: str
    operands: tuple[Operand, ...]
    attributes: tuple[Attribute, ...]
    effect: str
    timing: str
    notes: str = ""
    example: str = ""


SPM, ACC, DRAM = ("spm",), ("acc",), ("dram",)
KERNEL = Attribute("kernel", "ints", (1, 1), "window height, width", 2)
STRIDE = Attribute("stride", "ints", (1, 1), "step of the window down, across", 2)
DILATION = Attribute("dilation", "ints", (1, 1), "distance of the taps down, across", 2)
PAD = Attribute("pad", "ints", (0, 0, 0, 0), "virtual rows/columns: top, left, bottom, right", 4)
CLAMP = Attribute("clamp", "ints", (-128, 127), "lowest and highest stored value (the result's full range if wider)", 2)
ACCUMULATE = Attribute("accumulate", "int", 0, "1: add to what the result tile holds; 0: overwrite")
QUANT = "scale and zero point of"
PORT = Attribute("port", "int", 0, "number of the segment's input or output, from 0")


REQUANT_NOTE = """The zero point is added after rounding. A target has one of four modes:

- `fp32.rne`: `rint(float32(a) * s[n])`, one float32 product, half to even.
- `q31.rne`: with the integers m = s[n] (31 bits) and r = r[n] (6 bits), `a * m / 2**r`, half to even.
- `q31.tosa`: `(a * m + 2**(r-1)) >> r`, TOSA's apply_scale_32 with single rounding (r = 0: no rounding).
- `q31.tfl`: as TFLite and gemmlowp do it, in two roundings: v = a << max(31 - r, 0), saturated to 32 bits;
  `h = (v * m + 2**30) >> 31` (SaturatingRoundingDoublingHighMul); h / 2**max(r - 31, 0), half away from zero (RoundingDivideByPOT).

The q31 modes work on exact integers of 64 bits. Of what s and r hold, the low 31 and 6 bits count. TOSA wants 2 <= r <= 62.
Only `requant` has modes: additions, products and other elementwise steps, pooling, softmax and layer norm are float32 on every target.
For these, integers would not be another rounding of the same formula but other formulas, which TFLite and TOSA define operator by operator. A
TFLite addition shifts both operands left by 20 bits, rescales each, adds, and rescales the sum; its average pool divides the sum by the number
of taps, half away from zero, and its result must have the scale of its operand (TensorFlow, lite/kernels/internal/reference/integer_ops/add.h and
pooling.h; LiteRT 8-bit quantization specification). TOSA 1.0 puts a RESCALE before and after ADD and MUL, and AVG_POOL2D multiplies by
apply_scale_32(sum, reciprocal_scale(count)). A chip whose vector engine has no float32 needs instructions of its own for them."""


def _quant(name: str, of: str) -> Attribute:
    return Attribute(name, "quant", (1.0, 0), f"{QUANT} {of}", 2)


OFFSET = Attribute("offset", "int", 128, "for s8 operands: 128 rounds as onnxruntime's kernel of unsigned bytes, 0 as that of signed ones")


def _elementwise(name: str, formula: str, note: str = "", *extra: Attribute) -> InstructionSpec:
    return InstructionSpec(
        name, "vec",
        (Operand("y", "write", SPM, ANY, "*d"), Operand("a", "read", SPM, ANY, "*d"), Operand("b", "read", SPM, ANY, "*d", optional=True)),
        (_quant("qa", "a"), _quant("qb", "b"), _quant("qy", "y"), Attribute("imm", "float", 0.0, "stands for real(b) when b is left out"), CLAMP,
         *extra),
        f"y = {formula}", "vector",
        "All tiles have the same shape; broadcast with a stride of 0. " + note,
        f"{name} %0x0:s8[14,56,64], %0xd000:s8[14,56,64], %0x1a000:s8[14,56,64]{{0,0,1}} qa=0.05,-3 qb=0.1,0 qy=0.07,-128",
    )  # fmt: skip


def _window(name: str, effect: str, extra: tuple[Attribute, ...], note: str) -> InstructionSpec:
    return InstructionSpec(
        name, "vec",
        (Operand("y", "write", SPM, ("s8", "s16"), "hwc"), Operand("x", "read", SPM, ("s8", "s16"), "uvc")),
        (KERNEL, STRIDE, DILATION, PAD, *extra), effect, "window", note,
        f"{name} %0x0:s8[7,28,64], %0x8000:s8[15,57,64] kernel=3,3 stride=2,2 pad=1,1,0,0",
    )  # fmt: skip


TABLE: tuple[InstructionSpec, ...] = (
    InstructionSpec(
        "ld", "ld", (Operand("y", "write", SPM, ANY, "*d", packed=True), Operand("x", "read", DRAM, ANY, "*d", packed=True)), (),
        "y[...] = x[...], element by element", "dma",
        "Any strides on both sides: transposes, interleaves and broadcasts on the way. At most 5 dimensions; same dtype. "
        "Where x is [packed](#packed-weights) and y is not, the DMA engine unpacks on the way; where both are, in the same format, the bytes "
        "are moved as they are.",
        "ld %0x0:s8[16,58,64], @0xc400:s8[16,58,64]{3712,64,1} signal=mm.0",
    ),
    InstructionSpec(
        "st", "st", (Operand("y", "write", DRAM, ANY, "*d"), Operand("x", "read", SPM, ANY, "*d")), (),
        "y[...] = x[...], element by element", "dma", "As ld, the other way.",
        "st @0x40000:s8[14,56,64], %0x8000:s8[14,56,64] wait=vec.0",
    ),
    InstructionSpec(
        "gather", "ld",
        (Operand("y", "write", SPM, ANY, "nc"), Operand("x", "read", DRAM, ANY, "ec"), Operand("i", "read", SPM, ("s32",), "n")), (),
        "y[n,c] = x[i[n],c]; an index below 0 counts from the end of x", "gather",
        "Rows of a table in DRAM; only those asked for are moved. An index outside -e to e-1 is a fault.",
        "gather %0x0:s8[64,128], @0x10000:s8[1000,128], %0x2000:s32[64] signal=vec.0",
    ),
    InstructionSpec(
        "conv", "mm",
        (Operand("y", "update", ACC, ("s32",), "hwn"), Operand("x", "read", SPM, ("s8", "s16"), "uvc"),
         Operand("w", "read", SPM, ("s8",), "klgn", packed=True), Operand("b", "read", SPM, ("s32",), "n", optional=True)),
        (STRIDE, DILATION, PAD, Attribute("zero", "int", 0, "stored value that padding stands for"),
         Attribute("groups", "int", 1, "channel groups: g = c / groups; output channels are split likewise"), ACCUMULATE),
        "y[h,w,n] = (b[n] or 0, or y if accumulate) + "
        "sum over k,l,g of x[h*stride+k*dilation-pad, w*..., g of n's group] * w[k,l,g,n], wrapping in 32 bits",
        "matrix", "x outside its tile reads as `zero`, and only where `pad` allows it.",
        "conv $0x0:s32[14,56,64], %0x0:s8[16,58,64], %0x80000:s8[3,3,64,64], %0x90000:s32[64] pad=1,1,0,1 zero=-3",
    ),
    InstructionSpec(
        "dwconv", "mm",
        (Operand("y", "update", ACC, ("s32",), "hwc"), Operand("x", "read", SPM, ("s8", "s16"), "uvc"),
         Operand("w", "read", SPM, ("s8",), "klc"), Operand("b", "read", SPM, ("s32",), "c", optional=True)),
        (STRIDE, DILATION, PAD, Attribute("zero", "int", 0, "stored value that padding stands for"), ACCUMULATE),
        "y[h,w,c] = (b[c] or 0, or y if accumulate) + sum over k,l of x[h*stride+k*dilation-pad, w*..., c] * w[k,l,c], wrapping in 32 bits",
        "depthwise", "Each channel alone.",
        "dwconv $0x0:s32[14,56,64], %0x0:s8[16,58,64], %0x80000:s8[3,3,64], %0x90000:s32[64] pad=1,1,0,1 zero=-3",
    ),
    InstructionSpec(
        "matmul", "mm",
        (Operand("y", "update", ACC, ("s32",), "mn"), Operand("a", "read", SPM, ("s8", "s16"), "mk"),
         Operand("b", "read", SPM, ("s8",), "kn", packed=True), Operand("c", "read", SPM, ("s32",), "n", optional=True)),
        (Attribute("za", "int", 0, "zero point subtracted from a"), Attribute("zb", "int", 0, "zero point subtracted from b"), ACCUMULATE),
        "y[m,n] = (c[n] or 0, or y if accumulate) + sum over k of (a[m,k] - za) * (b[k,n] - zb), wrapping in 32 bits",
        "matrix", "Strides transpose either side for nothing.",
        "matmul $0x0:s32[64,32], %0x0:s8[64,128], %0x2000:s8[128,32], %0x4000:s32[32]",
    ),
    InstructionSpec(
        "requant", "vec",
        (Operand("y", "write", SPM, ("s8", "s16"), "*dn"), Operand("a", "read", ("acc", "spm"), ("s32",), "*dn"),
         Operand("s", "read", SPM, ("f32", "s32"), "n", optional=True), Operand("r", "read", SPM, ("s32",), "n", optional=True)),
        (Attribute("mode", "word", "fp32.rne", "how it is rounded", words=REQUANTIZE),
         Attribute("scale", "float", 1.0, "fp32.rne: for all channels when s is left out"),
         Attribute("multiplier", "int", 1 << 30, "q31: for all channels when s and r are left out"),
         Attribute("shift", "int", 30, "q31: for all channels when s and r are left out"), Attribute("zero", "int", 0, "zero point of y"), CLAMP),
        "y[..., n] = clamp(round(a[..., n] * factor of n) + zero)", "vector", REQUANT_NOTE,
        "requant %0xc000:s8[14,56,64], $0x0:s32[14,56,64], %0x9f000:f32[64] zero=-128",
    ),
    _elementwise(
        "add", "quant(real(a) + real(b))",
        "For s8 a, b and y the sum is two fused multiply-adds, as onnxruntime's kernels have it: "
        "with o = offset, A = a+o, B = b+o, ra = f32(sa/sy), rb = f32(sb/sy), "
        "F = f32((zy+o) - fma(ra, za+o, f32(rb*(zb+o)))): y = clamp(rint(fma(A, ra, fma(B, rb, F))) - o).", OFFSET,
    ),
    _elementwise("sub", "quant(real(a) - real(b))"),
    _elementwise(
        "mul", "quant(real(a) * real(b))",
        "For s8 a, b and y: clamp(rint(f32(f32(f32((a-za)*(b-zb)) * r) + f32(zy+o))) - o) with o = offset, r = f32(f32(sa*sb)/sy).", OFFSET,
    ),
    _elementwise("div", "quant(real(a) / real(b))", "x/0 follows IEEE-754; NaN is stored as the zero point."),
    _elementwise("max", "quant(max(real(a), real(b)))"),
    _elementwise("min", "quant(min(real(a), real(b)))"),
    InstructionSpec(
        "cmp", "vec",
        (Operand("y", "write", SPM, ("s8", "u8"), "*d"), Operand("a", "read", SPM, ANY, "*d"), Operand("b", "read", SPM, ANY, "*d", optional=True)),
        (Attribute("op", "word", "eq", "the relation", words=("eq", "ne", "lt", "le", "gt", "ge")), _quant("qa", "a"), _quant("qb", "b"),
         Attribute("imm", "float", 0.0, "stands for real(b) when b is left out")),
        "y = 1 where real(a) op real(b), else 0", "vector", "", "cmp %0x0:u8[1,64], %0x40:s8[1,64] op=ge qa=0.1,3 imm=0.5",
    ),
    InstructionSpec(
        "select", "vec",
        (Operand("y", "write", SPM, ANY, "*d"), Operand("c", "read", SPM, ("s8", "u8"), "*d"),
         Operand("a", "read", SPM, ANY, "*d"), Operand("b", "read", SPM, ANY, "*d")),
        (_quant("qa", "a"), _quant("qb", "b"), _quant("qy", "y"), CLAMP),
        "y = quant(real(a)) where c is not 0, else quant(real(b))", "vector", "", "select %0x0:s8[64], %0x40:u8[64], %0x80:s8[64], %0xc0:s8[64]",
    ),
    InstructionSpec(
        "cvt", "vec", (Operand("y", "write", SPM, ANY, "*d"), Operand("x", "read", SPM, ANY, "*d")),
        (_quant("qx", "x"), _quant("qy", "y"), CLAMP), "y = quant(real(x))", "vector", "Between any two element types.",
        "cvt %0x0:f32[8,64], %0x800:s8[8,64] qx=0.05,-3",
    ),
    InstructionSpec(
        "sqrt", "vec", (Operand("y", "write", SPM, ANY, "*d"), Operand("x", "read", SPM, ANY, "*d")),
        (_quant("qx", "x"), _quant("qy", "y"), CLAMP), "y = quant(sqrt(real(x)))", "vector", "Correctly rounded; NaN is stored as the zero point.",
        "sqrt %0x0:f32[8], %0x20:f32[8]",
    ),
    InstructionSpec(
        "lut", "vec",
        (Operand("y", "write", SPM, ANY, "*d"), Operand("x", "read", SPM, INTEGERS, "*d"), Operand("t", "read", SPM, ANY, "e")),
        (Attribute("base", "int", -128, "the value of x that reads t[0]"),
         Attribute("shift", "int", 0, "t has an entry per 2**shift values of x; between two entries y is interpolated")),
        "y = t[i] with i = min(max(x - base, 0), e - 1); with a shift: p = min(max(x - base, 0), (e - 1) << shift), i = min(p >> shift, e - 2), "
        "y = t[i] + (((t[i+1] - t[i]) * (p - (i << shift)) + 2**(shift-1)) >> shift)", "vector",
        "y and t have the same dtype. Any function of one variable.",
        "lut %0x0:s8[14,56,64], %0xc400:s8[14,56,64], %0xff00:s8[256]",
    ),
    _window("maxpool", "y = largest x in the window; padding never wins", (), "Windows wholly in the padding are refused."),
    _window("avgpool", "y = clamp(rint(float32(sum of (x - zx) in the window) * float32(scale / count)) + zy)",
            (Attribute("scale", "float", 1.0, "scale of x / scale of y"), Attribute("zx", "int", 0, "zero point of x"),
             Attribute("zy", "int", 0, "zero point of y"),
             Attribute("count", "word", "inside", "what the sum is divided by: elements inside x, or the whole window", words=("inside", "window"))),
            "Padding adds nothing to the sum."),
    InstructionSpec(
        "reduce", "vec", (Operand("y", "update", SPM, ("s32", "s64", "s8", "s16"), "*r"), Operand("x", "read", SPM, INTEGERS, "*d")),
        (Attribute("op", "word", "sum", "what is kept", words=("sum", "sumsq", "max", "min")),
         Attribute("zero", "int", 0, "subtracted from x first (sum, sumsq)"), ACCUMULATE),
        "y = op of (x - zero) over every dimension where y has size 1", "vector",
        "y has x's rank. Sums wrap in y's width; max and min keep x's values. With accumulate, y's value takes part.",
        "reduce %0x0:s32[1,1,64], %0x100:s8[14,56,64] op=sum zero=-3",
    ),
    InstructionSpec(
        "resize", "vec",
        (Operand("y", "write", SPM, ("s8", "s16"), "hwc"), Operand("x", "read", SPM, ("s8", "s16"), "uvc"),
         Operand("r", "read", SPM, ("s32",), "h4"), Operand("q", "read", SPM, ("s32",), "w4")),
        (_quant("qx", "x"), _quant("qy", "y"), CLAMP),
        "with (i0, i1, a0, a1) = r[h] and (j0, j1, b0, b1) = q[w], the weights a, b being float32 bit patterns: "
        "y = quant((((b0*a0)*x[i0,j0] + (b1*a0)*x[i0,j1]) + (b0*a1)*x[i1,j0]) + (b1*a1)*x[i1,j1]) of real(x), each step in float32", "resize",
        "Linear interpolation between two rows and two columns.",
        "resize %0x0:s8[8,8,64], %0x1000:s8[5,5,64], %0x3000:s32[8,4], %0x3100:s32[8,4]",
    ),
    InstructionSpec(
        "fill", "vec", (Operand("y", "write", SPM, ANY, "*d"),), (Attribute("value", "float", 0.0, "stored into every element"),),
        "y = value", "vector", "", "fill %0x0:s8[16,58,64] value=-3",
    ),
    InstructionSpec(
        "take", "host", (Operand("x", "read", DRAM, tuple(DTYPES), "*d"),),
        (PORT, _quant("q", "x"), Attribute("type", "word", "float32", "element type that the segment's input has", words=OUTSIDE_TYPES)),
        "input `port` of the next segment = real(x), rounded (half to even) where the type is an integer one", "transfer",
        "A float tile, or an integer one with q=1,0 and another type than float32, goes over unchanged. For bool: x - zero is not 0.",
        "take @0x0:s8[1,1000] port=0 q=0.05,-3 wait=st.0",
    ),
    InstructionSpec(
        "host", "host", (), (Attribute("segment", "int", 0, "number of the segment, from 0"),),
        "the segment runs on the host, on the inputs that were taken since the last segment", "host",
        "What a segment computes is not part of the instruction set: an engine outside the machine runs it (in a package, member "
        "`host/<segment>.onnx`).",
        "host segment=0",
    ),
    InstructionSpec(
        "give", "host", (Operand("y", "write", DRAM, tuple(DTYPES), "*d"),), (PORT, _quant("q", "y")),
        "y = output `port` of the last segment, as saturate(rint(v / scale) + zero) in float32 where y is an integer tile", "transfer",
        "Integers with q=1,z are stored as saturate(v + z); into a float tile v goes unchanged. NaN is stored as the zero point.",
        "give @0x400:s64[1,5] port=1 signal=ld.0",
    ),
)  # fmt: skip

SPEC: dict[str, InstructionSpec] = {spec.name: spec for spec in TABLE}
