"""The stage itself: calibrate, share, choose ranges, and write the integer graph.

The one big idea: each step returns a value that the next one takes; the integer graph is built once all scales are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc import arithmetic
from npucc.errors import QuantizeError
from npucc.feeds import Port, synthetic_feeds
from npucc.graph import Editor, Graph, Node, Quant, Tensor
from npucc.ops import OPS
from npucc.quantize.calibrate import Calibration, calibrate, measured, softmax_axis
from npucc.quantize.constants import MatrixConstants, constant_quant, dequantized, finite_constant, output_axis, quantize_matrix
from npucc.quantize.options import QuantizeOptions
from npucc.quantize.ranges import Histogram, Range, activation_quant, choose_range, squared_error
from npucc.quantize.share import Groups, share_scales

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]

SYNTHETIC_SAMPLES = 8
BOOLEAN = Quant("u8", np.asarray(1.0, np.float32), 0)
CLIPPING_MUST_PAY = 0.5  # a graph input is clipped only if that at least halves its squared error


@dataclass(frozen=True, slots=True)
class TensorRange:
    """One activation: what was seen, what is covered, how it is stored. `zero` may be −128 … 127."""

    name: str
    seen: tuple[float, float]
    covered: tuple[float, float]
    scale: float
    zero: int

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "seen": list(self.seen), "covered": list(self.covered), "scale": self.scale, "zero": self.zero}


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """`rescaled`: tensors that a Concat reads on another scale than the rest of the graph."""

    samples: int
    method: str
    tensors: tuple[TensorRange, ...]
    rescaled: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "method": self.method, "rescaled": list(self.rescaled), "tensors": [each.as_dict() for each in self.tensors]}


@dataclass(frozen=True, slots=True)
class Quantized:
    """The integer graph. `synthetic`: it was calibrated with made-up inputs."""

    graph: Graph
    report: QuantizeReport
    synthetic: bool


def quantize(
    graph: Graph, feeds: Iterable[Mapping[str, Any]] | None, *, options: QuantizeOptions | None = None, progress: Progress | None = None
) -> Quantized:
    """The integer form of a float graph, calibrated with `feeds` ({input: array}), or with made-up inputs if that is None.

    Deterministic; neither the order nor the type of the iterable matters. Raises QuantizeError.
    """
    options = options or QuantizeOptions()
    _refuse_unsupported(graph)
    graph = _in_operand_order(graph)
    samples = feeds if feeds is not None else _made_up(graph)
    calibration = calibrate(graph, samples, limit=options.samples, progress=progress)
    observed = _observed(graph, calibration)
    shared, groups, rescaled = share_scales(graph, observed, ratio=options.concat_ratio)
    covered = _covered_ranges(shared, groups, calibration, options)
    quants = {root: activation_quant(each) for root, each in covered.items()}
    for root in quants:
        quants[root] = _adjusted(shared, groups, root, quants[root], covered[root])
    builder = _Builder(shared, groups, quants, covered, calibration, options)
    report = QuantizeReport(calibration.samples, options.method, tuple(_rows(shared, groups, observed, covered, quants)), rescaled)
    return Quantized(builder.build(), report, feeds is None)


def _refuse_unsupported(graph: Graph) -> None:
    for tensor in graph.tensors.values():
        if tensor.quant is not None:
            raise QuantizeError(f"tensor {tensor.name!r} is quantized already", hint="give the float model")
    for node in graph:
        matrix = OPS[node.op].matrix and node.op != "matmul"
        if matrix and not graph.tensors[node.inputs[1]].is_constant:
            raise QuantizeError("the weights are computed by the model", node=_source(node), hint="8-bit weights must be constants; use MatMul for a product of activations")
        if OPS[node.op].matrix and len(node.inputs) > 2 and node.inputs[2] and not graph.tensors[node.inputs[2]].is_constant:
            raise QuantizeError("the bias is computed by the model", node=_source(node), hint="a bias must be constant; add it with Add")


def _source(node: Node) -> str:
    return node.sources[-1] if node.sources else node.name


def _in_operand_order(graph: Graph) -> Graph:
    """add: the operand that is broadcast comes second, as onnxruntime's kernel sums them."""
    editor = Editor(graph)
    for node in graph:
        first, second = (graph.tensors[name].shape for name in (*node.inputs, *node.inputs)[:2])
        result = graph.tensors[node.outputs[0]].shape
        if node.op == "add" and first != result and second == result:
            editor.add_node(replace(node, inputs=node.inputs[::-1]))
    return editor.freeze()


