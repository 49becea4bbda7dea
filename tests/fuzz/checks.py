"""What must hold of every model that npucc compiles, checked on one of them.

The one big idea: each check is a function that raises where its promise is broken, so that a search can shrink towards the smallest model that
breaks this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

import npucc
from isa import Program, format_program, parse_program
from isa import check as check_program
from isa.target import load_target
from npucc import arithmetic, backend, reference, segments
from npucc.errors import CompileError
from npucc.export import to_onnx
from npucc.frontend import import_model
from npucc.graph import Graph, Node, make_graph
from npucc.lowering import lower
from npucc.ops import Table
from runtime import Machine
from tests.fuzz.random_models import RandomModel
from tests.npucc.float_graphs import exact_session, run_session
from tests.npucc.onnx_models import fused, run

Array = np.ndarray[Any, np.dtype[Any]]
EDGE, CUBE = load_target("edge"), load_target("cube")
#: next to `edge`, for which every model is compiled
SMALL = (
    CUBE,
    replace(EDGE, name="7x5", rows=7, cols=5, spm_bytes=20_000, acc_bytes=3_000),
    replace(CUBE, name="3x5x2", rows=3, cols=5, depth=2, spm_bytes=30_001, acc_bytes=2_000, requantize="q31.rne"),
    replace(EDGE, name="starved", rows=3, cols=2, spm_bytes=9_000, acc_bytes=512, dataflow="os", shadow_weights=False, requantize="q31.tfl"),
)
FLOAT_TOLERANCE = 5e-4  # of the largest value
LOST_DB = 9.0  # the most by which npucc may be worse than plain rounding of every tensor to its range
ENOUGH_DB = 20.0


class Broken(AssertionError):
    """A promise that does not hold."""


class Case:
    """A random model, and what is made of it as it is asked for."""

    def __init__(self, net: RandomModel) -> None:
        self.net, self.proto, self.feeds = net, net.proto, net.feeds()

    @cached_property
    def package(self) -> npucc.Package:
        return npucc.compile(self.proto, calibration=self.feeds)

    @cached_property
    def graph(self) -> Graph:
        return self.package.graph

    @cached_property
    def expected(self) -> list[Array]:
        """The float outputs for the first feed."""
        return run(self.proto, self.feeds[0])


def floats_keep_their_values(case: Case) -> None:
    """The imported graph, and the fused one, yield what onnxruntime yields."""
    imported = import_model(case.proto, host=True)
    if segments.host_nodes(imported):
        return
    for stage, graph in (("import", imported), ("passes", fused(imported)[0])):
        for name, want, have in zip(graph.outputs, case.expected, run(to_onnx(graph), case.feeds[0]), strict=True):
            _close(f"after {stage}, {name}", have, want, case.net.steep, name)


def _close(what: str, have: Array, want: Array, steep: set[str], name: str) -> None:
    if have.shape != want.shape or have.dtype != want.dtype:
        raise Broken(f"{what} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}")
    error = np.abs(have.astype(np.float64) - want.astype(np.float64))
    limit = FLOAT_TOLERANCE * max(1.0, float(np.abs(want.astype(np.float64)).max()))
    allowed = 0.05 if name in steep else 0.0
    if not (error <= limit).mean() >= 1 - allowed:
        raise Broken(f"{what} is off by {error.max():.3g}, allowed {limit:.3g}")


def machine_equals_reference(case: Case) -> None:
    """On two targets, each named tensor is what the reference computes, in random order too. Where memory is too small, the error says so."""
    small = SMALL[len(case.graph.nodes) % len(SMALL)]
    _runs_exactly(case, case.package.program, case.package.contents.constants)
    try:
        lowered = lower(case.graph, small)
    except CompileError as error:
        if "does not fit" not in error.message:
            raise
        return
    check_program(lowered.program)
    _runs_exactly(case, lowered.program, lowered.constants)


def _runs_exactly(case: Case, program: Program, constants: bytes) -> None:
    machine, target = Machine(program, constants, host=_engine(case.graph)), program.target
    expected = reference.run(case.graph, case.feeds[0], requantize=target.requantize)
    result = machine.run(case.feeds[0], dump=True)
    for name, stored in {**result.tensors, **result.raw}.items():
        _equal(f"{name} on {target.name}", stored, expected[name])
    for name, stored in machine.run(case.feeds[0], order="random", seed=len(program.layers)).raw.items():
        _equal(f"{name} on {target.name} in random order", stored, expected[name])
    text = format_program(program)
    if format_program(parse_program(text)) != text:
        raise Broken("the program's text changes when it is read and written")


def _engine(graph: Graph) -> segments.Engine:
    return segments.Engine(tuple(segments.attributes_of(node).model for node in segments.host_nodes(graph)))


def _equal(what: str, have: Array, want: Array) -> None:
    if have.shape != want.shape or not np.array_equal(have.astype(np.float64), want.astype(np.float64), equal_nan=True):
        different = int((have != want).sum()) if have.shape == want.shape else "all"
        raise Broken(f"{what}: {different} of {want.size} differ")


def export_agrees(case: Case) -> None:
    """onnxruntime computes the integers of the reference. Where a whole model differs, its nodes are compared one by one, on the same integers."""
    if segments.host_nodes(case.graph):
        return
    feed = case.feeds[0]
    expected = reference.run(case.graph, feed)
    found = run_session(exact_session(to_onnx(case.graph)), feed)
    if all(np.array_equal(_stored(case.graph, name, value), expected[name]) for name, value in found.items()):
        return
    for node in case.graph:
        _node_agrees(case.graph, node, expected)


def _node_agrees(graph: Graph, node: Node, stored: Mapping[str, Array]) -> None:
    """At most one step off, but for tables of int16 values, which are interpolated."""
    if node.op == "table" and graph.quant(node.inputs[0]).dtype == "s16" and not _is_direct(graph, node):
        return
    inputs = [name for name in dict.fromkeys(node.inputs) if name and not graph.tensors[name].is_constant]
    alone = make_graph("alone", [node], graph.tensors, inputs, node.outputs)
    feed = {name: np.asarray(reference.to_real(graph.tensors[name], stored[name])).astype(graph.tensors[name].dtype) for name in inputs}
    wide = any(graph.tensors[name].quant and graph.quant(name).dtype == "s16" for name in (*inputs, *node.outputs))
    values = run(to_onnx(alone), feed) if wide else run_session(exact_session(to_onnx(alone)), feed).values()  # optimized, 16 bits become 8
    for name, value in zip(node.outputs, values, strict=True):
        difference = np.abs(_stored(graph, name, value) - stored[name].astype(np.int64))
        if node.op == "div" and node.inputs[1] in stored:  # 0 / 0 is 0 on the machine, and whatever NaN happens to become in onnxruntime
            difference = np.where(reference.to_real(graph.tensors[node.inputs[1]], stored[node.inputs[1]]) == 0, 0, difference)
        if difference.max() > 1:
            raise Broken(f"{node.op} {name}: onnxruntime differs by {difference.max()} steps in {int((difference > 0).sum())} of {difference.size}")


def _is_direct(graph: Graph, node: Node) -> bool:
    assert isinstance(node.attributes, Table)
    return bool(arithmetic.without_table(node.attributes.expression, graph.quant(node.inputs[0])))


def _stored(graph: Graph, name: str, value: Array) -> Array:
    quant = graph.tensors[name].quant
    if quant is None or segments.is_raw(quant):
        return value
    return np.rint(value.astype(np.float64) / float(quant.scale)).astype(np.int64) + quant.zero


def errors_are_small(case: Case) -> None:
    """The quantized outputs are about as close to the float model as rounding every tensor to 8 bits over its range allows."""
    rounded = _plainly_rounded(case.net)
    results = [case.package.run(feed).outputs for feed in case.feeds]
    for name in case.net.outputs:
        if name in case.net.steep or case.net.values[name][0].dtype.kind != "f":
            continue
        want = np.stack(case.net.values[name])
        have, plain = sqnr(want, np.stack([result[name] for result in results])), sqnr(want, np.stack(rounded[name]))
        if have < min(plain - LOST_DB, ENOUGH_DB):
            raise Broken(f"{name} has {have:.1f} dB, plain rounding {plain:.1f} dB")


def sqnr(want: Array, have: Array) -> float:
    """Signal to noise in dB."""
    noise = float(((want - have).astype(np.float64) ** 2).sum())
    return 10 * float(np.log10(max(float((want.astype(np.float64) ** 2).sum()), 1e-12) / max(noise, 1e-12)))


def _plainly_rounded(net: RandomModel) -> dict[str, list[Array]]:
    """Every float tensor rounded to 255 steps between its least and largest value."""
    values = {name: _rounded(net.values[name]) for name in net.inputs}
    for node in net.nodes:
        samples = [node.session.run(None, {name: values[name][index] for name in node.reads}) for index in range(len(net.values[net.inputs[0]]))]
        for index, name in enumerate(node.proto.output):
            values[name] = _rounded([sample[index] for sample in samples])
    return values


def _rounded(samples: list[Array]) -> list[Array]:
    if np.asarray(samples[0]).dtype.kind != "f":
        return samples
    low, high = min(0.0, *(float(sample.min()) for sample in samples)), max(0.0, *(float(sample.max()) for sample in samples))
    step = (high - low) / 255 or 1.0
    return [np.asarray(np.rint(sample / step) * step, np.float32) for sample in samples]


def float_mode_equals_onnxruntime(case: Case) -> None:
    """Float mode is onnxruntime."""
    prepared = backend.prepare(case.proto)
    for feed in case.feeds[:2]:
        for name, want, have in zip(case.net.outputs, run(case.proto, feed), prepared.run(feed), strict=True):
            _close(f"float mode, {name}", np.asarray(have), want, case.net.steep, name)


Check = Callable[[Case], None]
CHECKS: tuple[Check, ...] = (floats_keep_their_values, machine_equals_reference, export_agrees, errors_are_small, float_mode_equals_onnxruntime)
