"""What pruning costs and saves: float → dense INT8 → pruned INT8, one line per method and amount, as a Markdown table and a plot.

    python -m tests.benchmarks.pruning FOLDER --task NAME [NAME …] [--spec 2:4 channels=30%] [--target edge sparse-2to4] [--samples 512] [--limit N]
    python -m tests.benchmarks.pruning [MODEL.onnx DATA.npz CALIBRATION.npz] [--curve channels block --svg curve.svg]

Networks and data are those of `tests.benchmarks.accuracy`; without arguments the bundled ones. All of the calibration samples (at most
`--samples`) are what pruning and quantization see; what is measured here decides nothing. Each SPEC also comes as plain magnitude pruning
without repair, unless `--alone`.

The one big idea: every line goes the same way: the pruned float graph and its INT8 form run in onnxruntime (INT8 as QDQ, which agrees with the
machine), and the program of each target tells its cycles. Constants and energy are those of the last target. Agreement and signal-to-noise
ratio compare an output with the dense float network's.

`--curve KEY` takes eight amounts of it, 10 % to 80 %; `--curve layers` gives 2:4 to as many layers as eight amounts of `drop=` allow. `--svg
FILE` draws the metric of all INT8 lines against the cycles on the last target, one panel per network (needs `pip install .[bench]`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isa.target import load_target
from npucc import demo
from npucc.compiler import float_graph
from npucc.evaluate import compare
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.lowering import lower
from npucc.operations import node_macs
from npucc.prune import PruneOptions, prune
from npucc.quantize import quantize
from runtime.report import make_report
from runtime.timing import simulate
from tests.benchmarks.accuracy import Run, Task, in_onnxruntime, single_task, tasks_of

Array = np.ndarray[Any, np.dtype[Any]]

SPECS = ("channels=20%", "channels=30%", "channels=45%", "cycles=0.75", "2:4", "block=50%", "unstructured=60%")
PLAIN = ",criterion=magnitude,repair=no,arrange=no"
DENSE = "–"
CURVES = {
    **{key: tuple(f"{key}={amount}%" for amount in range(10, 90, 10)) for key in ("channels", "block", "unstructured")},
    "layers": tuple(f"2:4,drop={points}" for points in (0.25, 0.5, 1, 2, 4, 8, 16, 32)),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line: metric, agreement and decibels of the INT8 form; `cycles` per target."""

    spec: str
    floats: float
    metric: float
    agreement: float | None
    decibels: float
    macs: int
    cycles: Mapping[str, int]
    constants: int
    energy: float
    seconds: float


@dataclass(slots=True)
class Beside:
    """A network's outputs beside the dense float network's, sample by sample, which come in the same order each time."""

    run: Run
    output: int
    exact: Sequence[Array]
    decibels: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def __call__(self, feed: Mapping[str, Array]) -> list[Array]:
        found = self.run(feed)
        (error,) = compare({"y": found[self.output]}, {"y": self.exact[len(self.decibels)]})
        self.decibels.append(error.sqnr_db)
        self.agreements += [] if error.top1_agreement is None else [error.top1_agreement]
        return found


def runner(graph: Graph) -> Run:
    """The graph, float or integer, in onnxruntime."""
    return in_onnxruntime(to_onnx(graph).SerializeToString())


