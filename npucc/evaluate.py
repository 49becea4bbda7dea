"""How far the integer network is from the float one: at its outputs, in accuracy, and layer by layer.

The one big idea: every figure is a sum over samples of a few numbers, so that samples stream and nothing is kept. A layer's error is
measured twice: accumulated (as it comes out of the integer network) and single (this layer alone, on exact inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from npucc import reference
from npucc.arithmetic import RANGES
from npucc.errors import DataError
from npucc.feeds import Sample
from npucc.graph import Graph, Node, Quant

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = Mapping[str, Array]
Run = Callable[[Mapping[str, Array]], Outputs]
Progress = Callable[[str, int, int], None]

SAME_MODEL = "compare a package with the model it was made from"
LARGEST_DB = 200.0  # stands for equality, which has no ratio; float32 reaches about 150


@dataclass(frozen=True, slots=True)
class OutputError:
    """One output over all samples. `sqnr_db` is signal energy over error energy, at most 200 (equal); `top1_agreement` is the share of rows
    with the same largest entry, None where the output is no score vector."""

    name: str
    sqnr_db: float
    cosine: float
    max_abs: float
    top1_agreement: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LayerError:
    """One node: `accumulated_db` of its result in the integer network (None where that was not kept), `single_db` of the node alone on
    quantized exact inputs.

    `dtype` and `covered`: how its result is stored and the reals that holds; `seen`: the exact result's least and largest; `saturated`:
    the share of the exact result that lies outside what is covered.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    tensor: str
    accumulated_db: float | None
    single_db: float
    dtype: str = ""
    covered: tuple[float, float] = (0.0, 0.0)
    seen: tuple[float, float] = (0.0, 0.0)
    saturated: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "nodes": list(self.nodes), "covered": list(self.covered), "seen": list(self.seen)}


class RangeSum:
    """The running figures behind `seen` and `saturated`: of exact values, against what a quantization covers."""

    def __init__(self, quant: Quant) -> None:
        low, high = RANGES[quant.dtype]
        self.dtype = quant.dtype
        self.covered = ((low - quant.zero) * float(quant.scale), (high - quant.zero) * float(quant.scale))
        self.slack = float(quant.scale) / 2
        self.low, self.high = np.inf, -np.inf
        self.outside = self.count = 0

    def add(self, exact: Array) -> None:
        """One sample."""
        values = exact[np.isfinite(exact)]
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.outside += int(np.count_nonzero((values < self.covered[0] - self.slack) | (values > self.covered[1] + self.slack)))
            self.count += values.size

    @property
    def seen(self) -> tuple[float, float]:
        return (self.low, self.high) if self.count else (0.0, 0.0)

    @property
    def saturated(self) -> float:
        return self.outside / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracies are shares of rows whose largest entry is the label; None without labels. The drop is in points (hundredths)."""

    samples: int
    outputs: tuple[OutputError, ...]
    float_accuracy: float | None = None
    npu_accuracy: float | None = None
    layers: tuple[LayerError, ...] = ()

    @property
    def accuracy_drop_points(self) -> float | None:
        if self.float_accuracy is None or self.npu_accuracy is None:
            return None
        return 100 * (self.float_accuracy - self.npu_accuracy)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The accuracies are there only if there were labels."""
        result: dict[str, Any] = {"samples": self.samples, "outputs": {output.name: output.as_dict() for output in self.outputs}}
        if self.float_accuracy is not None:
            result |= {"float_accuracy": self.float_accuracy, "npu_accuracy": self.npu_accuracy, "accuracy_drop_points": self.accuracy_drop_points}
        return {**result, "layers": [layer.as_dict() for layer in self.layers]}


