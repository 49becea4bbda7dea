"""An integer graph as QDQ: float emitters between QuantizeLinear and DequantizeLinear.

The one big idea: the float value of every tensor keeps the tensor's name, its stored value is `name/stored`. Activations are
written as uint8 (stored value + 128, zero point + 128), which is the same number: onnxruntime rewrites int8 pairs to uint8 itself,
but only where a tensor has a single reader, and falls back to float kernels at the others.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx

from npucc.arithmetic import RANGES, clamp_bounds
from npucc.export.integers import must_be_spelled_out, spell_out
from npucc.export.model import PLAIN_FORM, Model
from npucc.export.operators import FLOAT, clip, emit
from npucc.export.segment import emit_segment
from npucc.graph import Graph, Node, Quant, Tensor
from npucc.ops import OPS
from npucc.segments import is_raw

TYPES = {"s8": "int8", "u8": "uint8", "s16": "int16", "s32": "int32"}
WEIGHTS, BIAS = 1, 2  # input positions of the operators with the trait `matrix`


def stored_name(tensor: str) -> str:
    """The name of the stored integers of a tensor in a QDQ model."""
    return f"{tensor}/stored"


def emit_quantized(graph: Graph, model: Model, *, unsigned: bool, exact: bool) -> None:
    """Write the whole graph into the model."""
    writer = _Writer(graph, model, unsigned, exact)
    for name in graph.inputs:
        writer.take_input(graph.tensors[name])
    for node in graph:
        writer.write(node)
    for name in graph.outputs:
        if graph.tensors[name].is_constant:
            writer.constant(graph.tensors[name], is_activation=True, into=name)


@dataclass(slots=True)
class _Writer:
    """`real` maps a tensor to the name of its float (or bool) value, where that is not the tensor's own; `integers` to what it stores."""

    graph: Graph
    model: Model
    unsigned: bool
    exact: bool
    real: dict[str, str] = field(default_factory=dict)
    integers: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[str, bool], str] = field(default_factory=dict)

    def take_input(self, tensor: Tensor) -> None:
        """A graph input arrives as it is in the ONNX model and is quantized first."""
        if tensor.quant is None or tensor.dtype == "bool" or is_raw(tensor.quant):
            return
        value = tensor.name if tensor.dtype == FLOAT else self.model.cast(tensor.name, FLOAT)
        self.real[tensor.name] = self._pair(value, tensor.quant, tensor.name, into="")

    def write(self, node: Node) -> None:
        """One node: its float meaning, quantized; then its clamp where saturation does not give it already."""
        if OPS[node.op].host:
            self._write_segment(node)
            return
        result = self.graph.tensors[node.outputs[0]]
        if self.exact and must_be_spelled_out(self.graph, node):
            self._write_integers(node, result)
            return
        if result.quant is None or result.dtype == "bool":
            emit(self.model, self.graph, node, self._read_all(node), result.name, self._outer_type)
            return
        self._name(result.name, partial(self._pair, self._raw(node, result), result.quant, result.name))

    def _read_all(self, node: Node) -> tuple[str, ...]:
        return tuple(self._read(node, index) for index in range(len(node.inputs)))

    def _raw(self, node: Node, result: Tensor) -> str:
        """The float meaning of a node, not rounded yet; clamped where saturation does not do it."""
        inputs, raw = self._read_all(node), self.model.fresh(f"{result.name}/raw")
        emit(self.model, self.graph, node, inputs, raw, self._outer_type)
        clamp, quant = getattr(node.attributes, "clamp", None), self.graph.quant(result.name)
        if clamp is None or clamp_bounds(clamp, quant) == RANGES[quant.dtype]:
            return raw
        return self._clamped(raw, clamp, quant, result.name)

    def _write_integers(self, node: Node, result: Tensor) -> None:
        """What the node stores, step by step, and its float value after it."""
        quant = self.graph.quant(result.name)
        self.integers[result.name] = into = self.model.fresh(stored_name(result.name))
        spell_out(self, node, into=into)
        write = self._real(into, quant, result.name)
        last = len(self.model.nodes)
        self._name(result.name, write)
        self.model.nodes[last].metadata_props.add(key=PLAIN_FORM, value=self._plain_form(node, result))

    def _real(self, stored: str, quant: Quant, name: str) -> Callable[[str], str]:
        """What writes the float value of what is stored, in one node. Of 32 bits without DequantizeLinear, which onnxruntime would move to where it
        can't quantize."""
        if quant.dtype != "s32":
            return partial(self._dequantize, stored, quant, self._scale_and_zero(quant, *self.form(quant), name))
        factors = [self.model.cast(stored, FLOAT), self.model.constant(quant.scale, FLOAT)]
        return lambda into: self.model.op("Mul", factors, into=into)

    def _plain_form(self, node: Node, result: Tensor) -> str:
        """The node as it is without `exact`: an ONNX graph in base64."""
        plain = replace(self, model=self.model.beside(), exact=False, constants={}, integers={})
        plain._pair(plain._raw(node, result), self.graph.quant(result.name), result.name, into=self.real_value(result.name))
        graph = onnx.GraphProto(node=plain.model.nodes, initializer=plain.model.constants)
        return base64.b64encode(graph.SerializeToString(deterministic=True)).decode()

    def _name(self, name: str, write: Callable[[str], str]) -> None:
        """Have a value written into a tensor's name; where ONNX has integers there, into a name of its own, and cast."""
        if self.graph.tensors[name].dtype == self._outer_type(name):
            write(name)
        else:
            self.real[name] = write("")
            self.model.cast(self.real[name], self.graph.tensors[name].dtype, into=name)

    def real_value(self, name: str) -> str:
        """The float (or bool) value of a tensor that is no constant."""
        return self.real.get(name, name)

    def stored(self, name: str) -> tuple[str, int]:
        """(the value that holds what a tensor stores, what is added to it)."""
        tensor = self.graph.tensors[name]
        if tensor.data is not None and name not in self.integers:
            self.integers[name] = self.model.constant(tensor.data, TYPES[self.graph.quant(name).dtype])
        if tensor.data is not None:
            return self.integers[name], 0
        return self.integers[name], self.form(self.graph.quant(name))[1]

    def _write_segment(self, node: Node) -> None:
        """A host segment between its quantized tensors; those that only the host touches go in and out as they are."""
        values = [(self._read(node, index), self._outer_type(name)) for index, name in enumerate(node.inputs)]
        outer = {name: self._outer_type(name) for name in node.outputs}
        paired = [name for name in node.outputs if outer[name] == FLOAT and not is_raw(self.graph.quant(name))]
        into = {name: self.model.fresh(f"{name}/raw") if name in paired else name for name in node.outputs}
        emit_segment(self.model, node, values, [(into[name], outer[name]) for name in node.outputs])
        for name in paired:
            self._name(name, partial(self._pair, into[name], self.graph.quant(name), name))

    def _outer_type(self, name: str) -> str:
        """The element type that a tensor has between two nodes."""
        tensor = self.graph.tensors[name]
        if tensor.data is not None and tensor.quant is None:
            return str(tensor.data.dtype)
        return tensor.dtype if tensor.dtype == "bool" or is_raw(self.graph.quant(name)) else FLOAT

    def _clamped(self, value: str, clamp: tuple[float, float], quant: Quant, name: str) -> str:
        """Quantized, then clipped on the same scale: exactly the integer clamp, and the operator itself still runs in integers."""
        unclamped = self._pair(value, quant, f"{name}/unclamped", into=self.model.fresh(f"{name}/unclamped"))
        clipped = self.model.fresh(f"{name}/clipped")
        clip(self.model, unclamped, clamp, into=clipped)
        return clipped

    def _read(self, node: Node, index: int) -> str:
        name = node.inputs[index]
        tensor = self.graph.tensors.get(name)
        if tensor is None or not tensor.is_constant:
            return self.real_value(name)
        is_weight = OPS[node.op].matrix and index in (WEIGHTS, BIAS)
        return self.constant(tensor, is_activation=not is_weight)

    def constant(self, tensor: Tensor, *, is_activation: bool, into: str = "") -> str:
        """The float value of a constant: integers and their DequantizeLinear; float (and bool) ones as they are.

        Weights are written anew for each node that reads them: onnxruntime rewrites them where they are read, and only once.
        """
        key = (tensor.name, is_activation)
        if key not in self.constants or not is_activation:
            assert tensor.data is not None
            if tensor.quant is None or tensor.dtype == "bool":
                dtype = "bool" if tensor.dtype == "bool" else str(tensor.data.dtype)
                self.constants[key] = self.model.constant(tensor.data, dtype, name=self.model.fresh(into or f"{tensor.name}/constant"))
            else:
                quant, dtype, shift = tensor.quant, *(self.form(tensor.quant) if is_activation else (TYPES[tensor.quant.dtype], 0))
                stored = self.model.constant(tensor.data.astype(np.int64) + shift, dtype, name=self.model.fresh(stored_name(tensor.name)))
                self.constants[key] = self._dequantize(stored, quant, self._scale_and_zero(quant, dtype, shift, tensor.name), into=into)
        return self.constants[key]

    def form(self, quant: Quant) -> tuple[str, int]:
        """(element type, number added to what is stored) of an activation."""
        return ("uint8", 128) if self.unsigned and quant.dtype == "s8" else (TYPES[quant.dtype], 0)

    def _pair(self, value: str, quant: Quant, name: str, into: str) -> str:
        """QuantizeLinear and DequantizeLinear; returns the dequantized value. 32 bits, which QuantizeLinear has not, as float steps."""
        if is_raw(quant):
            return self.model.op("Identity", [value], into=into)
        if quant.dtype == "s32":
            scale = self.model.constant(quant.scale, FLOAT)
            steps = self.model.op("Round", [self.model.op("Div", [value, scale])])
            return self.model.op("Mul", [self.model.op("Clip", [steps, *self._limits()]), scale], into=into)
        dtype, shift = self.form(quant)
        parameters = self._scale_and_zero(quant, dtype, shift, name)
        stored = self.model.op("QuantizeLinear", [value, *parameters], into=self.model.fresh(stored_name(name)))
        self.integers[name] = stored
        return self._dequantize(stored, quant, parameters, into=into)

    def _limits(self) -> tuple[str, str]:
        """Of int32, as float32 holds them."""
        low, high = RANGES["s32"]
        return self.model.constant(low, FLOAT), self.model.constant(high, FLOAT)

    def _dequantize(self, stored: str, quant: Quant, parameters: tuple[str, str], into: str) -> str:
        axis = {} if quant.axis is None else {"axis": quant.axis}
        return self.model.op("DequantizeLinear", [stored, *parameters], into=into, **axis)

    def _scale_and_zero(self, quant: Quant, dtype: str, shift: int, name: str) -> tuple[str, str]:
        """Initializers of this tensor alone: onnxruntime rewrites int8 weights with their zero points and can't where two share one."""
        zero = np.full(quant.scale.shape, quant.zero + shift)
        scale_name, zero_name = (self.model.fresh(f"{name}/{what}") for what in ("scale", "zero"))
        return self.model.constant(quant.scale, FLOAT, name=scale_name), self.model.constant(zero, dtype, name=zero_name)
