"""Random ONNX models: 3 to 12 operators on tensors of rank 1 to 5, odd sizes, shared tensors, several inputs and outputs.

The one big idea: every node is run in onnxruntime when it is added. So its result's shape is known without a second shape inference, a
node that onnxruntime refuses is never added, and a step can look at values before it asks for a logarithm or a quotient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from hypothesis import reject
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
Draw = Callable[[st.SearchStrategy[Any]], Any]
Feed = dict[str, Array]

OPSETS = (13, 17, 18, 21)
SAMPLES = 4
LARGEST = 4000  # elements of a tensor
HIGHEST = 1e3  # of a value
#: the axes of these reductions are an input since opset 18
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")


@dataclass(frozen=True, slots=True)
class Applied:
    """A node with the session that runs it alone, the tensors that it reads, and whether small changes of those may change it much."""

    proto: NodeProto
    session: onnxruntime.InferenceSession
    reads: tuple[str, ...]
    steep: bool


@dataclass(slots=True)
class RandomModel:
    """A model that grows. `values`: what each tensor holds, sample by sample; `steep`: tensors in which an error may become large."""

    draw: Draw
    opset: int
    random: np.random.Generator
    nodes: list[Applied] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    values: dict[str, list[Array]] = field(default_factory=dict)
    steep: set[str] = field(default_factory=set)

    # ---- choices

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def between(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def flip(self) -> bool:
        return bool(self.draw(st.booleans()))

    def tensor(self, *, kind: str = "f") -> str:
        """A tensor of floats (or of another kind), mostly a recent one."""
        names = [name for name, samples in self.values.items() if samples[0].dtype.kind == kind]
        return str(self.pick(*(names[:-4:-1] if self.between(0, 3) else names))) if names else ""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name][0].shape)

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def lowest(self, name: str) -> float:
        return float(min(sample.min() for sample in self.values[name]))

    def highest(self, name: str) -> float:
        return float(max(sample.max() for sample in self.values[name]))

    def axis(self, name: str) -> int:
        """Of either sign."""
        rank = self.rank(name)
        return self.between(0, rank - 1) - rank * self.between(0, 1)

    # ---- parts

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def weights(self, *shape: int, spread: float = 0.0) -> str:
        """Normal numbers with a sum of squares near 1 per output."""
        return self.constant(self.random.normal(0, spread or 1 / math.sqrt(max(1, math.prod(shape[1:]))), shape))

    def input(self) -> str:
        name = f"x{len(self.inputs)}"
        rank = self.pick(4, 3, 2, 4, 5, 1)
        shape = [self.pick(1, 2, 3, 5, 6, 7, 8, 11, 13, 17, 33) if index or rank < 3 else self.pick(1, 1, 1, 2, 3) for index in range(rank)]
        while math.prod(shape) > LARGEST // 2:
            shape[shape.index(max(shape))] //= 2
        center, spread = self.pick((0, 1), (0, 3), (0.4, 0.3), (2, 0.5))
        self.values[name] = [self.random.normal(center, spread, shape).astype(np.float32) for _ in range(SAMPLES)]
        self.inputs.append(name)
        return name

    def add(self, operator: str, inputs: Sequence[str], *, results: int = 1, steep: bool = False, domain: str = "", **attributes: Any) -> list[str]:
        """Add the node if onnxruntime runs it and its results are sensible numbers. The names of the results, or none."""
        names = [f"t{len(self.nodes)}" + (f"_{index}" if index else "") for index in range(results)]
        proto = helper.make_node(operator, list(inputs), names, name=f"{operator}_{len(self.nodes)}", domain=domain, **attributes)
        reads = tuple(dict.fromkeys(name for name in inputs if name and name not in self.constants))
        try:
            alone = session(self._model([proto], reads, names), optimize=False)
            feeds = [{name: self.values[name][index] for name in reads} for index in range(SAMPLES)]
            samples = [[np.asarray(value) for value in alone.run(None, feed)] for feed in feeds]
        except Exception:
            return []
        if not all(_sensible(value) for sample in samples for value in sample):
            return []
        self.nodes.append(Applied(proto, alone, reads, steep))
        for index, name in enumerate(names):
            self.values[name] = [sample[index] for sample in samples]
            if steep or any(read in self.steep for read in reads):
                self.steep.add(name)
        return names

    def _model(self, nodes: Sequence[NodeProto], inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
        used = {name for node in nodes for name in node.input}
        stored = [numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in used]
        ports = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.values[name][0].dtype), self.shape(name)) for name in inputs
        ]
        graph = helper.make_graph(list(nodes), "random", ports, [onnx.ValueInfoProto(name=name) for name in outputs], stored)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    # ---- the whole

    def finish(self) -> None:
        """The tensors that nothing reads are outputs, and perhaps one more."""
        read = {name for node in self.nodes for name in node.reads}
        made = [name for node in self.nodes for name in node.proto.output]
        self.outputs = [name for name in made if name not in read] or made[-1:]
        if len(made) > 1 and self.flip():
            self.outputs = list(dict.fromkeys([*self.outputs, self.pick(*made)]))

    @property
    def proto(self) -> ModelProto:
        """The model with typed outputs; inputs that nothing reads are left out."""
        read = {name for node in self.nodes for name in node.reads}
        model = self._model([node.proto for node in self.nodes], [name for name in self.inputs if name in read], self.outputs)
        for value in model.graph.output:
            sample = self.values[value.name][0]
            value.CopyFrom(helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(sample.dtype), sample.shape))
        return model

    def feeds(self) -> list[Feed]:
        names = [value.name for value in self.proto.graph.input]
        return [{name: self.values[name][index] for name in names} for index in range(SAMPLES)]

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        """What hypothesis prints."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        lines = [f"opset {self.opset}"]
        lines += [f"{name}{list(self.shape(name))}" for name in self.inputs]
        for node in self.nodes:
            values = ", ".join(f"{name}{list(self.constants[name].shape)}" if name in self.constants else name for name in node.proto.input)
            attributes = " ".join(f"{each.name}={helper.get_attribute_value(each)}" for each in node.proto.attribute)
            shown = ", ".join(f"{name}{list(self.shape(name))}" for name in node.proto.output)
            lines.append(f"{shown} = {node.proto.op_type}({values}) {attributes}")
        return "\n".join([*lines, "outputs " + ", ".join(self.outputs)])