class ErrorSum:
    """The running sums behind signal-to-noise ratio, cosine, largest error and agreement of one tensor."""

    def __init__(self) -> None:
        self.signal = self.noise = self.found = self.product = self.largest = 0.0
        self.rows = self.agreeing = self.samples = 0

    def add(self, found: Array, wanted: Array) -> None:
        """One sample. Raises DataError for different shapes."""
        if found.shape != wanted.shape:
            raise DataError(f"the shapes {list(found.shape)} and {list(wanted.shape)} differ", hint=SAME_MODEL)
        self.samples += 1
        rows_found, rows_wanted = score_rows(found), score_rows(wanted)
        x, y = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        usable = np.isfinite(y)
        x, y = x[usable], y[usable]
        self.signal += float(y @ y)
        self.found += float(x @ x)
        self.product += float(x @ y)
        self.noise += float((x - y) @ (x - y))
        self.largest = max(self.largest, float(np.abs(x - y).max(initial=0.0)))
        if rows_found is not None and rows_wanted is not None:
            self.rows += len(rows_found)
            self.agreeing += int((rows_found.argmax(axis=1) == rows_wanted.argmax(axis=1)).sum())

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0:
            return LARGEST_DB
        ratio = self.signal / self.noise
        return float(np.clip(10 * math.log10(ratio), -LARGEST_DB, LARGEST_DB)) if ratio > 0 else -LARGEST_DB

    @property
    def known_db(self) -> float | None:
        """`sqnr_db`, or None before the first sample."""
        return self.sqnr_db if self.samples else None

    @property
    def cosine(self) -> float:
        if self.signal == 0 or self.found == 0:
            return 1.0 if self.signal == self.found else 0.0
        return self.product / math.sqrt(self.signal) / math.sqrt(self.found)

    def output(self, name: str) -> OutputError:
        return OutputError(name, self.sqnr_db, self.cosine, self.largest, self.agreeing / self.rows if self.rows else None)


def score_rows(output: Array) -> Array | None:
    """The output as [rows, classes], or None if it is no score vector: at most [batch, positions, classes], but for dimensions of 1."""
    if output.ndim == 0 or output.dtype == bool:
        return None
    if output.ndim > 3:
        trimmed = tuple(size for size in output.shape[1:] if size != 1)
        return output.reshape(output.shape[0], -1) if len(trimmed) == 1 else None
    classes = output.shape[-1]
    return output.reshape(-1, classes) if classes > 1 and output.size else None


def compare(npu_outputs: Outputs, float_outputs: Outputs) -> tuple[OutputError, ...]:
    """The error of each float output, for one sample. Raises DataError where one is missing or has another shape."""
    return tuple(sums.output(name) for name, sums in _added({}, npu_outputs, float_outputs).items())


def _added(sums: dict[str, ErrorSum], npu_outputs: Outputs, float_outputs: Outputs) -> dict[str, ErrorSum]:
    for name, wanted in float_outputs.items():
        if name not in npu_outputs:
            found = ", ".join(map(repr, npu_outputs)) or "none"
            raise DataError(f"the output {name!r} is missing; found {found}", hint=SAME_MODEL)
        sums.setdefault(name, ErrorSum()).add(np.asarray(npu_outputs[name]), np.asarray(wanted))
    return sums


class _Hits:
    """Counts rows whose largest entry is the label, in the first output with as many rows as there are labels."""

    def __init__(self) -> None:
        self.rows = self.npu = self.float = 0

    def add(self, labels: Array, npu_outputs: Outputs, float_outputs: Outputs) -> None:
        wanted = np.asarray(labels).reshape(-1)
        for name, value in float_outputs.items():
            rows = score_rows(np.asarray(value))
            if rows is not None and len(rows) == wanted.size:
                found = score_rows(np.asarray(npu_outputs[name]))
                assert found is not None
                self.rows += wanted.size
                self.float += int((rows.argmax(axis=1) == wanted).sum())
                self.npu += int((found.argmax(axis=1) == wanted).sum())
                return
        shapes = ", ".join(f"{name!r} {list(np.shape(value))}" for name, value in float_outputs.items())
        raise DataError(f"{wanted.size} labels fit no output; the outputs are {shapes}", hint="leave the labels out, or give one per row of scores")


def evaluate(npu: Run, original: Run, samples: Iterable[Sample], *, progress: Progress | None = None) -> Evaluation:
    """Run both on every sample and compare. `npu` and `original` take a feed and return {output name: array}. Raises DataError."""
    sums: dict[str, ErrorSum] = {}
    hits, count = _Hits(), 0
    for sample in samples:
        found, wanted = npu(sample.feed), original(sample.feed)
        _added(sums, found, wanted)
        if sample.labels is not None:
            hits.add(sample.labels, found, wanted)
        count += 1
        if progress:
            progress("evaluate", count, 0)
    if not count:
        raise DataError("there are no samples to evaluate", hint="give at least one")
    outputs = tuple(each.output(name) for name, each in sums.items())
    return Evaluation(count, outputs, hits.float / hits.rows, hits.npu / hits.rows) if hits.rows else Evaluation(count, outputs)


