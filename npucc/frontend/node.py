"""What an importer function sees: one ONNX node with its inputs resolved, and the means to emit canonical nodes.

The one big idea: an importer is a function from this view to the names of its results. It emits nodes by calling `emit`, whose result shape
comes from the operator's own record; where a constant is needed it asks for the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from onnx import NodeProto, TensorProto, helper

from npucc import ops, scalar
from npucc.errors import ImportModelError
from npucc.frontend.constants import Constants
from npucc.frontend.prepare import numpy_name
from npucc.frontend.steps import DYNAMIC, whole
from npucc.graph import Editor, Given, Moments, Quant, Tensor
from npucc.ops import OPS, Attributes


@dataclass(frozen=True, slots=True)
class Emitted:
    """A canonical node on its way into the graph."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes
    shape: tuple[int, ...]
    dtype: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Importer:
    """One ONNX operator: how its nodes are written in canonical operators. `note` is said of it in the list of supported operators."""

    name: str
    run: Callable[[NodeImport], str | Sequence[str]]
    note: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """By ONNX tensor: its graph tensor, its ONNX element type, and the steps of integers whose graph tensor holds the reals that they stand for.

    `reserved`: names that the graph will need.
    """

    tensors: Mapping[str, str]
    types: Mapping[str, int]
    steps: Mapping[str, Quant]
    reserved: Container[str]