def _made_up(graph: Graph) -> list[dict[str, Array]]:
    ports = [Port(name, graph.tensors[name].shape, graph.tensors[name].dtype) for name in graph.inputs]
    return list(synthetic_feeds(ports, count=SYNTHETIC_SAMPLES))


def _observed(graph: Graph, calibration: Calibration) -> dict[str, Range]:
    """Per tensor the range of the values seen, constants and padding that are moved with them included."""
    observed = {name: histogram.observed for name, histogram in calibration.histograms.items()}
    for node in graph:
        if not OPS[node.op].moves_data:
            continue
        for name in node.inputs:
            tensor = graph.tensors[name]
            if tensor.data is not None and tensor.dtype != "bool":
                values = tensor.data[np.isfinite(tensor.data)]
                observed[name] = Range(min(0.0, float(values.min(initial=0.0))), max(0.0, float(values.max(initial=0.0))))
        padding = getattr(node.attributes, "value", 0.0)
        if padding and np.isfinite(padding):
            observed[node.outputs[0]] = Range(min(0.0, padding), max(0.0, padding))
    return observed


def _covered_ranges(graph: Graph, groups: Groups, calibration: Calibration, options: QuantizeOptions) -> dict[str, Range]:
    """Per group (by its root) the range to store."""
    members: dict[str, list[str]] = {}
    for name, tensor in graph.tensors.items():
        if tensor.dtype != "bool":
            members.setdefault(groups.root(name), []).append(name)
    moved = _observed(graph, calibration)
    return {root: _covered(graph, names, calibration, moved, options) for root, names in members.items()}


def _covered(graph: Graph, names: list[str], calibration: Calibration, moved: Mapping[str, Range], options: QuantizeOptions) -> Range:
    """The range of one group: from the histogram of all its values; whole for integers, masked scores and (almost always) graph inputs."""
    histogram, extra = Histogram(), Range()
    for name in names:
        source = _calibrated_as(graph, name)
        if source in calibration.histograms:
            histogram.merge(calibration.histograms[source])
        elif name in moved:
            extra = extra.joined(moved[name])
    chosen = choose_range(histogram, options)
    whole = any(graph.tensors[name].dtype != "float32" or softmax_axis(graph, name) is not None for name in names)
    if whole or (any(name in graph.inputs for name in names) and not _clipping_pays(histogram, chosen)):
        chosen = histogram.observed
    return chosen.joined(extra)


def _calibrated_as(graph: Graph, name: str) -> str:
    """The tensor whose values were counted: a rescaled copy has those of its original."""
    node = graph.producer(name)
    return node.inputs[0] if node and node.op == "table" and node.attributes.expression == "x" else name  # type: ignore[attr-defined]


def _clipping_pays(histogram: Histogram, chosen: Range) -> bool:
    centres, counts = histogram.values()
    return squared_error(chosen, centres, counts) < CLIPPING_MUST_PAY * squared_error(histogram.observed, centres, counts)


