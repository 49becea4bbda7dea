"""The whole compiler on one page: ONNX model in, package out, every stage in order, stop at any of them.

    import ──▶ passes … ──▶ prune ──▶ quantize ──▶ lower ──▶ check
    Graph      Graph        Graph     Graph        Program   Program
    (float)    (fused)      (fused)   (integer)

The one big idea: `steps` is a generator. It yields the value after each stage, so whoever wants to look between two stages
(`--dump-after`, a test, a notebook) takes the steps one by one, and `compile` simply takes the last.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isa import Program, format_program
from isa import check as check_program
from isa.target import Target, load_target
from npucc.errors import CompileError, PruneError, QuantizeError
from npucc.feeds import Port, open_dataset
from npucc.graph import Graph
from npucc.ops import OPS
from npucc.package import FROM_DATA, FROM_MODEL, SYNTHETIC, Package, Refused
from npucc.signature import ports_of_model

if TYPE_CHECKING:
    import onnx

    from npucc.prune import PruneOptions, PruneReport
    from npucc.quantize import QuantizeOptions

#: `quant`: no quantization at all
FLOAT_MODE = "none"
Progress = Callable[[str, int, int], None]
Feeds = Iterable[Mapping[str, Any]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StageName:
    """One stage: what `--dump-after` calls it, and why it is there."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Step:
    """The value after one stage. `refused` are rewrites that were looked at and not done, with the reason."""

    stage: str
    value: Graph | Program | Package
    refused: tuple[Refused, ...] = field(default=())

    def text(self) -> str:
        """The value for a reader: a graph as one line per node, a program as its assembly."""
        if isinstance(self.value, Graph):
            return self.value.text()
        return self.value.text if isinstance(self.value, Package) else format_program(self.value)


def stages() -> tuple[StageName, ...]:
    """Every stage in order."""
    from npucc import passes

    return (
        StageName("import", "the ONNX graph in the compiler's own operators, constants folded"),
        *(StageName(stage.name, stage.why) for stage in passes.STAGES),
        StageName("prune", "what --prune asks for: fewer channels, fewer weights, the rest refitted; without it nothing is done"),
        StageName("quantize", "scales from calibration; from here on every tensor is integers"),
        StageName("lower", "tiles, memory, instructions and events"),
        StageName("check", "bounds, dtypes, capacity, events and races of the finished program"),
    )


def compile(
    model: str | Path | onnx.ModelProto,
    target: str | Path | Target = "edge",
    *,
    calibration: str | Path | Feeds | None = None,
    shapes: Shapes | None = None,
    prune: str | PruneOptions | None = None,
    quant: str | QuantizeOptions | None = None,
    host: bool = True,
    progress: Progress | None = None,
) -> Package:
    """Compile an ONNX model for a target.

    `calibration`: feeds of representative inputs (`{name: array}`, each of the model's input shape), or DATA as the command
    line takes it. Without it, scales come from made-up inputs and the package says so. `shapes` binds open input sizes.
    `prune`: "channels=30%", "2:4", … (see npucc.prune.options). `quant`: "key=value,…" of QuantizeOptions, or "none":
    float mode, in which onnxruntime runs the whole model. What the NPU can't run is run by onnxruntime as host segments, which
    `host=False` forbids. Raises NpuccError or IsaError.
    """
    (last,) = deque(steps(model, target, calibration=calibration, shapes=shapes, prune=prune, quant=quant, host=host, progress=progress), maxlen=1)
    assert isinstance(last.value, Package)
    return last.value