def measure(task: Task, specs: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    """The lines of one network, the dense one first."""
    graph, feeds = float_graph(task.model, task.shapes), list(task.calibration(args.samples))
    output = int(dict(pair.split("=") for pair in args.output).get(task.name, 0))
    dense, exact = runner(graph), list[Array]()

    def first(feed: Mapping[str, Array]) -> list[Array]:
        found = dense(feed)
        exact.append(found[output])
        return found

    whole = task.evaluate(first, args.limit)
    for spec in (DENSE, *specs):
        start = time.monotonic()
        target = load_target(args.target[-1])
        pruned = graph if spec == DENSE else prune(graph, feeds, target=target, options=PruneOptions.parse(spec)).graph
        seconds = time.monotonic() - start
        integer = quantize(pruned, feeds, dense=graph).graph
        beside = Beside(runner(integer), output, exact)
        floats = whole if spec == DENSE else task.evaluate(runner(pruned), args.limit)
        metric, agreements = task.evaluate(beside, args.limit), beside.agreements
        cycles = {}
        for name in args.target:
            lowered = lower(integer, load_target(name))
            report = make_report(lowered.program, simulate(lowered.program, lowered.constants))
            cycles[name] = report.cycles
        yield Row(
            spec, floats or 0.0, metric or 0.0, float(np.mean(agreements)) if agreements else None, float(np.mean(beside.decibels)),
            sum(node_macs(pruned, node) for node in pruned), cycles, len(lowered.constants), report.energy_pj, seconds,
        )  # fmt: skip


def line(row: Row, dense: Row) -> str:
    """A line of the table, shares of the dense network in brackets."""
    counts = [
        f"{now:,} ({now / was - 1:+.0%})" for now, was in zip((row.macs, *row.cycles.values()), (dense.macs, *dense.cycles.values()), strict=True)
    ]
    agreement = DENSE if row.agreement is None else f"{row.agreement:.3f}"
    accuracy = (f"{row.floats:.4f}", f"{row.metric:.4f}", agreement, f"{row.decibels:.1f} dB")
    spec = row.spec.replace(PLAIN, ", magnitude, no repair")
    return "| " + " | ".join((spec, *accuracy, *counts, f"{row.constants:,}", f"{row.energy / 1e6:.2f} µJ", f"{row.seconds:.0f} s")) + " |"


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Metric against cycles, one panel per network, one line per method, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "npucc"  # the same bytes every time
    figure = Figure(figsize=(6 * len(tables), 4.5), layout="constrained")
    for axes, (network, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        target = list(rows[0].cycles)[-1]
        for method in dict.fromkeys(method_of(row) for row in rows[1:]):
            points = sorted((row.cycles[target], row.metric) for row in rows[1:] if method_of(row) == method)
            axes.plot(*zip((rows[0].cycles[target], rows[0].metric), *points[::-1], strict=True), marker="o", label=method)
        axes.set(title=network, xlabel=f"cycles on {target}", ylabel="INT8 metric")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def method_of(row: Row) -> str:
    """What a line is about, its amount left out."""
    method, plain, _ = row.spec.partition(PLAIN)
    return ("2:4, layers by sensitivity" if "drop" in method else method.partition("=")[0]) + (", magnitude, no repair" if plain else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo.MODEL, metavar="FOLDER|MODEL.onnx")
    parser.add_argument("data", type=Path, nargs="?", default=demo.SAMPLES)
    parser.add_argument("calibration", type=Path, nargs="?", default=demo.CALIBRATION)
    parser.add_argument("--task", nargs="+", default=[], help="these tasks of the folder")
    parser.add_argument("--output", nargs="+", default=[], metavar="NAME=INDEX", help="of which output agreement and SQNR are")
    parser.add_argument("--target", nargs="+", default=["edge"], help="whose cycles; pruning aims at the last one")
    parser.add_argument("--spec", nargs="+", default=[], help=f"what --prune takes; default: {', '.join(SPECS)}")
    parser.add_argument("--curve", nargs="+", default=[], choices=CURVES)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--alone", action="store_true", help="without the lines of plain magnitude")
    parser.add_argument("--samples", type=int, default=512, help="to prune and calibrate with, at most")
    parser.add_argument("--limit", type=int, help="evaluate on at most so many samples")
    args = parser.parse_args()
    amounts = [*args.spec, *(spec for key in args.curve for spec in CURVES[key])] or SPECS
    specs = [spec + extra for spec in amounts for extra in ("", *([] if args.alone or "drop" in spec else [PLAIN]))]
    everything = tasks_of(args.model) if args.model.is_dir() else iter([single_task(args.model, args.data, args.calibration)])
    tasks, tables = {task.name: task for task in everything}, dict[str, list[Row]]()
    for name in args.task or tasks:
        rows = tables.setdefault(name, [])
        headers = (name, "float", "INT8", "agreement", "SQNR", "MACs", *(f"cycles on {each}" for each in args.target), "constants", "energy", "prune")
        print("| " + " | ".join(headers) + " |", "|" + "---|" * len(headers), sep="\n")
        for row in measure(tasks[name], specs, args):
            rows.append(row)
            print(line(row, rows[0]), flush=True)
    if args.svg:
        draw(tables, args.svg)


if __name__ == "__main__":
    main()