def _adjusted(graph: Graph, groups: Groups, root: str, quant: Quant, covered: Range) -> Quant:
    """Scales that must be of a certain form: whole steps for integers, 1/n for a softmax (as onnxruntime's kernel assumes)."""
    members = [name for name in groups.members(root) if name in graph.tensors]
    if any(graph.tensors[name].dtype not in ("float32", "bool") for name in members):
        return _whole_steps(members[0], covered)
    producers = [node.op for node in map(graph.producer, members) if node]
    if "softmax" not in producers:
        return quant
    steps = max(int(1 / float(quant.scale)), 1)
    while int(np.float32(1) / np.float32(1 / steps)) != steps:
        steps -= 1
    return Quant(quant.dtype, np.asarray(1 / steps, np.float32), quant.zero)


def _whole_steps(name: str, covered: Range) -> Quant:
    if covered.width > arithmetic.RANGES["s8"][1] - arithmetic.RANGES["s8"][0]:
        raise QuantizeError(
            f"the integer tensor {name!r} takes values from {covered.low:g} to {covered.high:g}, more than 256 different ones",
            hint="8 bits can't hold it exactly; compute on it outside the model, or convert it to float and scale it first",
        )
    return Quant("s8", np.asarray(1.0, np.float32), int(np.clip(-128 - covered.low, -128, 127)))


def _rows(graph: Graph, groups: Groups, observed: Mapping[str, Range], covered: Mapping[str, Range], quants: Mapping[str, Quant]) -> Iterable[TensorRange]:
    for name in measured(graph):
        root = groups.root(name)
        seen, stored, quant = observed.get(name, covered[root]), covered[root], quants[root]
        yield TensorRange(name, (seen.low, seen.high), (stored.low, stored.high), float(quant.scale), quant.zero)


