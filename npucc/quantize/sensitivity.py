"""What each scale costs the outputs: 8 bits in one group of tensors alone, all else exact.

The one big idea: the float model gets a switch behind every tensor that has a scale. Off, the tensor passes as it is; on, it is rounded
to 8 bits. One run per group tells what that group's rounding adds to the error of every output; for small errors these add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from npucc import reference
from npucc.export import to_onnx
from npucc.graph import Editor, Graph, Quant
from npucc.ops import OPS
from npucc.quantize.calibrate import Progress, float_session, measured, tensor_runner
from npucc.quantize.scales import Scales

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = dict[str, Array]
Run = Callable[[Mapping[str, Array]], Outputs]

SAMPLES = 8  # at most so many are measured with
FIRST = 2  # at most so many tell which groups matter
WORK = 1.5e11  # multiply-accumulates to spend on each of the two rounds; one run of each group is made in any case
BUNDLES = 256  # of more groups, neighbours are first measured together, in so many bundles: the runs must not grow with the network
OVERHEAD = 30  # of an element that is written, in multiply-accumulates
MATTERS = 0.01  # of an output's error
LOUD = 0.03  # of an output's error: other ranges are tried
TRIED = 12  # groups at most that other ranges are tried for
BETTER = 0.9  # of the error: less is no reason for another range
FEWEST_TO_JUDGE = 4  # samples: a range that only fits fewer is chance
SAME_STEP = 0.03  # relative: scales this close are not both tried
NOTHING = 1e-30
DIGITS = 6  # binary ones, of a ratio that is kept: what another machine's float sums change is lost in them


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Error energy over signal energy, per row: a row is one output in one sample, `outputs` names the output of each.

    `groups`: what 8 bits in that group alone cause, by the group's root. `weights`: what the stored weights alone cause.
    `methods`: by root, the range method that errs less than the one in use; `groups` has its error.
    """

    outputs: tuple[str, ...]
    groups: Mapping[str, Array]
    weights: Array
    methods: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Array:
        """What all of it causes together, per row."""
        return np.asarray(self.weights + sum(self.groups.values()))

    def heard(self) -> Sensitivity:
        """Only the outputs that some error reaches: what merely passes on an input says nothing."""
        rows = np.flatnonzero(self.total > NOTHING).tolist()
        groups = {root: noise[rows] for root, noise in self.groups.items()}
        return Sensitivity(tuple(self.outputs[row] for row in rows), groups, self.weights[rows], self.methods)

    def important(self, share: float = MATTERS) -> list[str]:
        """The groups with at least this share in some row's error, the largest first."""
        largest = {root: float(np.max(noise / (self.total + NOTHING), initial=0.0)) for root, noise in self.groups.items()}
        return sorted((root for root, each in largest.items() if each >= share), key=lambda root: -largest[root])


Alternatives = Callable[[str], Mapping[str, Quant]]  # from a group's root to its quantization by each range method


def measure(
    graph: Graph, integer: Graph, scales: Scales, feeds: Sequence[Mapping[str, Array]], roots: Iterable[str], *,
    dense: Graph | None = None, alternatives: Alternatives | None = None, progress: Progress | None = None,
) -> Sensitivity:  # fmt: skip
    """Run the float graph with each group of `roots` in 8 bits: all on a sample or two, then those that matter on more.

    `integer`: the same graph in integers, for its weights, whose error is that to the `dense` graph, if one is given.
    `alternatives`: other scales to try for the groups that matter most.
    """
    chosen = tuple(roots)
    stored = tensor_runner(_with_stored_weights(graph, integer), graph.outputs)
    exact, whole = tensor_runner(graph, graph.outputs), tensor_runner(dense, graph.outputs) if dense else None
    probe = _Probe(graph, _switched_runner(graph, scales, chosen), exact, whole, stored, progress)
    first = _first_round(probe.on(spread(feeds, affordable_samples(graph, min(len(chosen), BUNDLES), most=FIRST))), chosen)
    important = first.important()
    second = probe.on(spread(feeds, affordable_samples(graph, len(important))))
    found = _completed(second.errors(_bundles(important, 1)), first)
    if alternatives is None:
        return found
    tried = {root: _different(alternatives(root), scales.quants[root]) for root in found.important(LOUD)[:TRIED]}
    samples = spread(feeds, affordable_samples(graph, sum(map(len, tried.values()))))
    if len(samples) < FEWEST_TO_JUDGE:
        return found
    trial = second if len(samples) == len(second.samples) else probe.on(samples)
    return trial.with_better_ranges(found, tried)


