"""Weights of an already quantized model that one product of the matrix engine can't take: a sum of products instead.

The one big idea: a whole number is written in digits. Two digits of base 256 are 16 bits; smaller bases keep the sums of 16-bit activations
within 32 bits. The product with each digit is a convolution (or matrix product) like any other, and they are added in 16 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from npucc.arithmetic import RANGES
from npucc.graph import Editor, Given, Graph, Node, Quant
from npucc.ops import OPS, Binary, Table
from npucc.quantize.constants import Axes, axes_of, fits, largest_step, stored_bias
from npucc.quantize.given import sums_in_32_bits
from npucc.quantize.ranges import Range, activation_quant

Array = np.ndarray[Any, np.dtype[Any]]

BASES = (256, 64, 16, 4)
HIGH = 258  # steps of 8 bits, and a rest of 8 bits, that cover 16 wherever the zero point is
LARGEST = 127 * 256 + 127  # that two digits of base 256 can say


def in_digits(graph: Graph) -> Graph:
    """The graph with such weights, and right operands that are computed in 16 bits, in digits: wherever the model gives the scales."""
    editor = Editor(graph)
    for node in graph:
        source = graph.tensors[node.inputs[0]] if OPS[node.op].matrix else None
        if source is None or source.given is None or source.given.quant is None:
            continue
        right, bias = graph.tensors[node.inputs[1]], graph.tensors[node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] else None
        if not right.is_constant and right.given is not None and right.given.dtype == "s16":
            _write_computed(editor, node, source.given.quant, right.given)
        elif not source.is_constant and right.data is not None and right.given is not None and right.given.stored is not None:
            axes = axes_of(node, right.data.ndim)
            steps, scale = _whole_numbers(right.data, right.given, axes.output)
            accumulator = (np.float32(source.given.quant.scale) * scale.reshape(-1)).astype(np.float32)
            if steps.min(initial=0) >= -128 and steps.max(initial=0) <= 127 and sums_in_32_bits(source, bias, accumulator):
                continue
            digits = _digits(steps, scale, None if bias is None else bias.data, source.given.quant, axes)
            if len(digits) > 1:
                _write_constant(editor, node, source.given.quant, digits, axes)
    return editor.freeze()


def _whole_numbers(weights: Array, given: Given, axis: int | None) -> tuple[Array, Array]:
    """The model's integers less their zero point, and their scale: one for each channel of `axis`, or one. Where it is another in each block, or
    the integers are larger than two digits can say: its weights in 16 bits."""
    assert given.stored is not None
    steps = given.stored.astype(np.int64) - given.zero
    per_channel = all(size == 1 or index == axis for index, size in enumerate(given.scale.shape))
    if per_channel and np.abs(steps).max(initial=0) <= LARGEST:
        return steps, given.scale
    others = tuple(index for index in range(weights.ndim) if index != axis)
    values = weights.astype(np.float64)
    scale = (np.abs(values).max(axis=others, keepdims=True) / LARGEST).astype(np.float32)
    scale[scale == 0] = 1.0
    return np.rint(values / scale).astype(np.int64), scale


def _digits(steps: Array, scale: Array, bias: Array | None, source: Quant, axes: Axes) -> list[tuple[Array, Array]]:
    """(digit, its scale), the lowest first, in the largest base that keeps all sums within 32 bits: one, if the integers can stay as they are.
    Empty, if no base does (tens of thousands of products in a sum)."""
    for base in BASES:
        digits = in_base(steps, base)
        found = [(digit, (scale * np.float32(base**place)).astype(np.float32)) for place, digit in enumerate(digits)]
        accumulator = (np.float32(source.scale) * found[-1][1].reshape(-1)).astype(np.float32)
        offset = None if bias is None else stored_bias(bias.reshape(-1), accumulator)
        if np.all(fits(digits[-1], offset, source, axes)) and all(np.all(fits(digit, None, source, axes)) for digit in digits[:-1]):
            return found
    return []


def in_base(values: Array, base: int) -> list[Array]:
    """Whole numbers as int8 digits, the lowest first: from −base/2 to base/2 − 1, the highest may be base/2."""
    digits: list[Array] = []
    while values.min(initial=0) < -(base // 2) or values.max(initial=0) > min(base // 2, 127):
        low = (values + base // 2) % base - base // 2
        digits.append(low.astype(np.int8))
        values = (values - low) // base
    return [*digits, values.astype(np.int8)]


def _write_constant(editor: Editor, node: Node, source: Quant, digits: list[tuple[Array, Array]], axes: Axes) -> None:
    """A product for each digit of the weights."""
    terms = []
    for place, (digit, scale) in enumerate(digits):
        name = editor.constant(f"{node.inputs[1]}/digit{place}", (digit * scale).astype(np.float32), Given("s8", scale, 0, digit))
        sums = (np.abs(digit.astype(np.float64)) * scale).sum(axis=axes.summed)
        terms.append((name, float(sums.max(initial=0.0)) * largest_step(source) * float(source.scale)))
    _write(editor, node, terms)


def _write_computed(editor: Editor, node: Node, source: Quant, given: Given) -> None:
    """b = high + low of 8 bits each, the high one in steps of `HIGH`."""
    name = node.inputs[1]
    whole = editor.tensors[name]
    coarse = Given("s8", (given.scale * np.float32(HIGH)).astype(np.float32), int(np.rint(given.zero / HIGH)))
    high, low = (
        editor.add_tensor(replace(whole, name=editor.fresh(f"{name}/{part}"), source="", given=each))
        for part, each in (("high", coarse), ("low", replace(given, dtype="s8", zero=0)))
    )
    editor.add_node(Node(editor.fresh(f"{high}:table"), "table", (name,), (high,), Table("x"), node.sources), at=node.name)
    editor.add_node(Node(editor.fresh(f"{low}:sub"), "sub", (name, high), (low,), Binary(), node.sources), at=node.name)
    left = editor.tensors[node.inputs[0]]
    largest = left.shape[-1] * largest_step(source) * float(source.scale) * 128 * float(given.scale)
    _write(editor, node, [(low, largest), (high, np.inf)])


def _write(editor: Editor, node: Node, terms: list[tuple[str, float]]) -> None:
    """The products with several right operands, the lowest digit first, and their sum. Given with each: the largest magnitude of its product."""
    below: tuple[str, ...] = ()
    reach = 0.0
    for place, (name, largest) in enumerate(terms[:-1]):
        reach += largest
        below = (*below, _add(editor, node, node.op, (node.inputs[0], name), Range(-largest, largest)))
        if place:
            below = (_add(editor, node, "add", below, Range(-reach, reach)),)
    top = _add(editor, node, node.op, (node.inputs[0], terms[-1][0], *node.inputs[2:]), _top(editor.tensors[node.outputs[0]].given, reach))
    clamp = getattr(node.attributes, "clamp", None)
    editor.add_node(replace(node, op="add", inputs=(top, *below), attributes=Binary(clamp)))


def _top(result: Given | None, reach: float) -> Range | None:
    """What the product with the highest digit has to hold, where the result's scale is given: the other digits bring nothing back from beyond."""
    if result is None or result.quant is None:
        return None
    low, high = ((limit - result.zero) * float(result.scale) for limit in RANGES[result.dtype])
    return Range(min(low, 0.0) - reach, max(high, 0.0) + reach)


def _add(editor: Editor, node: Node, op: str, inputs: tuple[str, ...], covered: Range | None) -> str:
    """A node whose result has 16 bits: over this range, else over one to be found."""
    quant = activation_quant(covered, "s16") if covered else None
    given = Given(quant.dtype, quant.scale, quant.zero) if quant else None
    result = editor.tensors[node.outputs[0]]
    name = editor.add_tensor(replace(result, name=editor.fresh(f"{result.name}/{op}"), source="", given=given, wide=True))
    attributes: Any = Binary() if op == "add" else replace(node.attributes, clamp=None)  # type: ignore[call-arg]
    editor.add_node(Node(editor.fresh(f"{node.name}/{op}"), op, inputs, (name,), attributes, node.sources), at=node.name)
    return name
