"""Convolutions and matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.windows import (
    Sizes,
    Windows,
    as_sizes,
    attribute_sizes,
    auto_pad,
    explicit_pads,
    fold_depth,
    in_2d,
    read_windows,
    unfold_depth,
)  # fmt: skip

MOST_TAPS = 64  # of a kernel that is computed


def _weights(node: NodeImport) -> np.ndarray:
    """Convolution weights, [a, b, kh, kw], or [a, b, kd, kh, kw]."""
    weights = node.floats(1, "weights")
    if weights.ndim != node.rank() or weights.ndim not in (3, 4, 5):
        raise node.refuse(
            f"has weights of shape {list(weights.shape)} and an input of shape {list(node.shape(0))}; supported are 1-D to 3-D convolutions"
        )
    return weights[:, :, None, :] if weights.ndim == 3 else weights


def _bias(node: NodeImport, channels: int) -> tuple[str, ...]:
    if not node.has(2):
        return ()
    bias = node.floats(2, "bias")
    if bias.shape != (channels,):
        raise node.refuse(f"has a bias of shape {list(bias.shape)} for {channels} output channels", hint="the model is damaged; export it again")
    return (node.input(2),)


def conv(node: NodeImport) -> str:
    """Convolution over one to three spatial dimensions."""
    if not node.is_constant(1):
        return _conv_with_computed_weights(node)
    weights = _weights(node)
    groups = node.integer("group", 1)
    channels = node.shape(0)[1]
    if groups < 1 or weights.shape[1] * groups != channels or weights.shape[0] % groups:
        raise node.refuse(
            f"has weights of shape {list(weights.shape)} and {groups} groups for {channels} input channels",
            hint="the model is damaged; export it again",
        )
    kernel = node.integers("kernel_shape")
    windows = read_windows(node, weights.shape[2:])
    if kernel is not None and as_sizes(kernel, 1) != weights.shape[2:]:
        raise node.refuse(f"kernel_shape={kernel} does not fit weights of shape {list(weights.shape)}", hint="the model is damaged; export it again")
    plane = windows.plane()
    attributes = ops.Conv(plane.strides, plane.pads, plane.dilations, groups)  # type: ignore[arg-type]
    bias = _bias(node, weights.shape[0])
    if weights.ndim == 5:
        flat = node.new_constant(weights.reshape(weights.shape[0], -1, *weights.shape[3:]), "weights")
        images = fold_depth(node, node.input(0), windows)
        return unfold_depth(node, node.emit("conv", (images, flat, *bias), attributes), node.shape(0)[0])
    inputs = (_weight_input(node, weights), *bias)
    return in_2d(node, node.input(0), lambda x: node.emit("conv", (x, *inputs), attributes))


def _conv_with_computed_weights(node: NodeImport) -> str:
    """As a product of two activations: the weights of each group with what its windows see."""
    weights, x, groups = node.shape(1), node.input(0), node.integer("group", 1)
    if node.rank() not in (3, 4) or len(weights) != node.rank() or math.prod(weights[2:]) > MOST_TAPS:
        raise node.refuse(f"has computed weights of shape {list(weights)}; supported are 1-D and 2-D ones of up to {MOST_TAPS} taps")
    outputs, depth, *kernel = weights
    if groups < 1 or depth * groups != node.shape(0)[1] or outputs % groups:
        raise node.refuse(f"has weights of shape {list(weights)} and {groups} groups for {node.shape(0)[1]} input channels", hint="check the shapes")
    windows = read_windows(node, kernel)
    left = node.reshape(node.input(1), (groups, outputs // groups, depth * math.prod(kernel)))

    def product(image: str) -> str:
        top, first, bottom, last = windows.pads
        padded = node.emit("pad", (image,), ops.Pad((0, 0, top, first), (0, 0, bottom, last))) if any(windows.pads) else image
        batch, _, *size = node.shape_of(padded)
        counts = [(each - span) // stride + 1 for each, span, stride in zip(size, windows.spans(), windows.strides, strict=True)]
        taps = []
        for tap in np.ndindex(*windows.kernel):
            part = padded
            for i in (0, 1):
                part = node.slice(part, 2 + i, tap[i] * windows.dilations[i], counts[i], windows.strides[i])
            taps.append(node.reshape(part, (batch, groups, depth, 1, math.prod(counts))))
        seen = node.emit("concat", taps, ops.Concat(3)) if len(taps) > 1 else taps[0]
        right = node.reshape(seen, (batch, groups, depth * len(taps), math.prod(counts)))
        return node.reshape(node.emit("matmul", (left, right), ops.MatMul()), (batch, outputs, *counts))

    result = in_2d(node, x, product)
    return node.binary("add", result, node.reshape(node.input(2), (outputs, *(1 for _ in kernel)))) if node.has(2) else result


def _weight_input(node: NodeImport, weights: np.ndarray) -> str:
    return node.reshape(node.input(1), weights.shape)


def conv_transpose(node: NodeImport) -> str:
    """Transposed convolution over one or two spatial dimensions."""
    weights = _weights(node)
    groups = node.integer("group", 1)
    if groups < 1 or weights.shape[0] != node.shape(0)[1] or weights.shape[0] % groups:
        raise node.refuse(
            f"has weights of shape {list(weights.shape)} and {groups} groups for {node.shape(0)[1]} input channels",
            hint="the model is damaged; export it again",
        )
    windows, output_padding = _transpose_windows(node, as_sizes(weights.shape[2:], 1))
    plane = windows.plane()
    attributes = ops.ConvTranspose(plane.strides, plane.pads, plane.dilations, groups, output_padding[-2:])  # type: ignore[arg-type]
    bias = _bias(node, weights.shape[1] * groups)
    if weights.ndim == 5:
        unit = replace(windows, strides=(1, 1, 1), begins=(0,) * 3, ends=(0,) * 3)
        images = fold_depth(node, _spread_depth(node, windows, output_padding[0]), unit)
        swapped = weights[:, :, ::-1].swapaxes(1, 2)
        flat = node.new_constant(swapped.reshape(-1, *swapped.shape[2:]), "weights")
        return unfold_depth(node, node.emit("conv_transpose", (images, flat, *bias), attributes), node.shape(0)[0])
    inputs = (_weight_input(node, weights), *bias)
    return in_2d(node, node.input(0), lambda x: node.emit("conv_transpose", (x, *inputs), attributes))


def _spread_depth(node: NodeImport, windows: Windows, extra: int) -> str:
    """The volume with stride − 1 empty slices after each, and as many around as a plain convolution over the depth needs."""
    n, c, d, h, w = node.shape(0)
    x, stride, reach = node.input(0), windows.strides[0], windows.spans()[0] - 1
    if stride > 1:
        spread = node.emit("pad", (node.reshape(x, (n, c, d, 1, h, w)),), ops.Pad((0,) * 6, (0, 0, 0, stride - 1, 0, 0)))
        x = node.slice(node.reshape(spread, (n, c, d * stride, h, w)), 2, 0, (d - 1) * stride + 1)
    before, after = reach - windows.begins[0], reach - windows.ends[0] + extra
    start, size = max(0, -before), node.shape_of(x)[2] - max(0, -before) - max(0, -after)
    x = node.slice(x, 2, start, size)
    return node.emit("pad", (x,), ops.Pad((0, 0, max(0, before), 0, 0), (0, 0, max(0, after), 0, 0))) if max(before, after) > 0 else x


def _transpose_windows(node: NodeImport, kernel: Sizes) -> tuple[Windows, Sizes]:
    """(windows, output padding). Pads follow from output_shape or auto_pad where those are given."""
    strides, dilations = (attribute_sizes(node, name, 1) for name in ("strides", "dilations"))
    output_padding = attribute_sizes(node, "output_padding", 0)
    size, mode, wanted = as_sizes(node.shape(0)[2:], 1), auto_pad(node), node.integers("output_shape")
    axes, none = range(len(size)), (0,) * len(size)
    if wanted is None and mode in ("NOTSET", "VALID"):
        begins, ends = explicit_pads(node) if mode == "NOTSET" else (none, none)
        return Windows(kernel, strides, dilations, begins, ends, none), output_padding
    full = [(size[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 + output_padding[i] for i in axes]
    target = as_sizes(wanted[-(node.rank() - 2) :], 1) if wanted else tuple(size[i] * strides[i] for i in axes)
    if wanted:  # a larger size is reached by padding; auto_pad leaves it smaller, as onnxruntime does
        output_padding = tuple(output_padding[i] + max(0, target[i] - full[i]) for i in axes)
    total = [max(0, full[i] - target[i]) for i in axes]
    small = tuple(each // 2 for each in total)
    large = tuple(each - each // 2 for each in total)
    begins, ends = (small, large) if mode == "SAME_UPPER" else (large, small)
    return Windows(kernel, strides, dilations, begins, ends, none), output_padding


def gemm(node: NodeImport) -> str:
    """alpha · A' · B' + beta · C; constants are transposed and scaled here."""
    alpha, beta = node.real("alpha", 1.0), node.real("beta", 1.0)
    flip_a, flip_b = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    if node.is_constant(0) and not node.is_constant(1):
        raise node.refuse("its first input is a constant and its second is not", hint="swap the operands in the model")
    a = node.transpose(node.input(0), (1, 0)) if flip_a else node.input(0)
    if node.is_constant(1):
        weights = node.floats(1, "weights")
        weights = weights.T if flip_b else weights
        straight = node.transpose(node.input(1), (1, 0)) if flip_b else node.input(1)
        b = straight if alpha == 1 else node.new_constant(weights * np.float32(alpha), "weights")
    else:
        b = node.transpose(node.input(1), (1, 0)) if flip_b else node.input(1)
        b = b if alpha == 1 else node.table(("mul", "x", alpha), b)
    return _add_c(node, a, b, beta)


def _add_c(node: NodeImport, a: str, b: str, beta: float) -> str:
    columns = node.shape_of(b)[-1]
    if not node.has(2) or beta == 0:
        return node.emit("matmul", (a, b), ops.MatMul())
    if node.is_constant(2) and node.is_constant(1):
        c = node.floats(2, "C")
        if c.size in (1, columns) and c.shape in ((), (1,), (columns,), (1, 1), (1, columns)):
            bias = np.broadcast_to(c.reshape(-1) * np.float32(beta), (columns,))
            plain = beta == 1 and c.shape == (columns,)
            return node.emit("matmul", (a, b, node.input(2) if plain else node.new_constant(bias, "bias")), ops.MatMul())
    c_input = node.input(2) if beta == 1 else node.table(("mul", "x", beta), node.input(2))
    return node.binary("add", node.emit("matmul", (a, b), ops.MatMul()), c_input)


def matmul(node: NodeImport) -> str:
    """numpy's matmul. A constant left operand moves to the right: (A·B) = (Bᵀ·Aᵀ)ᵀ. Vectors become matrices with one row or column."""
    if node.is_constant(0):
        return _constant_left(node)
    a, b = node.input(0), node.input(1)
    a_shape, b_shape = node.shape(0), node.shape(1)
    if node.is_constant(1):
        weights = node.floats(1, "weights")
        if weights.ndim == 1:
            b = node.reshape(b, (*weights.shape, 1))
        elif weights.ndim > 2 and weights.size == weights.shape[-1] * weights.shape[-2]:
            b = node.reshape(b, weights.shape[-2:])
    elif len(b_shape) == 1:
        b = node.reshape(b, (*b_shape, 1))
    if len(a_shape) == 1:
        a = node.reshape(a, (1, *a_shape))
    product = node.emit("matmul", (a, b), ops.MatMul())
    return node.reshape(product, _matmul_shape(a_shape, b_shape))