def _first_round(trial: _Trial, roots: Sequence[str]) -> Sensitivity:
    """Every group on a sample or two. Of a bundle that does not matter only the first root has an entry, with the error of all of it."""
    bundles = _bundles(roots, -(-len(roots) // BUNDLES))
    found = trial.errors(bundles)
    while halved := [bundles[root] for root in found.important() if len(bundles[root]) > 1]:
        parts = {part[0]: part for bundle in halved for part in (bundle[: len(bundle) // 2], bundle[len(bundle) // 2 :])}
        bundles |= parts
        found = replace(found, groups={**found.groups, **trial.errors(parts).groups})
    return found


def _bundles(roots: Sequence[str], size: int) -> dict[str, tuple[str, ...]]:
    """Neighbours together, by the first of them."""
    return {roots[start]: tuple(roots[start : start + size]) for start in range(0, len(roots), max(size, 1))}


def _different(quants: Mapping[str, Quant], used: Quant) -> dict[str, Quant]:
    """The quantizations whose steps differ, from the one in use and from each other."""
    kept: dict[str, Quant] = {}
    for method, quant in quants.items():
        if quant.dtype == "s8" and not any(abs(float(quant.scale / each.scale) - 1) < SAME_STEP for each in (used, *kept.values())):
            kept[method] = quant
    return kept


@dataclass(frozen=True, slots=True)
class _Probe:
    """The float model, with switches, as it is, as it was before it was pruned (if it was), and with stored weights."""

    graph: Graph
    switched: SwitchedRun
    exact: Run
    dense: Run | None
    stored: Run
    progress: Progress | None

    def on(self, samples: Sequence[Mapping[str, Array]]) -> _Trial:
        """Ready to try groups on these samples."""
        wanted = [self.exact(feed) for feed in samples]
        dense = [self.dense(feed) for feed in samples] if self.dense else wanted
        places = ((name, index) for index in range(len(samples)) for name in self.graph.outputs)
        rows = [(name, index) for name, index in places if has_signal(wanted[index][name]) and has_signal(dense[index][name])]
        weights = _ratios([self.stored(feed) for feed in samples], dense, rows)
        return _Trial(self.switched, samples, wanted, rows, weights, self.progress)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Samples, what the exact model makes of them, the (output, sample) that have a signal, and what the weights cost in each."""

    switched: SwitchedRun
    samples: Sequence[Mapping[str, Array]]
    wanted: Sequence[Outputs]
    rows: Sequence[tuple[str, int]]
    weights: Array
    progress: Progress | None

    def noise(self, roots: Sequence[str], quant: Quant | None = None) -> Array:
        """What these groups cause together."""
        return _ratios([self.switched(feed, roots, quant) for feed in self.samples], self.wanted, self.rows)

    def errors(self, bundles: Mapping[str, Sequence[str]]) -> Sensitivity:
        """What the groups of each bundle cause together."""
        noise = {}
        for done, (name, roots) in enumerate(bundles.items(), start=1):
            noise[name] = self.noise(roots)
            if self.progress:
                self.progress("sensitivity", done, len(bundles))
        return Sensitivity(tuple(name for name, _ in self.rows), noise, self.weights)

    def with_better_ranges(self, found: Sensitivity, tried: Mapping[str, Mapping[str, Quant]]) -> Sensitivity:
        """`found` with the range method that errs least in each group that was tried, if it is better in either half of the samples."""
        methods, groups = {}, dict(found.groups)
        for done, (root, quants) in enumerate(tried.items(), start=1):
            used, best = self.noise((root,)), BETTER
            for method, quant in quants.items():
                relative = (self.noise((root,), quant) + NOTHING) / (used + NOTHING)
                halves = [float(np.mean(relative[[index % 2 == half for _, index in self.rows]])) for half in (0, 1)]
                if max(halves) < best:
                    best, methods[root], groups[root] = max(halves), method, found.groups[root] * float(np.mean(relative))
            if self.progress:
                self.progress("ranges", done, len(tried))
        return replace(found, groups=groups, methods=methods)


def _ratios(found: Sequence[Outputs], wanted: Sequence[Outputs], rows: Sequence[tuple[str, int]]) -> Array:
    return np.array([error_ratio(found[index][name], wanted[index][name]) for name, index in rows])


def _completed(second: Sensitivity, first: Sensitivity) -> Sensitivity:
    """The second round, with the groups that only the first measured: at each output their mean there."""
    rest = {
        root: np.array([float(np.mean(noise[[index for index, each in enumerate(first.outputs) if each == name]])) for name in second.outputs])
        for root, noise in first.groups.items()
        if root not in second.groups and set(second.outputs) <= set(first.outputs)
    }
    return replace(second, groups={**second.groups, **rest})


def affordable_samples(graph: Graph, groups: int, *, most: int = SAMPLES) -> int:
    """How many samples to measure with: as many as the work allows, at least one. Depends on the graph only."""
    return int(np.clip(WORK / max(work(graph) * groups, 1), 1, most))


def work(graph: Graph) -> int:
    """Of one run of the graph, in multiply-accumulates."""
    return sum(_work(graph, name) for name in graph.nodes)


def multiply_accumulates(graph: Graph, name: str) -> int:
    """Of a node with the trait `matrix`; 0 of any other."""
    node = graph.nodes[name]
    if not OPS[node.op].matrix:
        return 0
    result, weights = graph.tensors[node.outputs[0]], graph.tensors[node.inputs[1]]
    if node.op == "matmul":
        return int(np.prod(result.shape)) * graph.tensors[node.inputs[0]].shape[-1]
    places = graph.tensors[node.inputs[0]] if node.op == "conv_transpose" else result
    return int(np.prod(places.shape[2:])) * places.shape[0] * int(np.prod(weights.shape))


def _work(graph: Graph, name: str) -> int:
    elements = int(np.prod(graph.tensors[graph.nodes[name].outputs[0]].shape))
    return multiply_accumulates(graph, name) + OVERHEAD * elements


def spread(feeds: Sequence[Mapping[str, Array]], count: int) -> list[Mapping[str, Array]]:
    """So many of the feeds, evenly spread."""
    count = min(count, len(feeds))
    return [feeds[index * len(feeds) // count] for index in range(count)]


def has_signal(output: Array) -> bool:
    """Whether an error can be held against the output."""
    return output.dtype != bool and bool(np.any(_finite(output)))


def _finite(values: Array) -> Array:
    return np.asarray(np.where(np.isfinite(values), values, 0).astype(np.float64))


def error_ratio(found: Array, wanted: Array) -> float:
    """Error energy over signal energy, what is not finite left out, to `DIGITS`."""
    exact = _finite(wanted)
    error = _finite(found) - exact
    mantissa, exponent = math.frexp(float(np.sum(error * error) / np.sum(exact * exact)))
    return math.ldexp(round(mantissa * 2**DIGITS), exponent - DIGITS)


def _with_stored_weights(graph: Graph, integer: Graph) -> Graph:
    """The float graph with the weights and biases that the integer graph has."""
    editor = Editor(graph)
    for node in graph:
        stored = integer.nodes[node.name]
        if not OPS[node.op].matrix or not integer.tensors[stored.inputs[1]].is_constant:
            continue
        constants = [_as_float(editor, integer, name) for name in stored.inputs[1:] if name]
        editor.add_node(replace(node, inputs=(node.inputs[0], *constants)))
    return editor.freeze()


def _as_float(editor: Editor, integer: Graph, name: str) -> str:
    tensor = integer.tensors[name]
    assert tensor.data is not None
    return editor.constant(f"{name}/rounded", reference.to_real(tensor, tensor.data).astype(np.float32))


# ---- the model with switches


class SwitchedRun(Protocol):
    """A function from a feed and the roots of the groups to round to the outputs; `quant` rounds to other steps than the scales say."""

    def __call__(self, feed: Mapping[str, Array], roots: Sequence[str], quant: Quant | None = None) -> Outputs: ...


def _switched_runner(graph: Graph, scales: Scales, roots: Sequence[str]) -> SwitchedRun:
    weights: dict[str, Array] = {}
    model = to_onnx(graph, apart=weights)
    switches = {root: f"switch/{index}" for index, root in enumerate(roots)}
    for root, switch in switches.items():
        _add_switch(model, switch, scales.quants[root])
    taken: dict[str, str] = {}
    for name in measured(graph):
        root = scales.groups.root(name)
        if root in switches and graph.tensors[name].dtype == "float32":
            taken[name] = switches[root]
    _insert(model, taken, set(graph.inputs))
    session = float_session(model, weights, disable_quant_qdq="1")

    def run(feed: Mapping[str, Array], roots: Sequence[str], quant: Quant | None = None) -> Outputs:
        names, on = list(graph.outputs), [switches[root] for root in roots]
        fed: dict[str, Any] = dict.fromkeys(on, np.array(True))
        if quant:
            fed |= {f"{switch}/scale": np.asarray(quant.scale, np.float32) for switch in on}
            fed |= {f"{switch}/zero": np.asarray(quant.zero, np.int8) for switch in on}
        values = session.run(names, {**feed, **fed})
        return dict(zip(names, values, strict=True))

    return run


def _add_switch(model: onnx.ModelProto, switch: str, quant: Quant) -> None:
    """Inputs with defaults: a switch that is off, and the scale and zero point behind it."""
    for suffix, value in (("", np.array(False)), ("/scale", np.asarray(quant.scale, np.float32)), ("/zero", np.asarray(quant.zero, np.int8))):
        name = f"{switch}{suffix}"
        model.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), ()))
        model.graph.initializer.append(numpy_helper.from_array(value, name))


def _insert(model: onnx.ModelProto, switches: Mapping[str, str], inputs: set[str]) -> None:
    """Behind each tensor its switch: whoever read the tensor reads the switched value; a computed one hands its name to that."""
    inner: list[onnx.NodeProto] = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in switches and name in inputs:
                node.input[index] = _behind(name)
        for index, name in enumerate(node.output):
            if name in switches:
                node.output[index] = _before(name)
    inner += [_switch_node(name, _behind(name), switch) for name, switch in switches.items() if name in inputs]
    for node in model.graph.node:
        inner.append(node)
        inner += [_switch_node(_before(name), name, switches[name]) for name in map(_name_of, node.output) if name in switches]
    del model.graph.node[:]
    model.graph.node.extend(inner)


def _behind(name: str) -> str:
    return f"{name}/switched"


def _before(name: str) -> str:
    return f"{name}/before switch"


def _name_of(name: str) -> str:
    return name.removesuffix("/before switch")


def _switch_node(source: str, result: str, switch: str) -> onnx.NodeProto:
    stored, rounded, same = (f"{result}/{switch}/{what}" for what in ("stored", "rounded", "same"))
    parameters = [f"{switch}/scale", f"{switch}/zero"]
    quantize = helper.make_node("QuantizeLinear", [source, *parameters], [stored])
    dequantize = helper.make_node("DequantizeLinear", [stored, *parameters], [rounded])
    on = helper.make_graph([quantize, dequantize], "on", [], [helper.make_tensor_value_info(rounded, TensorProto.FLOAT, None)])
    off = helper.make_graph(
        [helper.make_node("Identity", [source], [same])], "off", [], [helper.make_tensor_value_info(same, TensorProto.FLOAT, None)]
    )
    return helper.make_node("If", [switch], [result], then_branch=on, else_branch=off)
