"""What values the float model takes: run by onnxruntime, sample by sample.

The one big idea: every tensor that gets a scale is an extra output of the exported model; each sample's values go into histograms and
channel sums at once and are dropped, so that memory holds one sample only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import onnx
import onnxruntime

from npucc.errors import DataError, QuantizeError
from npucc.export import to_onnx
from npucc.feeds import check_feed
from npucc.graph import Editor, Graph, Node
from npucc.ops import OPS, Table
from npucc.passes.infinities import may_be_infinite
from npucc.quantize.ranges import Histogram
from npucc.quantize.repeats import Repeats
from npucc.segments import untouched
from npucc.signature import ports_of_graph

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]

THREADS = 2
MOST_COPIED = 1 << 28  # bytes of weights that onnxruntime may rearrange for speed, and so copy
LOWEST = float(np.finfo(np.float32).min)
SOFTMAX_DEPTH = 16.0  # exp(−16) is less than a ten-thousandth of an 8-bit step: what lies further below the largest score is as good as there


@dataclass(frozen=True, slots=True)
class Calibration:
    """`histograms`: of every tensor that is computed (not merely moved) or read in; `means`: per
    (tensor, axis): along the axis that a matrix operator sums over;
    `first`: the first few feeds; `operands`: histograms of what matrix operators read that is merely moved;
    `loudness`: root mean square of each float graph input and output, sample by sample."""

    histograms: dict[str, Histogram]
    means: dict[tuple[str, int], Array]
    samples: int
    first: tuple[Mapping[str, Array], ...] = ()
    operands: dict[str, Histogram] = field(default_factory=dict)
    loudness: dict[str, list[float]] = field(default_factory=dict)


def calibrate(
    graph: Graph, feeds: Iterable[Mapping[str, Any]], *, limit: int, keep: int = 0, repeats: Repeats | None = None, progress: Progress | None = None
) -> Calibration:
    """Run at most `limit` samples of the float graph; hand back the first `keep`. Raises QuantizeError for samples that do not fit, and for NaN.

    `repeats`: tensors that are counted in one histogram.
    """
    repeats = repeats or {}
    histograms = _histograms(measured(graph), repeats)
    axes = channel_axes(graph)
    sums = {(name, axis): np.zeros(graph.tensors[name].shape[axis]) for name, several in axes.items() for axis in several}
    scores = {name: axis for name in histograms if (axis := softmax_axis(graph, name)) is not None}
    operands = _histograms([name for name in moved_operands(graph) if name not in histograms], repeats)
    ends = (graph.tensors[name] for name in (*graph.inputs, *graph.outputs))
    loudness: dict[str, list[float]] = {end.name: [] for end in ends if np.dtype(end.dtype).kind == "f" and not end.is_constant}
    run = tensor_runner(graph, sorted({*histograms, *axes, *operands, *loudness}))
    total, count = _total(feeds, limit), 0
    first: list[Mapping[str, Array]] = []
    for feed in checked(graph, islice(feeds, limit)):
        values = run(feed)
        for name, value in values.items():
            _refuse_nan(graph, name, value)
            for axis in axes.get(name, ()):
                sums[name, axis] += _channel_means(value, axis)
            if name in loudness:
                loudness[name].append(float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))))
        _count(histograms, {name: _near_the_top(value, scores[name]) if name in scores else value for name, value in values.items()})
        _count(operands, values)
        first += [feed] if count < keep else []
        count += 1
        if progress:
            progress("calibrate", count, total)
    if not count:
        raise QuantizeError("there are no calibration samples", hint="give at least one feed {input name: array}, or None for made-up inputs")
    means = {(name, axis): _mean_of_all(sums, repeats.get(name, (name,)), axis) / count for name, axis in sums}
    return Calibration(histograms, means, count, tuple(first), operands, loudness)


def _histograms(names: Iterable[str], repeats: Repeats) -> dict[str, Histogram]:
    """An empty one for each tensor; those that repeat each other have the same."""
    made: dict[str, Histogram] = {}
    return {name: made.setdefault(repeats.get(name, (name,))[0], Histogram()) for name in names}


def _count(histograms: Mapping[str, Histogram], values: Mapping[str, Array]) -> None:
    """Count the values of one sample; what goes into one histogram is counted at once."""
    together: dict[int, list[str]] = {}
    for name, histogram in histograms.items():
        together.setdefault(id(histogram), []).append(name)
    for names in together.values():
        flat = [values[name].reshape(-1) for name in names]
        histograms[names[0]].add(flat[0] if len(flat) == 1 else np.concatenate(flat))


def _mean_of_all(sums: Mapping[tuple[str, int], Array], names: Sequence[str], axis: int) -> Array:
    return np.asarray(np.mean([sums[name, axis] for name in names if (name, axis) in sums], axis=0))



def measured(graph: Graph) -> tuple[str, ...]:
    """Tensors whose values are counted: inputs, and results of operators that compute, but for what only the host touches and given scales."""
    computed = (name for node in graph if not OPS[node.op].moves_data for name in node.outputs)
    raw = untouched(graph)
    candidates = (graph.tensors[name] for name in (*graph.inputs, *computed) if name not in raw)
    return tuple(tensor.name for tensor in candidates if tensor.dtype != "bool" and tensor.given is None)


def moved_operands(graph: Graph) -> tuple[str, ...]:
    """What a matrix operator reads that another only moved (a part of a state vector, say)."""
    moved = {name for node in graph if OPS[node.op].moves_data for name in node.outputs}
    return tuple(dict.fromkeys(name for node in graph if OPS[node.op].matrix for name in node.inputs[:2] if name in moved))


def channel_axes(graph: Graph) -> dict[str, set[int]]:
    """Per first operand of matrix operators with constant weights: the dimensions that their sums run over."""
    axes: dict[str, set[int]] = {}
    for node in graph:
        weights = graph.tensors[node.inputs[1]] if OPS[node.op].matrix else None
        if weights and weights.is_constant and weights.given is None and not graph.tensors[node.inputs[0]].is_constant:
            axes.setdefault(node.inputs[0], set()).add(summed_axis(graph, node))
    return axes


def summed_axis(graph: Graph, node: Node) -> int:
    """The dimension of a matrix operator's first operand that its sums run over."""
    return len(graph.tensors[node.inputs[0]].shape) - 1 if node.op == "matmul" else 1