class NodeImport:
    """One ONNX node under import."""

    def __init__(
        self,
        proto: NodeProto,
        opset: int,
        file: str,
        editor: Editor,
        constants: Constants,
        known: Known,
        *,
        as_reals: bool = False,
    ) -> None:
        """`as_reals`: inputs that have steps are the reals that their integers stand for."""
        self.name, self.operator, self.opset, self.file = proto.name, proto.op_type, opset, file
        self.proto = proto
        self.inputs = tuple(proto.input)
        self.outputs = tuple(proto.output)
        self.emitted: list[Emitted] = []
        self._editor, self._constants = editor, constants
        self._tensors, self._types, self._steps, self._reserved = known.tensors, known.types, known.steps, known.reserved
        self._attributes = {attribute.name: attribute for attribute in proto.attribute}
        self._local: dict[str, tuple[tuple[int, ...], str]] = {}
        self._numbers: dict[str, int] = {}  # stem → the number of its newest name
        self._as_reals = as_reals
        self.result_type = 0  # ONNX element type of the first result, where it is not that of the first input
        self.result_steps: Quant | None = None  # of the first result

    def refuse(self, message: str, *, hint: str = "change the model before export") -> ImportModelError:
        """The error to raise for this node."""
        return ImportModelError(f"{self.operator}: {message}", file=self.file, node=self.name, hint=hint)

    # ---- attributes

    def attribute(self, name: str, default: Any) -> Any:
        return helper.get_attribute_value(self._attributes[name]) if name in self._attributes else default

    def integer(self, name: str, default: int) -> int:
        return int(self.attribute(name, default))

    def real(self, name: str, default: float) -> float:
        return float(np.float32(self.attribute(name, default)))

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        value = self.attribute(name, default)
        return None if value is None else [int(entry) for entry in value]

    def word(self, name: str, default: str) -> str:
        value = self.attribute(name, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    # ---- inputs

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and bool(self.inputs[index])

    def is_constant(self, index: int) -> bool:
        return self.has(index) and self.inputs[index] in self._constants

    def constant(self, index: int, what: str) -> np.ndarray:
        """The value of a constant input; refuses one that is computed from the model's inputs."""
        if not self.is_constant(index):
            raise self.refuse(
                f"{what} (input {index}) must be a constant, but it depends on the model's inputs",
                hint="export the model with static shapes and fixed parameters",
            )
        return self._constants.value(self.inputs[index])

    def floats(self, index: int, what: str) -> np.ndarray:
        return np.asarray(self.constant(index, what), np.float32)

    def integers_input(self, index: int, what: str) -> list[int]:
        return [int(value) for value in np.asarray(self.constant(index, what)).reshape(-1)]

    def integers_of(self, name: str, index: int) -> list[int] | None:
        """A list that is an attribute in older opsets and an input in newer ones; None if it is given in neither."""
        if name in self._attributes:
            return self.integers(name)
        return self.integers_input(index, name) if self.has(index) else None

    def element_type(self, index: int) -> int:
        """The ONNX element type of an input."""
        name = self.inputs[index]
        return self._types[name] if name in self._types else int(helper.np_dtype_to_tensor_dtype(self._constants.value(name).dtype))

    def is_integer(self, index: int) -> bool:
        return self.element_type(index) not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.BOOL)

    def input(self, index: int) -> str:
        """The graph tensor of an input (a constant becomes a float32 or bool tensor)."""
        if not self.has(index):
            raise self.refuse(f"input {index} is missing", hint="the model is damaged; export it again")
        name = self.inputs[index]
        if name in self._constants:
            return self._constant_tensor(name)
        return self._tensors[name] if name not in self._steps or self._as_reals else self._integers(name)

    def _integers(self, name: str) -> str:
        """The integers of a quantized tensor, as numbers."""
        if self._steps[name].key == DYNAMIC.key:
            raise self.refuse(f"reads the integers {name!r} of DynamicQuantizeLinear")
        kind = self._types[name]
        dtype = numpy_name(kind) if kind in (TensorProto.INT8, TensorProto.UINT8) else "int32"  # few operators of onnxruntime take 16 bits
        return self.table(whole(self._steps[name], kind), self._tensors[name], dtype=dtype)

    def softmax_source(self, index: int) -> tuple[str, int] | None:
        """(scores, axis) where an input is the result of a softmax; None else."""
        producer = None if self.is_constant(index) else self._editor.producer(self._tensors[self.inputs[index]])
        return (producer.inputs[0], producer.attributes.axis) if producer is not None and isinstance(producer.attributes, ops.Softmax) else None

    def steps_of(self, index: int) -> Quant | None:
        """The steps of an input whose graph tensor holds reals; None of one that holds what the ONNX tensor holds."""
        return self._steps.get(self.inputs[index])

    def reals(self, index: int) -> str:
        """The graph tensor of an input that has steps."""
        return self._tensors[self.inputs[index]]

    def _constant_tensor(self, name: str) -> str:
        if name not in self._editor.tensors:
            value = self._constants.value(name)
            if value.dtype.kind not in "biuf":
                raise self.refuse(f"constant {name!r} holds {value.dtype}, not numbers")
            value = value if value.dtype == bool else value.astype(np.float32, copy=False)
            self._editor.add_tensor(Tensor(name, tuple(value.shape), str(value.dtype), value, source=name, given=self._constants.given.get(name)))
        return name

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of an input."""
        name = self.inputs[index]
        return tuple(self._constants.value(name).shape) if name in self._constants else self.shape_of(self._tensors[name])

    def rank(self, index: int = 0) -> int:
        return len(self.shape(index))

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """The shape of a graph tensor, emitted by this node or before."""
        return self._local[tensor][0] if tensor in self._local else self._editor.tensors[tensor].shape

    def note_moments(self, tensor: str, moments: Moments) -> None:
        """Keep what the node knows of the values of a tensor made before it."""
        if tensor in self._editor.tensors:
            self._editor.tensors[tensor] = replace(self._editor.tensors[tensor], moments=moments)

    def dtype_of(self, tensor: str) -> str:
        dtype = self._local[tensor][1] if tensor in self._local else self._editor.tensors[tensor].dtype
        return "bool" if dtype == "bool" else "float32"

    def axis(self, axis: int, rank: int) -> int:
        """The non-negative form of an axis."""
        if not -rank <= axis < rank:
            raise self.refuse(f"axis {axis} is outside a tensor of rank {rank}", hint="the model is damaged; export it again")
        return axis % rank if rank else 0

    # ---- results

    def _fresh(self, stem: str) -> str:
        number = self._numbers.get(stem, 1)  # one node may emit thousands: looking from 1 each time would take time that grows with the square
        name = stem if number == 1 else f"{stem}.{number}"
        while name in self._reserved or name in self._local or name in self._editor.tensors:
            number += 1
            name = f"{stem}.{number}"
        self._numbers[stem] = number
        return name

    def emit(self, op: str, inputs: Sequence[str], attributes: Attributes, *, dtype: str = "", wide: bool = False) -> str:
        """Add a canonical node; its result's name. `wide`: the result shall have 16 bits."""
        shapes = [self.shape_of(name) if name else None for name in inputs]
        shape = OPS[op].shape(attributes, shapes)
        assert shape is not None
        sizes = tuple(int(size) for size in shape)
        if any(size < 0 for size in sizes):
            raise self.refuse(
                f"yields the impossible shape {list(sizes)} from {', '.join(str(list(part or ())) for part in shapes)}", hint="check the input shapes"
            )
        output = self._fresh(f"{next(filter(None, self.outputs))}/{op}")
        self._local[output] = (sizes, dtype or (self.dtype_of(inputs[0]) if OPS[op].moves_data else "float32"))
        self.emitted.append(Emitted(op, tuple(inputs), output, attributes, sizes, self._local[output][1], wide))
        return output

    def set_constant(self, output: int, value: np.ndarray, given: Given | None = None) -> str:
        """One of the node's results is this constant; its name."""
        name = self.outputs[output] if output < len(self.outputs) else ""
        if name:
            self._constants.set(name, value, given)
        return name

    def new_constant(self, value: ArrayLike, stem: str, given: Given | None = None) -> str:
        """A new constant tensor (float32, or bool)."""
        array = np.asarray(value)
        array = np.ascontiguousarray(array if array.dtype == bool else array.astype(np.float32)).reshape(array.shape)
        name = self._fresh(f"{next(filter(None, self.outputs))}/{stem}")
        return self._editor.add_tensor(Tensor(name, tuple(array.shape), str(array.dtype), array, given=given))

    def table(self, expression: scalar.Expression, tensor: str, *, dtype: str = "float32", wide: bool = False) -> str:
        """A function of one tensor; of a constant it is another constant."""
        known = self._known(tensor)
        if known is not None:
            return self.new_constant(scalar.evaluate(expression, known), "constant")
        return self.emit("table", (tensor,), ops.Table(scalar.simplify(expression)), dtype=dtype, wide=wide)

    def binary(self, op: str, first: str, second: str) -> str:
        return self.emit(op, (first, second), ops.Binary())

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        """The tensor in another shape (itself if it has that shape; of a constant another constant)."""
        if tuple(shape) == self.shape_of(tensor):
            return tensor
        if math.prod(shape) != math.prod(self.shape_of(tensor)):
            raise self.refuse(f"can't turn shape {list(self.shape_of(tensor))} into {list(shape)}", hint="check the input shapes")
        known = self._known(tensor)
        if known is not None:
            given = self._editor.tensors[tensor].given
            return self.new_constant(known.reshape(shape), "constant", given and given.reshaped(shape))
        return self.emit("reshape", (tensor,), ops.Reshape(tuple(shape)))

    def transpose(self, tensor: str, permutation: Sequence[int]) -> str:
        """The tensor with its dimensions in another order (of a constant another constant)."""
        if list(permutation) == list(range(len(permutation))):
            return tensor
        known = self._known(tensor)
        if known is not None:
            given = self._editor.tensors[tensor].given
            return self.new_constant(known.transpose(permutation), "constant", given and given.transposed(permutation))
        return self.emit("transpose", (tensor,), ops.Transpose(tuple(permutation)))

    def _known(self, tensor: str) -> np.ndarray | None:
        """The value of a tensor that is constant."""
        return self._editor.tensors[tensor].data if tensor in self._editor.tensors else None

    def slice(self, tensor: str, axis: int, start: int, size: int, step: int = 1) -> str:
        """Part of one axis."""
        shape = self.shape_of(tensor)
        if (start, size, step) == (0, shape[axis], 1):
            return tensor
        starts, sizes, steps = [0] * len(shape), list(shape), [1] * len(shape)
        starts[axis], sizes[axis], steps[axis] = start, size, step
        return self.emit("slice", (tensor,), ops.Slice(tuple(starts), tuple(sizes), tuple(steps)))

    def reduce(self, op: str, tensor: str, axes: Sequence[int]) -> str:
        """A reduction that keeps the reduced dimensions as 1."""
        return self.emit(op, (tensor,), ops.Reduce(tuple(sorted(axes)))) if axes else tensor