def steps(
    model: str | Path | onnx.ModelProto,
    target: str | Path | Target = "edge",
    *,
    calibration: str | Path | Feeds | None = None,
    shapes: Shapes | None = None,
    prune: str | PruneOptions | None = None,
    quant: str | QuantizeOptions | None = None,
    host: bool = True,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """The stages of `compile`, one Step each; the last one holds the Package."""
    from npucc import frontend, lowering, passes
    from npucc.quantize import quantize

    if quant == FLOAT_MODE:
        yield from _float_steps(model, load_target(target), calibration, shapes or {}, host=host)
        return
    options, pruning = quantize_options(quant), prune_options(prune)
    if pruning and calibration is None:
        raise PruneError("pruning needs calibration data", hint="give --calibration DATA (calibration= in Python): some hundred typical inputs")
    chip = load_target(target)
    report = progress or _no_progress

    report("import", 0, 1)
    feeds, shapes = bind_shapes(model, calibration, shapes or {})
    graph = frontend.import_model(model, shapes=shapes, host=True)
    refuse_host(graph, host=host)
    imported = graph if feeds is None else None
    yield Step("import", graph)

    refused: tuple[Refused, ...] = ()
    for index, stage in enumerate(passes.STAGES):
        report(stage.name, index, len(passes.STAGES))
        graph, refusals = stage.run(graph)
        here = tuple(Refused(stage.name, str(refusal)) for refusal in refusals)
        refused += here
        yield Step(stage.name, graph, here)

    pruned: PruneReport | None = None
    dense = graph if pruning else None
    if pruning and any(graph.tensors[name].given for node in graph if OPS[node.op].matrix for name in node.inputs if name):
        raise PruneError("the model is quantized already", hint="prune the float model; npucc quantizes what is left")
    if pruning and feeds is not None:
        feeds = _repeatable(feeds, max(pruning.samples, options.samples))
        graph, pruned = _pruned(graph, feeds, chip, pruning, options, progress)
    yield Step("prune", graph)

    quantized = quantize(graph, feeds, options=options, target=chip, imported=imported, dense=dense, progress=progress)
    yield Step("quantize", quantized.graph)

    report("lower", 0, 1)
    lowered = lowering.lower(quantized.graph, chip, progress=progress)
    yield Step("lower", lowered.program)

    report("check", 0, 1)
    check_program(lowered.program)
    source = SYNTHETIC if quantized.synthetic else FROM_DATA if quantized.report.samples else FROM_MODEL
    refused += tuple(Refused("quantize", reason) for reason in quantized.report.quantized_anew)
    package = Package.create(
        lowered.program, lowered.constants, graph=quantized.graph, calibration=source, refused=refused, pruned=pruned,
        quantized=quantized.report,
    )  # fmt: skip
    yield Step("check", package)


def _float_steps(
    model: str | Path | onnx.ModelProto, chip: Target, calibration: str | Path | Feeds | None, shapes: Shapes, *, host: bool
) -> Iterator[Step]:
    """The stages in float mode: there is nothing to rewrite or quantize."""
    from npucc import frontend, lowering

    feeds, shapes = bind_shapes(model, calibration, shapes)
    graph = frontend.import_whole(model, shapes=shapes, sample=next(iter(feeds), None) if feeds is not None else None)
    refuse_host(graph, host=host)
    yield from (Step(stage.name, graph) for stage in stages()[:-2])
    lowered = lowering.lower(graph, chip)
    yield Step("lower", lowered.program)
    check_program(lowered.program)
    yield Step("check", Package.create(lowered.program, lowered.constants, graph=graph, calibration=FROM_DATA))


def refuse_host(graph: Graph, *, host: bool) -> None:
    """Raise CompileError for the first node that needs the host, when there is none."""
    from npucc.segments import attributes_of, host_nodes

    needed = [entry for node in host_nodes(graph) for entry in attributes_of(node).nodes]
    if needed and not host:
        name, operator, reason = needed[0]
        others = f" ({len(needed) - 1} more nodes too)" if needed[1:] else ""
        raise CompileError(
            f"{operator} needs the host: {reason}{others}", node=name, hint="leave out --no-host (host=False in Python), or change the model"
        )


def float_graph(model: str | Path | onnx.ModelProto, shapes: Shapes) -> Graph:
    """The graph that `quantize` gets: the float model after all passes. Raises ImportModelError."""
    before = [stage.name for stage in stages()].index("prune")
    (last,) = deque(itertools.islice(steps(model, shapes=shapes), before), maxlen=1)
    assert isinstance(last.value, Graph)
    return last.value


def prune_options(spec: str | PruneOptions | None) -> PruneOptions | None:
    """`channels=30%`, `2:4`, … as PruneOptions; None for no pruning. Raises PruneError."""
    from npucc.prune import PruneOptions

    return PruneOptions.parse(spec) if isinstance(spec, str) else spec


def _pruned(
    graph: Graph, feeds: Feeds, chip: Target, options: PruneOptions, quant: QuantizeOptions, progress: Progress | None
) -> tuple[Graph, PruneReport]:
    from npucc.prune import prune

    result = prune(graph, feeds, target=chip, options=options, quant=quant, progress=progress)
    return result.graph, result.report


def _repeatable(feeds: Feeds, most: int) -> Feeds:
    """Feeds that can be gone through twice; of an iterator the first `most` are kept."""
    return list(itertools.islice(feeds, most)) if iter(feeds) is feeds else feeds


def quantize_options(spec: str | QuantizeOptions | None) -> QuantizeOptions:
    """`key=value,key=value` as QuantizeOptions, whose fields are the keys. Raises QuantizeError."""
    from npucc.quantize import QuantizeOptions

    if spec is None:
        return QuantizeOptions()
    return QuantizeOptions.parse(spec) if isinstance(spec, str) else spec


def bind_shapes(
    model: str | Path | onnx.ModelProto, calibration: str | Path | Feeds | None, shapes: Shapes
) -> tuple[Feeds | None, dict[str, tuple[int, ...]]]:
    """(feeds, shapes): sizes that the model leaves open and `shapes` does not give are those of the first feed."""
    bound = {name: tuple(shape) for name, shape in shapes.items()}
    if calibration is None:
        return None, bound
    declared = ports_of_model(model)
    if isinstance(calibration, str | Path):
        ports = [Port(name, bound.get(name, port.shape), port.dtype) for name, port in declared.items() if port is not None]
        dataset = open_dataset(calibration, ports)
        return dataset, _completed(bound, dataset.shapes, declared)
    feeds, first = _peek(calibration)
    return feeds, _completed(bound, first, declared)


def _completed(bound: Shapes, first: Shapes, declared: Mapping[str, Port | None]) -> dict[str, tuple[int, ...]]:
    """`bound`, and the shapes of the first feed for inputs whose sizes are still open."""
    still_open = {name for name, port in declared.items() if port is None or None in port.shape}
    return {**{name: shape for name, shape in first.items() if name in still_open}, **bound}


def _peek(feeds: Feeds) -> tuple[Feeds, dict[str, tuple[int, ...]]]:
    """The feeds, still whole, and the shapes in the first of them."""
    iterator = iter(feeds)
    first = next(iterator, None)
    if first is None:
        raise QuantizeError("the calibration data holds no feed", hint="give at least one {input name: array}, better some dozens")
    whole = itertools.chain([first], iterator) if iterator is feeds else feeds
    return whole, {name: np.shape(value) for name, value in first.items()}


def _no_progress(what: str, done: int, total: int) -> None:  # noqa: ARG001  the shape of a Progress
    return None