class _Builder:
    """Writes the integer graph: quants on activations, integers in constants. A constant that two nodes store differently becomes two."""

    def __init__(
        self, graph: Graph, groups: Groups, quants: Mapping[str, Quant], covered: Mapping[str, Range], calibration: Calibration, options: QuantizeOptions
    ) -> None:
        self.graph, self.groups, self.quants, self.covered = graph, groups, quants, covered
        self.calibration, self.options = calibration, options
        self.editor = Editor(graph)
        self.stored: dict[tuple[str, Any, bytes], str] = {}

    def build(self) -> Graph:
        for name, tensor in self.graph.tensors.items():
            if not tensor.is_constant or name in self.graph.outputs:
                self.editor.tensors[name] = replace(tensor, quant=self._activation(name))
        for node in self.graph:
            inputs = self._matrix_inputs(node) if self._has_weights(node) else self._inputs(node)
            self.editor.add_node(replace(node, inputs=inputs))
        return self.editor.freeze()

    def _has_weights(self, node: Node) -> bool:
        return OPS[node.op].matrix and not self._is_constant(node.inputs[0]) and self._is_constant(node.inputs[1])

    def _is_constant(self, name: str) -> bool:
        return bool(name) and self.graph.tensors[name].is_constant

    def _activation(self, name: str) -> Quant:
        return BOOLEAN if self.graph.tensors[name].dtype == "bool" else self.quants[self.groups.root(name)]

    def _store(self, name: str, values: Array, quant: Quant) -> str:
        """The constant's name with these integers; a fresh one if the name is taken by others."""
        key = (name, quant.key, values.tobytes())
        if key not in self.stored:
            taken = any(other[0] == name for other in self.stored)
            chosen = self.editor.fresh(name) if taken else name
            self.editor.tensors[chosen] = replace(self.graph.tensors[name], name=chosen, data=values, quant=quant)
            self.stored[key] = chosen
        return self.stored[key]

    def _matrix_inputs(self, node: Node) -> tuple[str, ...]:
        weights, bias = self.graph.tensors[node.inputs[1]].data, self._bias(node)
        assert weights is not None
        self._refuse_not_finite(node, weights, bias)
        source = self._activation(node.inputs[0])
        axis = output_axis(node, weights, per_tensor=self.options.per_tensor)
        constants = quantize_matrix(weights, bias, source, axis)
        if self.options.bias_correction:
            constants = self._corrected(node, weights, bias, source, constants)
        stored = self._store(node.inputs[1], constants.weights, constants.weights_quant)
        if constants.bias is None:
            return (node.inputs[0], stored)
        return (node.inputs[0], stored, self._store_bias(node, constants))

    def _bias(self, node: Node) -> Array | None:
        return self.graph.tensors[node.inputs[2]].data if len(node.inputs) > 2 and node.inputs[2] else None

    def _store_bias(self, node: Node, constants: MatrixConstants) -> str:
        assert constants.bias is not None
        if len(node.inputs) > 2 and node.inputs[2]:
            return self._store(node.inputs[2], constants.bias, constants.bias_quant)
        name = self.editor.fresh(f"{node.outputs[0]}/bias")
        return self.editor.add_tensor(Tensor(name, constants.bias.shape, "float32", constants.bias, constants.bias_quant))

    def _refuse_not_finite(self, node: Node, weights: Array, bias: Array | None) -> None:
        for kind, values in (("weights", weights), ("bias", bias)):
            if values is not None and not np.isfinite(values).all():
                raise QuantizeError(f"the {kind} are not all finite numbers", node=_source(node), hint="correct the model")

    def _corrected(self, node: Node, weights: Array, bias: Array | None, source: Quant, constants: MatrixConstants) -> MatrixConstants:
        """Add to the bias what rounding the weights takes from the mean of each output channel: (w − stored w) · mean of x."""
        error = mean_error(node, weights.astype(np.float64) - dequantized(constants), self.calibration.means[node.inputs[0]])
        if error is None:
            return constants
        whole = error if bias is None else bias.astype(np.float64) + error
        return quantize_matrix(weights, whole, source, constants.weights_quant.axis)

    def _inputs(self, node: Node) -> tuple[str, ...]:
        """Constant operands stored as activations are: on the shared scale where data moves, on their own otherwise."""
        return tuple(self._operand(node, index, name) for index, name in enumerate(node.inputs))

    def _operand(self, node: Node, index: int, name: str) -> str:
        if not self._is_constant(name) or node.op == "layer_norm":
            return name
        tensor = self.graph.tensors[name]
        assert tensor.data is not None
        if tensor.dtype == "bool":
            return self._store(name, tensor.data.astype(np.uint8), BOOLEAN)
        if OPS[node.op].matrix and index == 2:
            return self._product_bias(node, name, tensor.data)
        result = node.outputs[0]
        covered = self.covered.get(self.groups.root(result), Range())
        values = finite_constant(self.graph, node, name, covered)
        quant = self._activation(result) if OPS[node.op].moves_data else constant_quant(values)
        return self._store(name, arithmetic.quantize(values.astype(np.float32), quant).astype(np.int8), quant)

    def _product_bias(self, node: Node, name: str, bias: Array) -> str:
        """The bias of a product of two activations."""
        scales = [self._operand_scale(operand) for operand in node.inputs[:2]]
        quant = Quant("s32", np.asarray(np.float32(scales[0]) * np.float32(scales[1]), np.float32), 0)
        return self._store(name, np.rint(bias / float(quant.scale)).astype(np.int32), quant)

    def _operand_scale(self, name: str) -> float:
        if self._is_constant(name):
            data = self.graph.tensors[name].data
            assert data is not None
            return float(constant_quant(data).scale)
        return float(self._activation(name).scale)


def mean_error(node: Node, error: Array, means: Array) -> Array | None:
    """Per output channel: the weight error times the mean input, summed. None where the operator has no channel-wise bias."""
    if node.op == "conv":
        groups = node.attributes.groups  # type: ignore[attr-defined]
        taps = error.sum(axis=(2, 3)).reshape(groups, -1, error.shape[1])
        return np.asarray(np.matmul(taps, means.reshape(groups, -1, 1)).reshape(-1))
    if node.op == "matmul" and error.ndim == 2:
        return np.asarray(means @ error)
    return None
