"""Models that are quantized already: QuantizeLinear and DequantizeLinear, and the operators that are written out with them.

The one big idea: QLinearConv is Conv between DequantizeLinear and QuantizeLinear. So an operator on integers is one line of a table, and its
float operator's importer does the rest; what the pairs say about scales stays on the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from npucc.errors import DamagedError, ImportModelError
from npucc.frontend.node import Emitted, Importer, NodeImport
from npucc.frontend.steps import ACTIVATIONS, DYNAMIC, FORMS, as_attributes, constant, real
from npucc.graph import Quant, Tensor
from npucc.ops import OPS, Pad

MICROSOFT = "com.microsoft"


def _steps(node: NodeImport, scale: int, zero: int, kind: int) -> Quant:
    """The steps of an activation of ONNX type `kind`, from the inputs `scale` and `zero` (which may be left out)."""
    factors = node.floats(scale, "scale")
    zeros = node.constant(zero, "zero point").astype(np.int64) if node.has(zero) else np.zeros((), np.int64)
    if factors.size != 1 or zeros.size != 1:
        raise node.refuse("an activation has more than one scale or zero point", hint="quantize activations per tensor")
    _refuse_infinite(node, factors)
    if float(factors.reshape(())) <= 0:
        raise node.refuse(f"its scale is {float(factors.reshape(()))}, expected a positive number", hint="quantize the model again")
    dtype, shift = FORMS[kind]
    return Quant(dtype, factors.reshape(()), int(zeros.reshape(())) - shift)


def _refuse_infinite(node: NodeImport, scale: np.ndarray) -> None:
    """onnxruntime's quantizer writes infinite scales for what holds infinities, such as the padding of a maximum: every value turns into NaN."""
    if not np.isfinite(scale).all():
        found = scale[~np.isfinite(scale)].reshape(-1)[0]
        message = f"{node.operator}: its scale is {found}, which turns 0 into NaN; expected a positive number"
        hint = "quantize the model again, without the nodes whose values are infinite (nodes_to_exclude of onnxruntime's quantizer)"
        raise DamagedError(message, file=node.file, node=node.name, hint=hint)


def quantize_linear(node: NodeImport) -> str:
    """Rounding; the result's integers are known by their steps."""
    kind = node.element_type(2) if node.has(2) else node.integer("output_dtype", 0) or TensorProto.UINT8
    if kind not in ACTIVATIONS:
        raise node.refuse(f"makes {TensorProto.DataType.Name(kind)}", hint="supported are 8 and 16 bits")
    node.result_type, node.result_steps = kind, _steps(node, 1, 2, kind)
    return node.emit("quantize", (node.input(0),), as_attributes(node.result_steps, kind))


def dequantize_linear(node: NodeImport) -> str:
    """Of a constant: another constant, which keeps its integers. Else what QuantizeLinear rounded, or a function of whole numbers."""
    node.result_type = TensorProto.FLOAT
    kind = node.element_type(0)
    if kind not in FORMS:
        raise node.refuse(f"reads {TensorProto.DataType.Name(kind)}", hint="supported are integers of up to 16 bits, and of 32")
    if node.is_constant(0):
        zero = node.constant(2, "zero point") if node.has(2) else None
        axis, block = node.integer("axis", 1), node.integer("block_size", 0)
        _refuse_infinite(node, node.floats(1, "scale"))
        value, given = constant(node.constant(0, "x"), node.floats(1, "scale"), zero, kind, axis=axis, block=block)
        return node.set_constant(0, value, given)
    known = node.steps_of(0)
    if known is not None and known.key == DYNAMIC.key:
        return node.reals(0)
    quant = _steps(node, 1, 2, kind)
    if known is not None and known.key == quant.key:
        return node.reals(0)
    value_of = node.table(real(quant, kind), node.input(0))
    return node.emit("quantize", (value_of,), as_attributes(quant, kind)) if kind in ACTIVATIONS else value_of


