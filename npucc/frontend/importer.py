"""The walk over the model: every tensor becomes a constant or a tensor of the graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper

from npucc.errors import DamagedError, GraphError, ImportModelError
from npucc.frontend import control
from npucc.frontend.constants import NOT_CONSTANT, Constants
from npucc.frontend.functions import body_of
from npucc.frontend.hosting import NO_TENSORS, Hosting, MustBeHosted, title
from npucc.frontend.load import default_opset, load_model
from npucc.frontend.merging import merge_weights
from npucc.frontend.node import Emitted, Importer, Known, NodeImport
from npucc.frontend.operators import OPERATORS
from npucc.frontend.operators.quantized import BY_NAME as EXPANSIONS
from npucc.frontend.operators.quantized import TABLE as CONVERSIONS
from npucc.frontend.operators.quantized import moved
from npucc.frontend.prepare import FLOATS, NUMBERS, Input, bind_inputs, element_type, numpy_name, prepare, reads, type_name
from npucc.frontend.steps import DYNAMIC, FORMS, whole
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import Reshape, Table

LARGEST_TENSOR = 1 << 28  # elements
CONTROL_FLOW = ("If", "Loop", "Scan")
#: operators that need no importer: their results are known when the model is compiled
FOLDED = {
    "Constant": "", "Shape": "the input's shape is fixed", "Size": "the input's shape is fixed", "EyeLike": "the input's shape is fixed",
    **dict.fromkeys(("ConstantOfShape", "Range", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"), "constant inputs"),
}  # fmt: skip
INTEGERS = NUMBERS - {*FLOATS, TensorProto.BOOL}


def import_model(model: str | Path | ModelProto, *, shapes: Mapping[str, tuple[int, ...]] | None = None, host: bool = False) -> Graph:
    """The model as a float graph of canonical operators, with constants folded. `shapes` binds dynamic inputs. Raises ImportModelError.

    `host`: what has no canonical operator becomes `host` nodes, as few as the graph allows, rather than an error.
    """
    forced: dict[str, str] = {}
    while True:
        try:
            return _import_once(model, shapes or {}, forced if host else None)
        except MustBeHosted as found:
            if found.nodes.keys() <= forced.keys():
                raise ImportModelError("the host nodes of this model can't be gathered", node=next(iter(found.nodes))) from None
            forced |= found.nodes


def _import_once(model: str | Path | ModelProto, shapes: Mapping[str, tuple[int, ...]], forced: Mapping[str, str] | None) -> Graph:
    proto, file = load_model(model)
    try:
        return _Importer(proto, file, shapes, forced).run()
    except GraphError as error:
        raise ImportModelError(error.message, file=file, node=error.node, hint=error.hint) from error
    except UnicodeError as error:
        raise ImportModelError(f"a name in the model is not valid UTF-8: {error}", file=file, hint="the model is damaged; export it again") from error


class _Importer:
    """The state of one import: the graph so far, what each ONNX tensor is, and the constants."""

    def __init__(self, model: ModelProto, file: str, shapes: Mapping[str, tuple[int, ...]], forced: Mapping[str, str] | None = None) -> None:
        """`forced`: nodes that must be on the host, with the reason; None: nothing goes there."""
        self.file = file
        self.inputs = bind_inputs(model.graph, shapes, file)
        declared = {value.name: deepcopy(value.type) for value in (*model.graph.value_info, *model.graph.output)}
        self.nodes = prepare(model, file)
        self.constants = Constants(model, file)
        self.opset = default_opset(model)
        self.opsets = list(model.opset_import)
        self.forced = forced or {}
        self.hosting = None if forced is None else Hosting(list(model.opset_import), self.constants, file, model.ir_version, declared)
        self.editor = Editor(name=model.graph.name)
        self.outputs = list(model.graph.output)
        self.tensors: dict[str, str] = {}  # ONNX tensor to graph tensor
        self.types: dict[str, int] = {}  # ONNX tensor to ONNX element type
        self.steps: dict[str, Quant] = {}  # of ONNX tensors of integers whose graph tensors hold the reals that they stand for
        self.origin = ""  # the node whose function body is being taken
        self.reserved = {name for node in self.nodes for name in node.output} | {value.name for value in model.graph.initializer}

    def run(self) -> Graph:
        for value in self.inputs:
            self._add_input(value)
        for node in self.nodes:
            self._take(node)
        for output in self.outputs:
            self._add_output(output.name, element_type(output))
        merge_weights(self.editor)
        graph = self.editor.freeze()
        return self.hosting.gather(graph, self.tensors, self.types) if self.hosting and self.hosting.nodes else graph

    def _add_input(self, value: Input) -> None:
        if value.dtype not in NUMBERS:
            raise ImportModelError(f"input {value.name!r} has element type {type_name(value.dtype)}", file=self.file, hint="inputs must be numbers")
        if math.prod(value.shape) > LARGEST_TENSOR:
            message = f"input {value.name!r} has shape {list(value.shape)}, more than {LARGEST_TENSOR} elements"
            raise ImportModelError(message, file=self.file, hint="give smaller shapes, or export the model again")
        self.editor.add_tensor(Tensor(value.name, value.shape, numpy_name(value.dtype), source=value.name))
        self.editor.inputs.append(value.name)
        self.tensors[value.name] = value.name
        self.types[value.name] = value.dtype

    def _take(self, node: NodeProto) -> None:
        """One ONNX node: a constant, or imported by its record."""
        names = reads(node)
        for name in names:
            if name not in self.tensors and name not in self.constants:
                self._host_producer(name)
                raise ImportModelError(
                    f"{node.op_type} reads {name!r}, a second result that is not supported",
                    file=self.file,
                    node=node.name,
                    hint="remove this node from the model",
                )
        reason = self._host_reason(node, names)
        if reason:
            self._to_host(node, reason)
        elif node.op_type not in NOT_CONSTANT and all(name in self.constants for name in names) and not self._keeps_integers(node):
            self.constants.defer(node)
        elif node.op_type in ("Shape", "Size", "EyeLike"):
            self.constants.set(node.output[0], self._shape_value(node))
        elif node.op_type == "CastLike" and node.input[0] in self.constants:
            self.constants.set(node.output[0], _as_type(self.constants.value(node.input[0]), self.types[node.input[1]]))
        elif node.op_type == "If" and node.input[0] in self.constants:
            self._take_branch(node)
        elif (node.domain, node.op_type) in EXPANSIONS:
            self._expand(node)
        else:
            self._import(node)

    def _keeps_integers(self, node: NodeProto) -> bool:
        """Whether a node dequantizes a constant whose integers the compiler takes as they are, or moves one that is."""
        if node.op_type == "DequantizeLinear":
            return helper.np_dtype_to_tensor_dtype(self.constants.value(node.input[0]).dtype) in FORMS
        return node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity") and node.input[0] in self.constants.given

    def _expand(self, node: NodeProto) -> None:
        """An operator on integers as the float operator between conversions."""
        expansion = EXPANSIONS[node.domain, node.op_type]
        try:
            parts = expansion.nodes(node)
        except ImportModelError as error:
            if self.hosting is None:
                raise
            self._to_host(node, error.message)
            return
        for part in parts:
            self._take(part)
        if expansion.whole:
            self.types[node.output[0]] = TensorProto.INT32

    def _host_reason(self, node: NodeProto, names: Sequence[str]) -> str:
        """Why a node must be on the host, known before its import is tried; "" if it need not."""
        if self.hosting is None:
            return ""
        if node.name in self.forced:
            return self.forced[node.name]
        if NO_TENSORS.search(node.op_type):
            return "sequences, optional values and strings exist on the host only"
        unknown = next((name for name in names if name in self.hosting.open), None)
        return f"its input {unknown!r} has no fixed shape, or is no tensor" if unknown is not None else ""

    def _host_producer(self, name: str) -> None:
        """Raise MustBeHosted when a node has this result, but only its first one was imported."""
        producer = next((node for node in self.nodes if name in node.output), None)
        if self.hosting is not None and producer is not None and producer.name not in self.forced:
            raise MustBeHosted({producer.name: f"its result {name!r}, which is not the first, is used"})

    def _to_host(self, proto: NodeProto, reason: str) -> None:
        assert self.hosting is not None
        for name in reads(proto):
            self._as_integers(name, reason)
            self._stay_on_host(name)
        for name, kind in self.hosting.place(proto, reason, self.editor, self.tensors, self.types).items():
            self.tensors[name] = name
            self.types[name] = kind.tensor_type.elem_type

    def _stay_on_host(self, name: str) -> None:
        """Raise MustBeHosted when a tensor that a host node reads is another name, or type, of what a host node made."""
        tensor = self.tensors.get(name, name)
        producer = self.editor.producer(tensor)
        maker = next((node for node in self.nodes if name in node.output), None)
        if tensor != name and producer is not None and producer.op == "host" and maker is not None:
            raise MustBeHosted({maker.name: "it lies between host nodes, and computes nothing on the NPU"})

    def _as_integers(self, name: str, reason: str) -> None:
        """From here on the graph tensor of an ONNX tensor that has steps holds its integers. Raises MustBeHosted for one that has none yet."""
        quant = self.steps.pop(name, None)
        if quant is None:
            return
        if quant.key == DYNAMIC.key:
            maker = next(node for node in self.nodes if name in node.output)
            raise MustBeHosted({maker.name: f"its integers are read on the host: {reason}"})
        tensor = self.editor.tensors[self.tensors[name]]
        producer = self.editor.producer(tensor.name)
        if producer is not None and tensor.name == name:  # which the integers are called
            self._rename(tensor, producer, self.editor.fresh(f"{name}/real"))
            tensor = self.editor.tensors[self.tensors[name]]
        integers = Tensor(self.editor.fresh(f"{name}/integers"), tensor.shape, numpy_name(self.types[name]))
        self.editor.add_tensor(integers)
        attributes = Table(whole(quant, self.types[name]))
        sources = producer.sources if producer else ()
        self.editor.add_node(Node(self._fresh_node(integers.name), "table", (tensor.name,), (integers.name,), attributes, sources))
        self.tensors[name] = integers.name

    def _take_branch(self, node: NodeProto) -> None:
        """An If whose condition is a constant: the nodes of the branch that it picks."""
        wanted = "then_branch" if bool(np.all(self.constants.value(node.input[0]))) else "else_branch"
        nodes, results = control.branch(node, wanted, self.constants)
        for inner in nodes:
            self._take(inner)
        for outer, name in zip(node.output, results, strict=False):
            if name in self.constants:
                self.constants.set(outer, self.constants.value(name))
            else:
                self.tensors[outer], self.types[outer] = self.tensors[name], self.types[name]

    def _shape_value(self, node: NodeProto) -> np.ndarray:
        shape = self.editor.tensors[self.tensors[node.input[0]]].shape
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Size":
            return np.array(math.prod(shape), np.int64)
        if node.op_type == "EyeLike":
            return _as_type(np.eye(shape[0], shape[1], k=bounds.get("k", 0)), bounds.get("dtype", self.types[node.input[0]]))
        return np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], np.int64)

    def _import(self, proto: NodeProto) -> None:
        """By its record, else by its function body, else on the host, else by a function body of which a part is on the host."""
        try:
            self._import_as_canonical(proto)
        except DamagedError:
            raise
        except ImportModelError as error:
            if any(self._take_body(proto, body, host=False) for body in self._bodies(proto)):
                return
            if self.hosting is None:
                raise
            try:
                self._to_host(proto, error.message)
            except ImportModelError:
                if not any(self._take_body(proto, body, host=True) for body in self._bodies(proto)):
                    raise

    def _bodies(self, proto: NodeProto) -> Iterator[Iterable[NodeProto]]:
        """The nodes that a node may be written out as, in the order of preference. The last are tried only if the first can't be imported."""
        if proto.op_type == "If":
            yield from self._branches(proto)
        elif proto.op_type == "Loop":
            yield control.steps(proto, self.constants)
        else:
            yield body_of(proto, self._known_types(proto), self.opsets)

    def _branches(self, proto: NodeProto) -> Iterator[Iterable[NodeProto]]:
        """Both branches of an If; or one, where the other can't be run on inputs of these shapes, and so is never taken."""
        branches = [control.branch(proto, name, self.constants) for name in ("then_branch", "else_branch")]
        yield self._both_branches(proto, branches)
        for (nodes, results), other in zip(branches, reversed(branches), strict=True):
            if self.hosting is not None and not self.hosting.runs(*other, self.editor, self.tensors, self.types):
                yield [*nodes, *control.chosen(proto, results)]

    def _both_branches(self, proto: NodeProto, branches: Sequence[tuple[list[NodeProto], list[str]]]) -> Iterator[NodeProto]:
        """Both, and the choice between their results. Raises ImportModelError where those differ in shape, as a choice would broadcast them."""
        for nodes, _ in branches:
            yield from nodes
        results = [names for _, names in branches]
        for then, other in zip(*results, strict=True):
            if self._shape(then) != self._shape(other):
                raise ImportModelError("If: its branches give results of different shapes", node=proto.name)
        yield from control.both(proto, results, self.constants)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.constants.value(name).shape) if name in self.constants else self.editor.tensors[self.tensors[name]].shape

    def _known_types(self, proto: NodeProto) -> dict[str, TypeProto]:
        """The types of a node's inputs; floats are float32."""
        known = {}
        for name in filter(None, proto.input):
            if name in self.constants:
                value = self.constants.value(name)
                known[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            else:
                kind = TensorProto.FLOAT if self.types[name] in FLOATS else self.types[name]
                known[name] = helper.make_tensor_type_proto(kind, self.editor.tensors[self.tensors[name]].shape)
        return known

    def _take_body(self, proto: NodeProto, body: Iterable[NodeProto], *, host: bool) -> bool:
        """Take the nodes of a body in the place of a node. Whether that went well (with none it did not); if not, nothing has changed."""
        taken: list[NodeProto] = []
        before = len(self.editor.nodes), len(self.editor.tensors), len(self.tensors), len(self.types)
        outer, origin, self.origin = self.hosting, self.origin, self.origin or proto.name
        self.hosting = self.hosting if host else None
        try:
            for node in body:
                taken.append(node)
                self._take(node)
        except ImportModelError:
            for name in list(self.editor.nodes)[before[0] :]:
                self.editor.remove_node(name)
            for known, count in ((self.editor.tensors, before[1]), (self.tensors, before[2]), (self.types, before[3])):
                for name in list(known)[count:]:
                    del known[name]
                    self.steps.pop(name, None)
            self.constants.forget(name for node in taken for name in node.output)
            return False
        finally:
            self.hosting, self.origin = outer, origin
        return bool(taken)

    def _import_as_canonical(self, proto: NodeProto) -> None:
        record = OPERATORS.get((proto.domain if proto.domain != "ai.onnx" else "", proto.op_type))
        if record is None:
            message = f"operator {title(proto)} is not supported"
            raise ImportModelError(message, file=self.file, node=proto.name, hint=_unsupported_hint(proto))
        if not self._import_as_reals(record, proto):
            node = self._view(proto)
            self._commit(node, self._run(record, node))

    def _view(self, proto: NodeProto, *, as_reals: bool = False) -> NodeImport:
        known = Known(self.tensors, self.types, self.steps, self.reserved)
        return NodeImport(proto, self.opset, self.file, self.editor, self.constants, known, as_reals=as_reals)

    def _import_as_reals(self, record: Importer, proto: NodeProto) -> bool:
        """Import a node that only moves quantized integers as one that moves what they stand for; False if it is none."""
        found = [(self.steps[name], self.types[name]) for name in proto.input if name in self.steps]
        if record in CONVERSIONS or not found or len({(quant.key, kind) for quant, kind in found}) > 1:
            return False
        node = self._view(proto, as_reals=True)
        try:
            results = self._run(record, node)
        except ImportModelError:
            return False
        quant, kind = found[0]
        emitted = moved(node.emitted, quant, kind, self.editor.tensors) if self._result_type(node, 0) == kind else None
        if emitted is None:
            return False
        node.emitted[:] = emitted
        self.steps |= dict.fromkeys(filter(None, node.outputs), quant)
        self._commit(node, results)
        return True

    def _run(self, record: Importer, node: NodeImport) -> Sequence[str]:
        """The names of the node's results. Raises ImportModelError."""
        try:
            results = record.run(node)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:
            shapes = ", ".join(str(list(node.shape(i))) if node.has(i) else "-" for i in range(len(node.inputs)))
            raise ImportModelError(
                f"{node.operator} does not fit its inputs of shapes {shapes}: {error}",
                file=self.file,
                node=node.name,
                hint="the model is damaged; export it again",
            ) from error
        return (results,) if isinstance(results, str) else results

    def _commit(self, node: NodeImport, results: Sequence[str]) -> None:
        """Give the emitted results the names of the ONNX outputs, and put the emitted nodes into the graph."""
        made = {emitted.output for emitted in node.emitted}
        renamed: dict[str, str] = {}
        for index, (output, result) in enumerate(zip(node.outputs, results, strict=False)):
            if not output or output in self.constants:
                continue
            if result in made and result not in renamed:
                renamed[result] = output
            known = self.editor.tensors.get(result)
            if known is not None and known.data is not None:
                self.constants.set(output, known.data, known.given)
                continue
            self.tensors[output] = renamed.get(result, result)
            self.types[output] = self._result_type(node, index)
            if node.result_steps is not None:
                self.steps[output] = node.result_steps
        for index, emitted in enumerate(node.emitted):
            self._add_node(node, emitted, renamed, index)

    def _result_type(self, node: NodeImport, index: int) -> int:
        """The ONNX element type of a result: what the schema says, be it the type of an input."""
        if node.result_type:
            return node.result_type
        if node.operator == "Cast":
            return node.integer("to", TensorProto.FLOAT)
        if not onnx.defs.has(node.operator, self.opset, node.proto.domain):
            return TensorProto.FLOAT
        schema = onnx.defs.get_schema(node.operator, self.opset, node.proto.domain)
        wanted = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
        allowed = next((each.allowed_type_strs for each in schema.type_constraints if each.type_param_str == wanted), [wanted])
        if len(allowed) == 1:
            return int(TensorProto.DataType.Value(allowed[0][len("tensor(") : -1].upper()))
        same = (i for i, port in enumerate(schema.inputs) if port.type_str == wanted and node.has(i))
        return node.element_type(next(same, 0))

    def _add_node(self, node: NodeImport, emitted: Emitted, renamed: Mapping[str, str], index: int) -> None:
        output = renamed.get(emitted.output, emitted.output)
        if math.prod(emitted.shape) > LARGEST_TENSOR or 0 in emitted.shape:
            what = "no elements" if 0 in emitted.shape else f"more than {LARGEST_TENSOR} elements"
            raise ImportModelError(
                f"{node.operator} yields a tensor of shape {list(emitted.shape)}, which has {what}",
                file=self.file,
                node=node.name,
                hint="check the input shapes",
            )
        source = output if emitted.output in renamed else ""
        kind = self.types.get(output, TensorProto.FLOAT) if source and output not in self.steps else TensorProto.FLOAT
        dtype = numpy_name(kind) if kind in INTEGERS else emitted.dtype
        self.editor.add_tensor(Tensor(output, emitted.shape, dtype, source=source, wide=emitted.wide))
        inputs = tuple(renamed.get(name, name) for name in emitted.inputs)
        name = node.name if index == len(node.emitted) - 1 else f"{node.name}/{emitted.op}"
        self.editor.add_node(Node(self._fresh_node(name), emitted.op, inputs, (output,), emitted.attributes, (self.origin or node.name,)))

    def _fresh_node(self, name: str) -> str:
        return name if name not in self.editor.nodes else self.editor.fresh(name)

    def _add_output(self, name: str, dtype: int) -> None:
        """Make `name` a graph output: the tensor takes that name, or a node is put before the output where it can't."""
        if name in self.constants:
            self._copy_constant(name)
        if name not in self.tensors:
            self._host_producer(name)
            raise ImportModelError(
                f"output {name!r} is made by no node, or is a second result that is not supported",
                file=self.file,
                hint="remove it from the model's outputs",
            )
        self._as_integers(name, "they are an output")
        tensor = self.editor.tensors[self.tensors[name]]
        if tensor.name != name:
            producer = self.editor.producer(tensor.name)
            if producer is not None and tensor.name not in self.editor.outputs and tensor.name not in {value.name for value in self.outputs}:
                self._rename(tensor, producer, name)
            else:
                self._copy(tensor, name)
        elif name in self.editor.inputs:
            raise ImportModelError(f"input {name!r} is also an output", file=self.file, hint="remove it from the model's outputs")
        if dtype in NUMBERS:
            self.editor.add_tensor(replace(self.editor.tensors[name], dtype=numpy_name(dtype)))
        self.editor.outputs.append(name)

    def _copy_constant(self, name: str) -> None:
        value = self.constants.value(name)
        if not value.size:
            raise ImportModelError(f"output {name!r} has shape {list(value.shape)}: no elements", file=self.file, hint="remove it from the outputs")
        stored = self.editor.constant(f"{name}/constant", value if value.dtype == bool else value.astype(np.float32))
        self.editor.add_tensor(Tensor(name, value.shape, self.editor.tensors[stored].dtype, source=name))
        self.editor.add_node(Node(self._fresh_node(name), "reshape", (stored,), (name,), Reshape(value.shape), (name,)))
        self.tensors[name] = name

    def _rename(self, tensor: Tensor, producer: Node, name: str) -> None:
        self.editor.add_tensor(replace(tensor, name=name, source=name))
        self.editor.add_node(replace(producer, outputs=tuple(name if output == tensor.name else output for output in producer.outputs)))
        self.editor.replace_input(tensor.name, name)
        self.tensors = {key: name if value == tensor.name else value for key, value in self.tensors.items()}

    def _copy(self, tensor: Tensor, name: str) -> None:
        self.editor.add_tensor(replace(tensor, name=name, source=name))
        whole = np.dtype(tensor.dtype).kind in "iu"  # moved, as no table holds every integer
        operation = ("reshape", Reshape(tensor.shape)) if whole else ("table", Table("x"))
        self.editor.add_node(Node(self._fresh_node(name), operation[0], (tensor.name,), (name,), operation[1], (name,)))


def _as_type(value: np.ndarray, dtype: int) -> np.ndarray:
    """The value as an ONNX element type; every float type is float32."""
    return value.astype(np.float32 if dtype in FLOATS else numpy_name(dtype))


def _unsupported_hint(node: NodeProto) -> str:
    if node.op_type in CONTROL_FLOW:
        return "control flow that depends on data can't be compiled; export the model with fixed control flow"
    return "see `npucc ops` for the supported operators; cut the model before this node, or replace the node by supported ones"