def _matmul_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return (*batch, *(a[-2:-1] if len(a) > 1 else ()), *(b[-1:] if len(b) > 1 else ()))


def _constant_left(node: NodeImport) -> str:
    a, b_shape = node.floats(0, "left operand"), node.shape(1)
    matrix = a[None, :] if a.ndim == 1 else a
    if matrix.size != matrix.shape[-1] * matrix.shape[-2]:
        raise node.refuse(
            f"its first input is a constant of shape {list(a.shape)}, a different matrix per batch entry", hint="swap the operands in the model"
        )
    weights = node.transpose(node.reshape(node.input(0), matrix.shape[-2:]), (1, 0))
    b = node.input(1) if len(b_shape) > 1 else node.reshape(node.input(1), (*b_shape, 1))
    rank = len(node.shape_of(b))
    swap = (*range(rank - 2), rank - 1, rank - 2)
    product = node.emit("matmul", (node.transpose(b, swap), weights), ops.MatMul())
    return node.reshape(node.transpose(product, swap), _matmul_shape(a.shape, b_shape))


@dataclass(frozen=True, slots=True)
class _Term:
    """A tensor whose dimensions have letters."""

    tensor: str
    letters: str
    is_constant: bool = False


def einsum(node: NodeImport) -> str:
    """Diagonals, sums and transposes of each operand, and a matrix product with each further one."""
    terms, result = _terms(node)
    total = terms[0]
    for index, term in enumerate(terms):
        wanted = set(result).union(*(other.letters for other in terms[index + 1 :]))
        if index == 0:
            total = _summed(node, _diagonal(node, total), wanted)
        else:
            part = _summed(node, _diagonal(node, term), wanted | set(total.letters))
            total = _product(node, _summed(node, total, wanted | set(part.letters)), part, wanted)
    return node.transpose(total.tensor, [total.letters.index(letter) for letter in result])