def dynamic_quantize_linear(node: NodeImport) -> str:
    """Its scale, chosen in each run from the data, becomes one that calibration chooses; until then it does nothing."""
    node.set_constant(1, np.asarray(1.0, np.float32))
    node.set_constant(2, np.asarray(0, np.uint8))
    node.result_type, node.result_steps = TensorProto.UINT8, DYNAMIC
    return node.input(0)


def moved(emitted: Sequence[Emitted], quant: Quant, kind: int, tensors: Mapping[str, Tensor]) -> list[Emitted] | None:
    """Nodes that were written for integers, for the reals that these stand for; None where they do more than move them."""
    result = []
    for each in emitted:
        values = [name for index, name in enumerate(each.inputs) if index not in OPS[each.op].indices]
        if not OPS[each.op].moves_data or any(name in tensors and tensors[name].is_constant for name in values):
            return None
        attributes = each.attributes
        if isinstance(attributes, Pad):
            attributes = replace(attributes, value=float(np.float32(attributes.value - quant.zero - FORMS[kind][1]) * np.float32(quant.scale)))
        result.append(replace(each, attributes=attributes))
    return result


Operand = tuple[int, int, int]  # inputs: integers, scale, zero point; NONE: left out
NONE = -1


@dataclass(frozen=True, slots=True)
class Expansion:
    """An operator on integers as the float `operator` between DequantizeLinear and QuantizeLinear.

    `plain`: inputs of the float operator that come first and are not dequantized; `bias`: an int32 input in steps of the first two operands;
    `axes`: of the operands' scales, where there are several; `result`: scale and zero point (none: the result is float, or int32 if `whole`);
    `repeated`: operands follow in threes from input 2 on; `rest`: inputs of the float operator that follow the operands and are not dequantized;
    `added`: a float input that is added in the end; `where`: the domain of the float operator.
    """

    name: str
    operator: str
    operands: tuple[Operand, ...]
    result: tuple[int, int] | None = None
    domain: str = MICROSOFT
    plain: tuple[int, ...] = ()
    bias: int = NONE
    axes: tuple[int, int] = (1, 1)
    whole: bool = False
    repeated: bool = False
    rest: tuple[int, ...] = ()
    added: int = NONE
    where: str = ""
    note: str = ""

    def nodes(self, node: NodeProto) -> list[NodeProto]:
        """The node written out. All parts have its name. Raises ImportModelError for a form that this can't say."""
        if any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute):
            return ChannelsLast(self.name, self.name, self.domain).nodes(node)
        return list(_Writer(self, node).nodes())


#: attributes that only the integer operator has
DROPPED = frozenset({"opset"})