def softmax_axis(graph: Graph, name: str) -> int | None:
    """The axis, if the tensor is read by softmax only, besides by tests whether rows are masked whole."""
    users = [user for user in graph.users(name) if not tests_for_masks(graph, user)]
    axes = {node.attributes.axis if node.op == "softmax" else None for node in users}  # type: ignore[attr-defined]
    return axes.pop() if len(axes) == 1 and name not in graph.outputs else None


def tests_for_masks(graph: Graph, node: Node) -> bool:
    """Whether the node takes the largest element of rows, only to compare it (with −∞)."""
    return node.op == "reduce_max" and node.outputs[0] not in graph.outputs and all(user.op == "compare" for user in graph.users(node.outputs[0]))


def _near_the_top(scores: Array, axis: int) -> Array:
    """Scores far below the largest of their row (masked ones) count as little below it: after softmax they are zero anyway.

    Rows that are masked whole don't count.
    """
    top: Array = scores.max(axis=axis, keepdims=True)
    near: Array = np.maximum(scores, top - np.float32(SOFTMAX_DEPTH))
    return near if np.isfinite(top).all() else near[np.broadcast_to(np.isfinite(top), near.shape)]


def _channel_means(value: Array, axis: int) -> Array:
    others = tuple(i for i in range(value.ndim) if i != axis)
    return np.asarray(value.mean(axis=others, dtype=np.float64))


def tensor_runner(graph: Graph, wanted: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function from a feed to the wanted tensors of a float graph by name, which raises QuantizeError for a feed that the model can't take."""
    weights: dict[str, Array] = {}
    model = to_onnx(_with_finite_scores(graph), apart=weights)
    have = {value.name for value in model.graph.output}
    computed = [name for name in wanted if name not in graph.inputs]
    for name in computed:
        if name not in have:
            tensor = graph.tensors[name]
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, tensor.shape))
    session = float_session(model, weights)

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = session.run(computed, dict(feed)) if computed else []
        except Exception as error:  # noqa: BLE001  onnxruntime raises many kinds
            reason = str(error).splitlines()[0]
            raise QuantizeError(f"onnxruntime can't run the model on a calibration sample: {reason}", hint="check the sample's values") from None
        return {**{name: feed[name] for name in wanted if name in feed}, **dict(zip(computed, values, strict=True))}

    return run


def _with_finite_scores(graph: Graph) -> Graph:
    """The graph with every softmax of a row that is masked whole (−∞ throughout) the same for all, as in integers, instead of NaN."""
    editor = Editor(graph)
    for node in graph:
        if node.op == "softmax" and may_be_infinite(graph, node.inputs[0]):
            finite = replace(graph.tensors[node.inputs[0]], name=editor.fresh(f"{node.inputs[0]}/finite"))
            editor.add_tensor(finite)
            editor.add_node(Node(editor.fresh(finite.name), "table", node.inputs, (finite.name,), Table(("max", "x", LOWEST))), at=node.name)
            editor.add_node(replace(node, inputs=(finite.name,)))
    return editor.freeze()


def float_session(model: onnx.ModelProto, weights: Mapping[str, Array], **entries: str) -> onnxruntime.InferenceSession:
    """The model in onnxruntime on the CPU, quiet and with few threads. `weights`: its large stored tensors, which no message of protobuf copies.

    Convolutions stay in the model's layout: the other one adds channels in blocks as wide as the processor's registers, so that last bits, and
    with them what is rounded up or down, would differ from processor to processor.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # the next would change the layout
    options.log_severity_level = 4  # what fails is raised
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    if sum(value.nbytes for value in weights.values()) > MOST_COPIED:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if weights:
        options.add_external_initializers(list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()])
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def integer_session(integer: Graph) -> onnxruntime.InferenceSession:
    """A graph in integers in onnxruntime: the same integers that the NPU computes."""
    return float_session(to_onnx(integer), {}, x64quantprecision="1")


def checked(graph: Graph, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Array]]:
    """The feeds as the graph's inputs want them. Raises QuantizeError."""
    ports = ports_of_graph(graph)
    for index, feed in enumerate(feeds):
        try:
            yield check_feed(feed, ports, place=f"calibration sample {index}")
        except DataError as error:
            raise QuantizeError(error.message, file=error.file, hint=error.hint) from None


def _refuse_nan(graph: Graph, name: str, value: Array) -> None:
    if value.dtype.kind == "f" and np.isnan(value).any():
        node = graph.producer(name)
        where = node.sources[-1] if node and node.sources else name
        raise QuantizeError(f"the float model yields NaN in tensor {name!r}", node=where, hint="check model and samples in onnxruntime")


def _total(feeds: Iterable[Any], limit: int) -> int:
    try:
        return min(len(feeds), limit)  # type: ignore[arg-type]
    except TypeError:
        return limit