def session(model: ModelProto, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _sensible(value: Any) -> bool:
    if not isinstance(value, np.ndarray) or not 0 < value.size <= LARGEST or value.ndim > 5:
        return False
    return bool(np.isfinite(value).all() and np.abs(value.astype(np.float64)).max() < HIGHEST)


# ---- steps: each adds a node or two to what reads tensor x ------------------------------------------------------------

Step = Callable[[RandomModel, str], Any]
PLAIN = (
    "Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Erf", "Softplus", "Softsign", "HardSwish", "Identity", "Sin", "Cos", "Elu", "Selu", "Celu",
    "HardSigmoid", "LeakyRelu", "Atan", "ThresholdedRelu", "Mish", "Gelu",
)  # fmt: skip
STEEP = ("Floor", "Ceil", "Round", "Sign", "ThresholdedRelu")


def unary(net: RandomModel, x: str) -> None:
    operator = net.pick(*PLAIN, *STEEP[:4])
    net.add(operator, [x], steep=operator in STEEP)


def bounded(net: RandomModel, x: str) -> None:
    """Functions that are not defined, or steep, for some values."""
    low, high = net.lowest(x), net.highest(x)
    fitting = {"Exp": high < 5, "Log": low > 0.05, "Sqrt": low > 0.01, "Reciprocal": low > 0.1 or high < -0.1, "Sinh": low > -4 and high < 4}
    operators = [name for name, fits in fitting.items() if fits]
    if operators:
        net.add(net.pick(*operators), [x])


def clip(net: RandomModel, x: str) -> None:
    low, high = sorted(float(value) for value in net.random.normal(0.5, 1.5, 2))
    limits = net.pick((low, high), (low, None), (None, high), (0.0, 6.0))
    net.add("Clip", [x, *("" if limit is None else net.constant(limit) for limit in limits)])


def _operand(net: RandomModel, x: str) -> str:
    """Something that broadcasts with x: another tensor, x itself, or a constant of some of its dimensions."""
    shape = net.shape(x)
    if net.flip():
        fitting = [name for name in net.values if net.values[name][0].dtype.kind == "f" and _broadcasts(shape, net.shape(name))]
        return str(net.pick(*fitting))
    kept = [size if net.flip() else 1 for size in shape]
    start = net.between(0, len(kept))
    mean, spread = net.pick((0.0, 1.0), (1.0, 0.3), (3.0, 1.0))
    return net.constant(net.random.normal(mean, spread, kept[start:]))


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(i == j or 1 in (i, j) for i, j in zip(reversed(a), reversed(b), strict=False))


def binary(net: RandomModel, x: str) -> None:
    operands = [x, _operand(net, x)]
    net.add(net.pick("Add", "Sub", "Mul", "Max", "Min", "Add", "Mul"), operands if net.flip() else operands[::-1])


def quotient(net: RandomModel, x: str) -> None:
    divisor = _operand(net, x)
    known = net.constants.get(divisor)
    smallest = np.abs(known).min(initial=1) if known is not None else min(float(np.abs(sample).min()) for sample in net.values[divisor])
    if smallest > 0.2:
        net.add("Div", [x, divisor])


def several(net: RandomModel, x: str) -> None:
    net.add(net.pick("Sum", "Mean", "Max", "Min"), [x, _operand(net, x), _operand(net, x)])


def power(net: RandomModel, x: str) -> None:
    if net.lowest(x) > 0.05:
        net.add("Pow", [x, net.constant(net.pick(0.5, 1.7, 2.0, 3.0, -1.0))])
    else:
        net.add("Pow", [x, net.constant(net.pick(2.0, 3.0))])


def slope(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    net.add("PRelu", [x, net.constant(net.random.normal(0.2, 0.2, net.pick((1,), (shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else (1,))))])


def select(net: RandomModel, x: str) -> None:
    """Where, on a comparison."""
    made = net.add(net.pick("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"), [x, _operand(net, x)], steep=True)
    if made and net.flip():
        made = net.add("Not", made, steep=True)
    if made:
        net.add("Where", [made[0], x, _operand(net, x)], steep=True)


def convolution(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    if len(shape) not in (3, 4, 5):
        return
    spatial, channels = len(shape) - 2, shape[1]
    groups = net.pick(*[number for number in (1, 1, 2, 3, channels) if channels % number == 0])
    outputs = groups * net.pick(1, 2, 3, 5)
    kernel = [net.pick(1, 2, 3, 3, 5) for _ in range(spatial)]
    attributes: dict[str, Any] = {"group": groups, "strides": [net.pick(1, 1, 2, 3) for _ in range(spatial)]}
    if net.flip():
        attributes |= {"dilations": [net.pick(1, 1, 2) for _ in range(spatial)], "pads": [net.between(0, 2) for _ in range(2 * spatial)]}
    else:
        attributes["auto_pad"] = net.pick("SAME_UPPER", "SAME_LOWER", "VALID")
    inputs = [x, net.weights(outputs, channels // groups, *kernel)]
    net.add("Conv", inputs + ([net.weights(outputs)] if net.flip() else []), **attributes)


def transposed_convolution(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    if len(shape) not in (3, 4):
        return
    spatial, channels = len(shape) - 2, shape[1]
    groups = net.pick(*[number for number in (1, 1, 2, channels) if channels % number == 0])
    outputs = net.pick(1, 2, 4)
    strides = [net.pick(1, 2, 3) for _ in range(spatial)]
    pads, extra = [net.between(0, 1) for _ in range(2 * spatial)], [net.between(0, stride - 1) for stride in strides]
    inputs = [x, net.weights(channels, outputs, *[net.pick(1, 2, 3) for _ in range(spatial)], spread=0.4)]
    inputs += [net.weights(outputs * groups)] if net.flip() else []
    net.add("ConvTranspose", inputs, group=groups, strides=strides, pads=pads, output_padding=extra)


def pool(net: RandomModel, x: str) -> None:
    spatial = net.rank(x) - 2
    if spatial < 1:
        return
    if net.between(0, 3) == 0:
        net.add(net.pick("GlobalAveragePool", "GlobalMaxPool"), [x])
        return
    kernel = [net.pick(1, 2, 3) for _ in range(spatial)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": [net.pick(1, 2, 3) for _ in range(spatial)], "ceil_mode": net.between(0, 1)}
    attributes["pads"] = [net.between(0, size - 1) for size in (*kernel, *kernel)]
    operator = net.pick("MaxPool", "AveragePool", "LpPool" if net.opset >= 18 else "MaxPool")
    if operator == "LpPool" or spatial == 3:
        attributes["ceil_mode"] = 0  # onnxruntime computes one shape and infers another
    if operator == "AveragePool":
        attributes["count_include_pad"] = net.between(0, 1)
    net.add(operator, [x], **attributes)


def matrix(net: RandomModel, x: str) -> None:
    """MatMul with weights, on either side, or with another tensor."""
    shape = net.shape(x)
    fitting = [name for name in net.values if net.values[name][0].dtype.kind == "f" and net.rank(name) > 1 and net.shape(name)[-2] == shape[-1]]
    if fitting and net.flip():
        net.add("MatMul", [x, net.pick(*fitting)])
    elif len(shape) > 1 and net.flip():
        net.add("MatMul", [net.weights(net.pick(1, 3, 6), shape[-2]), x])
    else:
        batch = shape[:-2] if net.between(0, 3) == 0 else ()
        columns = net.pick((), (1,), (4,), (9,)) if not batch else (5,)
        net.add("MatMul", [x, net.constant(net.random.normal(0, shape[-1] ** -0.5, (*batch, shape[-1], *columns)))])


def self_product(net: RandomModel, x: str) -> None:
    """x · xᵀ."""
    rank = net.rank(x)
    if rank > 1:
        flipped = net.add("Transpose", [x], perm=[*range(rank - 2), rank - 1, rank - 2])
        if flipped:
            net.add("MatMul", [x, *flipped] if net.flip() else [*flipped, x])


def gemm(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    if len(shape) != 2:
        return
    flip_a, flip_b, columns = net.between(0, 1), net.between(0, 1), net.pick(1, 3, 7)
    inner, rows = (shape[0], shape[1]) if flip_a else (shape[1], shape[0])
    weights = net.constant(net.random.normal(0, inner**-0.5, (columns, inner) if flip_b else (inner, columns)))
    added = [net.constant(net.random.normal(0, 1, net.pick((), (columns,), (1, columns), (rows, 1), (rows, columns))))] if net.flip() else []
    net.add("Gemm", [x, weights, *added], transA=flip_a, transB=flip_b, alpha=net.pick(1.0, 0.5), beta=net.pick(1.0, 2.0))


def normalization(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    if len(shape) < 2:
        return
    channels = shape[1]
    operators = ["BatchNormalization", "InstanceNormalization", "LpNormalization"]
    operators += ["LayerNormalization"] if net.opset >= 17 else []
    operators += ["GroupNormalization"] if net.opset >= 21 else []
    operator = net.pick(*operators)
    scale, shift = (net.constant(net.random.normal(mean, 0.3, channels)) for mean in (1, 0))
    if operator == "BatchNormalization":
        net.add(operator, [x, scale, shift, net.weights(channels), net.constant(net.random.uniform(0.3, 2, channels))])
    elif operator == "InstanceNormalization":
        net.add(operator, [x, scale, shift], epsilon=1e-2)
    elif operator == "LpNormalization":
        net.add(operator, [x], axis=net.axis(x), p=net.pick(1, 2))
    elif operator == "GroupNormalization":
        net.add(operator, [x, scale, shift], num_groups=net.pick(*[size for size in (1, 2, 3, channels) if channels % size == 0]), epsilon=1e-2)
    else:
        axis = net.between(1, len(shape) - 1)
        parts = [net.constant(net.random.normal(mean, 0.3, shape[axis:])) for mean in (1, 0)]
        net.add(operator, [x, *parts[: net.between(1, 2)]], axis=axis - len(shape) * net.between(0, 1), epsilon=1e-2)


def softmax(net: RandomModel, x: str) -> None:
    net.add(net.pick("Softmax", "Softmax", "LogSoftmax"), [x], axis=net.axis(x))


def reduction(net: RandomModel, x: str) -> None:
    rank = net.rank(x)
    axes = sorted({net.between(0, rank - 1) for _ in range(net.between(1, 2))})
    axes = [axis - rank for axis in axes] if net.flip() else axes
    operator, keep = net.pick("ReduceMean", "ReduceSum", *REDUCTIONS[1:]), net.between(0, 1)
    if operator == "ReduceSum" or net.opset >= 18:
        net.add(operator, [x, *([net.constant(axes, np.int64)] if net.between(0, 5) else [])], keepdims=keep)
    else:
        net.add(operator, [x], axes=axes, keepdims=keep)


def place(net: RandomModel, x: str) -> None:
    operator = net.pick("ArgMax", "ArgMin", "TopK", "CumSum")
    if operator == "TopK":
        axis = net.axis(x)
        count = net.between(1, net.shape(x)[axis])
        net.add("TopK", [x, net.constant([count], np.int64)], results=2, axis=axis, steep=True)
    elif operator == "CumSum":
        net.add("CumSum", [x, net.constant(net.axis(x), np.int64)], exclusive=net.between(0, 1), reverse=net.between(0, 1))
    else:
        net.add(operator, [x], axis=net.axis(x), keepdims=net.between(0, 1), steep=True)


def resize(net: RandomModel, x: str) -> None:
    rank = net.rank(x)
    if rank not in (3, 4):
        return
    coordinates = net.pick("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    attributes = {"mode": net.pick("nearest", "linear"), "coordinate_transformation_mode": coordinates}
    if attributes["mode"] == "nearest":
        attributes["nearest_mode"] = net.pick("round_prefer_floor", "floor", "ceil", "round_prefer_ceil")
    if net.flip():
        scales = [1.0, 1.0, *(net.pick(1.0, 2.0, 1.5, 0.5) for _ in range(rank - 2))]
        net.add("Resize", [x, "", net.constant(scales)], **attributes)
    else:
        sizes = [*net.shape(x)[:2], *(net.between(1, 2 * size) for size in net.shape(x)[2:])]
        net.add("Resize", [x, "", "", net.constant(sizes, np.int64)], **attributes)


def pad(net: RandomModel, x: str) -> None:
    mode = net.pick("constant", "constant", "edge", "reflect", *(["wrap"] if net.opset >= 19 else []))
    limits = [3 if mode in ("constant", "edge") else min(2, size - 1) for size in net.shape(x)]
    pads = [net.between(-1 if mode == "constant" else 0, limit) if net.flip() else 0 for limit in (*limits, *limits)]
    value = [net.constant(net.pick(0.0, 1.5, -2.0))] if mode == "constant" and net.flip() else []
    net.add("Pad", [x, net.constant(pads, np.int64), *value], mode=mode)


def part(net: RandomModel, x: str) -> None:
    """Slice, with steps of either sign."""
    axes = sorted({net.between(0, net.rank(x) - 1) for _ in range(net.between(1, 2))})
    starts, ends, steps = [], [], []
    for axis in axes:
        size, step = net.shape(x)[axis], net.pick(1, 1, 2, -1, -2)
        low = net.between(0, size - 1)
        high = net.between(low + 1, size)
        starts.append(low if step > 0 else high - 1)
        ends.append(high if step > 0 else (low - 1 if low else -(2**31)))
        steps.append(step)
    lists = [net.constant(values, np.int64) for values in (starts, ends, axes, steps)]
    net.add("Slice", [x, *lists])


def gather(net: RandomModel, x: str) -> None:
    axis = net.axis(x)
    size = net.shape(x)[axis]
    indices = net.random.integers(-size, size, net.pick((), (1,), (3,), (2, 2), (size + 1,)))
    net.add("Gather", [x, net.constant(indices, np.int64)], axis=axis)


def concat(net: RandomModel, x: str) -> None:
    axis, shape = net.axis(x), net.shape(x)
    without = [size for index, size in enumerate(shape) if index != axis % len(shape)]

    def fits(name: str) -> bool:
        other = net.shape(name)
        same = [size for index, size in enumerate(other) if index != axis % len(shape)] == without
        return net.values[name][0].dtype.kind == "f" and len(other) == len(shape) and same

    fitting = [name for name in net.values if fits(name)]
    parts = [x, *(net.pick(*fitting) for _ in range(net.between(1, 2)))]
    if net.between(0, 3) == 0:
        parts.append(net.weights(*shape, spread=1.0))
    net.add("Concat", parts if net.flip() else parts[::-1], axis=axis)


def split(net: RandomModel, x: str) -> None:
    axis = net.axis(x)
    size = net.shape(x)[axis]
    if size < 2:
        return
    first = net.between(1, size - 1)
    net.add("Split", [x, net.constant([first, size - first], np.int64)], results=2, axis=axis)


def transpose(net: RandomModel, x: str) -> None:
    net.add("Transpose", [x], perm=net.draw(st.permutations(range(net.rank(x)))))


def reshape(net: RandomModel, x: str) -> None:
    """Two dimensions merged, one cut, one put in, one dropped, or all flattened."""
    shape, way = list(net.shape(x)), net.pick("merge", "cut", "insert", "drop", "flatten", "line")
    if way == "merge" and len(shape) > 1:
        at = net.between(0, len(shape) - 2)
        net.add("Reshape", [x, net.constant([*shape[:at], -1, *shape[at + 2 :]], np.int64)])
    elif way == "cut" and len(shape) < 5:
        at = net.between(0, len(shape) - 1)
        factor = net.pick(*[number for number in (1, 2, 3, 5, 7, 11) if shape[at] % number == 0])
        net.add("Reshape", [x, net.constant([*shape[:at], factor, shape[at] // factor, *shape[at + 1 :]], np.int64)])
    elif way == "insert" and len(shape) < 5:
        net.add("Unsqueeze", [x, net.constant([net.between(0, len(shape))], np.int64)])
    elif way == "drop" and 1 in shape and len(shape) > 1:
        net.add("Squeeze", [x, *([net.constant([shape.index(1)], np.int64)] if net.flip() else [])])
    elif way == "flatten":
        net.add("Flatten", [x], axis=net.between(0, len(shape)))
    else:
        net.add("Reshape", [x, net.constant([-1], np.int64)])


def repeat(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    if net.flip():
        net.add("Tile", [x, net.constant([net.pick(1, 1, 2, 3) for _ in shape], np.int64)])
    else:
        wanted = [net.between(2, 4) if size == 1 and net.flip() else size for size in shape]
        net.add("Expand", [x, net.constant([*([2] if len(shape) < 5 and net.flip() else []), *wanted], np.int64)])


def blocks(net: RandomModel, x: str) -> None:
    if net.rank(x) == 4:
        if net.flip():
            net.add("DepthToSpace", [x], blocksize=2, mode=net.pick("DCR", "CRD"))
        else:
            net.add("SpaceToDepth", [x], blocksize=net.pick(2, 3))


def einsum(net: RandomModel, x: str) -> None:
    shape = net.shape(x)
    letters = "abcde"[: len(shape)]
    result = "".join(net.draw(st.permutations(letters)))[: net.between(1, len(shape))]
    if net.flip():
        net.add("Einsum", [x], equation=f"{letters}->{result}")
    else:
        net.add("Einsum", [x, net.weights(4, shape[-1])], equation=f"{letters},z{letters[-1]}->{letters[:-1]}z")


def recurrent(net: RandomModel, x: str) -> None:
    if net.rank(x) != 3 or net.shape(x)[0] > 8:
        return
    operator, size, ways = net.pick("LSTM", "GRU", "RNN"), net.pick(2, 5), net.between(1, 2)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    wide, deep = net.weights(ways, gates * size, net.shape(x)[2]), net.weights(ways, gates * size, size)
    attributes: dict[str, Any] = {"hidden_size": size, "direction": "bidirectional" if ways == 2 else net.pick("forward", "reverse")}
    if operator == "GRU":
        attributes["linear_before_reset"] = net.between(0, 1)
    bias = [net.weights(ways, 2 * gates * size)] if net.flip() else []
    net.add(operator, [x, wide, deep, *bias], **attributes)


ELEMENTWISE: tuple[Step, ...] = (unary, unary, unary, bounded, clip, binary, binary, binary, quotient, several, power, slope, select)
STEPS: tuple[Step, ...] = (
    *ELEMENTWISE, convolution, convolution, convolution, transposed_convolution, pool, pool, matrix, matrix, self_product, gemm, normalization,
    normalization, softmax, reduction, reduction, place, resize, pad, pad, part, gather, concat, concat, split, transpose, reshape, repeat, blocks,
    einsum, recurrent,
)  # fmt: skip


@st.composite
def random_models(draw: Draw, least: int = 3, most: int = 12) -> RandomModel:
    """A model of some nodes; a step that does not fit its tensor adds none."""
    net = RandomModel(draw, draw(st.sampled_from(OPSETS)), np.random.default_rng(draw(st.integers(0, 1000))))
    for _ in range(draw(st.integers(1, 3))):
        net.input()
    wanted = draw(st.integers(least, most))
    for _ in range(2 * wanted):
        if len(net.nodes) >= wanted:
            break
        x = net.tensor()
        draw(st.sampled_from(STEPS if net.rank(x) else ELEMENTWISE))(net, x)
    if not net.nodes:
        net.add("Relu", [net.inputs[0]])
    net.finish()
    try:
        session(net.proto, optimize=False)
    except Exception:
        reject()  # onnxruntime infers another shape for the whole than for the node alone
    return net