class _Writer:
    def __init__(self, expansion: Expansion, node: NodeProto) -> None:
        self.expansion, self.node = expansion, node
        self.attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if self.attributes.get("alpha", 1.0) != 1.0 and expansion.bias != NONE:
            raise ImportModelError(f"{node.op_type}: alpha is not 1", node=node.name, hint="put alpha into the scale of B")

    def input(self, index: int) -> str:
        return self.node.input[index] if 0 <= index < len(self.node.input) else ""

    def make(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> NodeProto:
        while inputs and not inputs[-1]:
            inputs.pop()
        return helper.make_node(operator, inputs, outputs, name=self.node.name, **attributes)

    def nodes(self) -> Iterator[NodeProto]:
        expansion, output = self.expansion, self.node.output[0]
        operands = expansion.operands
        if expansion.repeated:
            operands = tuple((index, index + 1, index + 2) for index in range(2, len(self.node.input), 3))
        arguments = [self.input(index) for index in expansion.plain]
        for number, operand in enumerate(operands):
            arguments.append(f"{output}/operand{number}" if self.input(operand[0]) else "")
            if arguments[-1]:
                yield from self.dequantized(operand, number, arguments[-1])
        arguments += map(self.input, expansion.rest)
        if self.input(expansion.bias):
            arguments.append(f"{output}/bias")
            yield self.make("Mul", [self.input(operand[1]) for operand in operands], f"{output}/bias_scale")
            yield self.make("DequantizeLinear", [self.input(expansion.bias), f"{output}/bias_scale"], arguments[-1], axis=0)
        last = f"{output}/real" if self.is_quantized() or self.input(expansion.added) else output
        attributes = {key: value for key, value in self.attributes.items() if key not in DROPPED}
        yield self.make(expansion.operator, arguments, last, *self.node.output[1:], domain=expansion.where, **attributes)
        if self.is_quantized() and expansion.result is not None:
            yield self.make("QuantizeLinear", [last, *map(self.input, expansion.result)], output)
        elif self.input(expansion.added):
            yield self.make("Add", [last, self.input(expansion.added)], output)

    def is_quantized(self) -> bool:
        return self.expansion.result is not None and bool(self.input(self.expansion.result[0]))

    def dequantized(self, operand: Operand, number: int, output: str) -> Iterator[NodeProto]:
        values, scale, zero = map(self.input, operand)
        if not scale:
            if operand[1] == NONE and operand[2] == NONE:
                yield self.make("Identity", [values], output)
                return
            scale = f"{output}/scale"
            yield helper.make_node("Constant", [], [scale], name=self.node.name, value_float=1.0)
        axis = self.expansion.axes[number] if number < len(self.expansion.axes) else 1
        if number == 1 and self.attributes.get("transB", 0):
            axis = 0
        yield self.make("DequantizeLinear", [values, scale, zero], output, axis=axis)


@dataclass(frozen=True, slots=True)
class ChannelsLast:
    """An operator on images [batch, height, width, channels], as onnxruntime's optimizer saves it, as `operator` between transpositions."""

    name: str
    operator: str
    where: str = ""  # domain of `operator`
    domain: str = MICROSOFT
    whole: bool = False
    note: str = "as the operator whose channels come second"

    def nodes(self, node: NodeProto) -> list[NodeProto]:
        """The node written out. All parts have its name. The first input is an image, and the fourth of a convolution that adds one."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute if each.name != "channels_last"}
        rank = len(attributes.get("kernel_shape", (0, 0))) + 2
        first, last = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]
        output, inputs = node.output[0], list(node.input)
        images = [0, 3] if self.operator == "FusedConv" and len(inputs) > 3 and inputs[3] else [0]
        nodes = []
        for index in images:
            inputs[index] = f"{output}/image{index}"
            nodes.append(helper.make_node("Transpose", [node.input[index]], [inputs[index]], name=node.name, perm=first))
        nodes.append(helper.make_node(self.operator, inputs, [f"{output}/turned"], name=node.name, domain=self.where, **attributes))
        return [*nodes, helper.make_node("Transpose", [f"{output}/turned"], [output], name=node.name, perm=last)]


@dataclass(frozen=True, slots=True)
class DynamicLstm:
    """DynamicQuantizeLSTM as LSTM. Its weights, [directions, inputs, 4·hidden], are made real and turned.

    They have a scale and a zero point per direction, or per direction and column.
    """

    name: str = "DynamicQuantizeLSTM"
    operator: str = "LSTM"
    where: str = ""
    domain: str = MICROSOFT
    whole: bool = False
    note: str = "calibrated scale"

    def nodes(self, node: NodeProto) -> list[NodeProto]:
        """The node written out. All parts have its name."""
        inputs = [*node.input, *[""] * (12 - len(node.input))]
        stem = next(filter(None, node.output))
        row = f"{stem}/row"
        nodes = [helper.make_node("Constant", [], [row], name=row, value_ints=[0, 1, -1])]
        for index, scale in ((1, 8), (2, 10)):
            part = f"{stem}/operand{index}"
            values, zero, zeros, factor, above, reals = (f"{part}/{name}" for name in ("values", "zero", "zeros", "factor", "above", "real"))
            for operator, reads, made, attributes in (
                ("Cast", [inputs[index]], values, {"to": TensorProto.FLOAT}),
                ("Cast", [inputs[scale + 1]], zero, {"to": TensorProto.FLOAT}),
                ("Reshape", [zero, row], zeros, {}),
                ("Reshape", [inputs[scale], row], factor, {}),
                ("Sub", [values, zeros], above, {}),
                ("Mul", [above, factor], reals, {}),
                ("Transpose", [reals], part, {"perm": [0, 2, 1]}),
            ):
                nodes.append(helper.make_node(operator, reads, [made], name=made, **attributes))
        lstm = helper.make_node("LSTM", [inputs[0], f"{stem}/operand1", f"{stem}/operand2", *inputs[3:8]], list(node.output), name=node.name)
        lstm.attribute.extend(node.attribute)
        return [*nodes, lstm]


_PAIR: tuple[Operand, ...] = ((0, 1, 2), (3, 4, 5))
_ONE: tuple[Operand, ...] = ((0, 1, 2),)
_STATIC = "constant scales and zero points"
_DYNAMIC = "of DynamicQuantizeLinear: calibrated scale"
EXPANSIONS: tuple[Expansion, ...] = (
    *(Expansion("QLinearConv", "Conv", _PAIR, (6, 7), domain=domain, bias=8, axes=(1, 0), note=_STATIC) for domain in ("", MICROSOFT)),
    *(Expansion("QLinearMatMul", "MatMul", _PAIR, (6, 7), domain=domain, axes=(-2, -1), note=_STATIC) for domain in ("", MICROSOFT)),
    Expansion("ConvInteger", "Conv", ((0, NONE, 2), (1, NONE, 3)), domain="", axes=(1, 0), whole=True, note=_DYNAMIC),
    Expansion("MatMulInteger", "MatMul", ((0, NONE, 2), (1, NONE, 3)), domain="", axes=(-2, -1), whole=True, note=_DYNAMIC),
    Expansion("MatMulIntegerToFloat", "MatMul", ((0, 2, 4), (1, 3, 5)), axes=(-2, -1), added=6, note=_DYNAMIC),
    Expansion("DynamicQuantizeMatMul", "MatMul", ((0, NONE, NONE), (1, 2, 3)), axes=(-2, -1), added=4, note="calibrated scale"),
    Expansion("QGemm", "Gemm", _PAIR, (7, 8), bias=6, axes=(1, 1), note=_STATIC),
    *(Expansion(f"QLinear{name}", name, _PAIR, (6, 7), note=_STATIC) for name in ("Add", "Mul")),
    *(
        Expansion(f"QLinear{name}", name, _ONE, (3, 4), note=_STATIC)
        for name in ("LeakyRelu", "Sigmoid", "AveragePool", "GlobalAveragePool", "ReduceMean", "Softmax")
    ),
    Expansion("QAttention", "Attention", ((0, 3, 6), (1, 4, 7)), rest=(2, 5, 8), where=MICROSOFT, note=_DYNAMIC),
    Expansion(
        "QEmbedLayerNormalization", "EmbedLayerNormalization", tuple((2 + i, 8 + i, 13 + i) for i in range(5)), plain=(0, 1), rest=(7,),
        where=MICROSOFT, note=_STATIC,
    ),
    Expansion("QLinearConcat", "Concat", (), (0, 1), repeated=True, note=_STATIC),
    Expansion("QLinearWhere", "Where", ((1, 2, 3), (4, 5, 6)), (7, 8), plain=(0,), note=_STATIC),
)
WRITTEN_OUT: tuple[Expansion | ChannelsLast | DynamicLstm, ...] = (
    *EXPANSIONS, DynamicLstm(), ChannelsLast("NhwcConv", "Conv"), ChannelsLast("NhwcFusedConv", "FusedConv", MICROSOFT),
    ChannelsLast("NhwcMaxPool", "MaxPool"),
)  # fmt: skip
BY_NAME = {(record.domain, record.name): record for record in WRITTEN_OUT}

TABLE: tuple[Importer, ...] = (
    *(
        Importer(name, run, note, domain)
        for name, run, note in (
            ("QuantizeLinear", quantize_linear, "8 or 16 bits, one constant scale; it sets the scale of a tensor and costs nothing"),
            ("DequantizeLinear", dequantize_linear, "constants: also 2, 4 and 32 bits, per channel or block; others: one constant scale"),
        )
        for domain in ("", MICROSOFT)
    ),
    Importer("DynamicQuantizeLinear", dynamic_quantize_linear, "its scale is fixed by calibration, not chosen in each run"),
)