def _terms(node: NodeImport) -> tuple[list[_Term], str]:
    """The operands and the letters of the result. The dimensions of an ellipsis get letters, too; those of 1 there are dropped."""
    equation = node.word("equation", "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    words = left.split(",")
    if len(words) != len(node.inputs):
        raise node.refuse(f"equation {equation!r} has {len(words)} terms for {len(node.inputs)} inputs", hint="the model is damaged; export it again")
    most = max(node.rank(index) - len(word) + 3 for index, word in enumerate(words)) if "..." in left else 0
    extra = [chr(0x3B1 + index) for index in range(most)]  # Greek: no letters of the equation's
    terms = []
    for index, word in enumerate(words):
        own = "".join(extra[most - (node.rank(index) - len(word) + 3) :]) if "..." in word else ""
        letters = word.replace("...", own)
        if len(letters) != node.rank(index):
            raise node.refuse(f"equation {equation!r} does not fit an input of shape {list(node.shape(index))}", hint="check the input shapes")
        kept = [axis for axis, letter in enumerate(letters) if letter not in own or node.shape(index)[axis] != 1]
        tensor = node.reshape(node.input(index), [node.shape(index)[axis] for axis in kept])
        terms.append(_Term(tensor, "".join(letters[axis] for axis in kept), node.is_constant(index)))
    spread = "".join(letter for letter in extra if any(letter in term.letters for term in terms))
    once = "".join(sorted(letter for letter in set(left) if letter.isalpha() and left.count(letter) == 1))
    return terms, result.replace("...", spread) if arrow else spread + once


def _diagonal(node: NodeImport, term: _Term) -> _Term:
    """Letters that occur twice become one: every (size + 1)-th element of the two dimensions merged."""
    repeated = next((letter for letter in term.letters if term.letters.count(letter) > 1), "")
    if not repeated:
        return term
    pair = [axis for axis, letter in enumerate(term.letters) if letter == repeated][:2]
    others = [axis for axis in range(len(term.letters)) if axis not in pair]
    shape = node.shape_of(term.tensor)
    size = shape[pair[0]]
    moved = node.transpose(term.tensor, [*others, *pair])
    merged = node.reshape(moved, (*(shape[axis] for axis in others), size * size))
    part = node.slice(merged, len(others), 0, size, size + 1)
    return _diagonal(node, _Term(part, "".join(term.letters[axis] for axis in others) + repeated))


def _summed(node: NodeImport, term: _Term, wanted: set[str]) -> _Term:
    """The tensor summed over the dimensions that nothing else has."""
    gone = [axis for axis, letter in enumerate(term.letters) if letter not in wanted]
    if not gone:
        return term
    reduced = node.reduce("reduce_sum", term.tensor, gone)
    kept = [size for axis, size in enumerate(node.shape_of(reduced)) if axis not in gone]
    return _Term(node.reshape(reduced, kept), "".join(letter for letter in term.letters if letter in wanted))


def _product(node: NodeImport, left: _Term, right: _Term, wanted: set[str]) -> _Term:
    """The product: dimensions of both are batch or contracted, those of one are rows or columns."""
    if left.is_constant:
        left, right = right, left
    a, b = left.letters, right.letters
    sizes = dict(zip(a + b, node.shape_of(left.tensor) + node.shape_of(right.tensor), strict=True))
    batch = "".join(letter for letter in a if letter in b and letter in wanted)
    inner = "".join(letter for letter in a if letter in b and letter not in wanted)
    rows, columns = "".join(letter for letter in a if letter not in b), "".join(letter for letter in b if letter not in a)

    def arranged(term: _Term, *groups: str) -> str:
        order = [term.letters.index(letter) for letter in batch + "".join(groups)]
        merged = [math.prod(sizes[letter] for letter in group) for group in groups]
        return node.reshape(node.transpose(term.tensor, order), (*(sizes[letter] for letter in batch), *merged))

    product = node.emit("matmul", (arranged(left, rows, inner), arranged(right, inner, columns)), ops.MatMul())
    letters = batch + rows + columns
    return _Term(node.reshape(product, [sizes[letter] for letter in letters]), letters)


TABLE: tuple[Importer, ...] = (
    Importer("Conv", conv, f"1-D to 3-D; computed weights: 1-D and 2-D, up to {MOST_TAPS} taps"),
    Importer("ConvTranspose", conv_transpose, "1-D to 3-D, constant weights"),
    Importer("Gemm", gemm),
    Importer("MatMul", matmul),
    Importer("Einsum", einsum),
)