def layer_errors(
    graph: Graph, float_tensors: Run, feeds: Iterable[Mapping[str, Array]], *, stored: Run | None = None, requantize: str = "fp32.rne",
    equalized: Iterable[Mapping[str, Any]] = (), progress: Progress | None = None,
) -> tuple[LayerError, ...]:  # fmt: skip
    """Both errors of every node of an integer graph, in graph order, over the feeds.

    `float_tensors(feed)` gives the float value of every tensor of the graph by name (see `float_runner`); `stored(feed)` the stored integers
    of the integer network (default: the reference, in the target's mode `requantize`); `equalized` which tensors of the integer
    network are scaled by channel (see QuantizeReport): the float ones are scaled alike. Takes memory for all tensors of one sample.
    """
    scaled = tuple(equalized)
    stored = stored or (lambda feed: reference.run(graph, feed, requantize=requantize))
    accumulated = {node.name: ErrorSum() for node in graph}
    single = {node.name: ErrorSum() for node in graph}
    ranges = {node.name: RangeSum(graph.quant(node.outputs[0])) for node in graph}
    for count, feed in enumerate(feeds, start=1):
        exact, found = _as_stored(graph, float_tensors(feed), scaled), stored(feed)
        for node in graph:
            ranges[node.name].add(exact[node.outputs[0]])
            _add_node(graph, node, exact, found, accumulated[node.name], single[node.name], requantize)
        if progress:
            progress("layers", count, 0)

    def row(node: Node) -> LayerError:
        errors, values = (accumulated[node.name].known_db, single[node.name].sqnr_db), ranges[node.name]
        return LayerError(node.name, node.op, node.sources, node.outputs[0], *errors, values.dtype, values.covered, values.seen, values.saturated)

    return tuple(map(row, graph))


def _add_node(graph: Graph, node: Node, exact: Outputs, found: Outputs, accumulated: ErrorSum, single: ErrorSum, requantize: str) -> None:
    result = graph.tensors[node.outputs[0]]
    wanted = exact[result.name]
    if result.name in found:
        accumulated.add(reference.to_real(result, found[result.name]), wanted)
    inputs = {name: reference.to_stored(graph.tensors[name], exact[name]) for name in node.inputs if name and not graph.tensors[name].is_constant}
    alone = reference.run_node(graph, node, inputs, requantize=requantize)[result.name]
    single.add(reference.to_real(result, alone), wanted)


def _as_stored(graph: Graph, exact: Outputs, equalized: Sequence[Mapping[str, Any]]) -> Outputs:
    """The float values of all tensors, rescaled copies (which the float model does not have) among them, channels as large as they are stored."""
    whole = _with_rescaled(graph, _scaled(exact, [each for each in equalized if each["tensor"] in exact]))
    return _scaled(whole, [each for each in equalized if each["tensor"] not in exact])


def _scaled(exact: Outputs, equalized: Iterable[Mapping[str, Any]]) -> dict[str, Array]:
    """The float values, with the channels that the quantizer has scaled."""
    values = dict(exact)
    for each in equalized:
        value, axis, factor = values[each["tensor"]], each["axis"], np.exp2(np.asarray(each["powers"], np.float32))
        values[each["tensor"]] = value * factor.reshape([-1 if i == axis else 1 for i in range(value.ndim)])
    return values


def _with_rescaled(graph: Graph, exact: Outputs) -> dict[str, Array]:
    """The float values, those of rescaled copies (which the float model does not have) added."""
    values = dict(exact)
    for node in graph:
        if node.outputs[0] not in values:
            values[node.outputs[0]] = values[node.inputs[0]]
    return values


def float_runner(graph: Graph) -> Run:
    """A function from a feed to every activation of a float graph, run by onnxruntime."""
    from npucc.quantize.calibrate import tensor_runner

    computed = sorted(output for node in graph for output in node.outputs)
    return tensor_runner(graph, [*graph.inputs, *computed])
