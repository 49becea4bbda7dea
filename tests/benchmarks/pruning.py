"""What pruning costs and saves: accuracy, multiply-accumulates, cycles, bytes and energy, one line per method and amount.

    python -m tests.benchmarks.pruning [--network NAME MODEL.onnx CALIBRATION DATA …] [--shape x=1,3,224,224] [--target edge]
                                       [--spec channels=30% --spec 2:4 …] [--curve channels --svg curve.svg] [--limit 500] [--json]

The one big idea: every line is the same street, compiled and measured alike: the float graph, dense INT8, then for each SPEC the pruned
float graph and its INT8 form. Without --network: the bundled network and its data. Accuracy is that of the graph in onnxruntime (INT8 as
QDQ, which agrees with the machine); without labels it is the agreement with the float network. Cycles and energy are those of the program.

`--curve KEY` (channels, block, unstructured) takes eight amounts of it, 10 % to 80 %, each with the whole method and as plain magnitude
without repair; `--svg FILE` draws the accuracy of all INT8 lines against their cycles, one panel per network (needs `pip install .[bench]`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from isa.target import Target, load_target
from npucc import demo
from npucc.compiler import bind_shapes, float_graph
from npucc.evaluate import ErrorSum, score_rows
from npucc.export import to_onnx
from npucc.feeds import Port, Sample, open_dataset
from npucc.graph import Graph
from npucc.lowering import lower
from npucc.operations import node_macs
from npucc.prune import PruneOptions, prune
from npucc.quantize import quantize
from runtime.report import make_report
from runtime.timing import simulate

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = dict[str, Array]
Row = dict[str, Any]

#: each amount with the whole method, and as plain magnitude without repair
SPECS = ("channels=20%", "channels=30%", "channels=45%", "cycles=0.75", "2:4", "block=50%", "unstructured=60%")
PLAIN = ",criterion=magnitude,repair=no"
AMOUNTS = tuple(range(10, 90, 10))  # of a curve, in per cent
HEADER = f"{'':42s} float   INT8     agree    SQNR {'MACs':>21s} {'cycles':>21s} {'constants':>12s} {'energy':>11s}   time"


def runner(graph: Graph) -> Callable[[Mapping[str, Array]], Outputs]:
    """The graph, float or integer, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def score(graph: Graph, samples: Sequence[Sample], wanted: Sequence[Outputs]) -> tuple[float, float, float]:
    """(share of rows whose largest score is the label, the same for the float network's choice, mean SQNR over the outputs in dB)."""
    run, right, same, rows = runner(graph), 0, 0, 0
    sums: dict[str, ErrorSum] = {}
    for sample, exact in zip(samples, wanted, strict=True):
        found = run(sample.feed)
        for name, value in exact.items():
            sums.setdefault(name, ErrorSum()).add(found[name], value)
        scores, dense = score_rows(next(iter(found.values()))), score_rows(next(iter(exact.values())))
        if scores is not None and dense is not None:
            choice = dense.argmax(axis=1)
            labels = choice if sample.labels is None else np.asarray(sample.labels).reshape(-1)
            right, same = right + int((scores.argmax(axis=1) == labels).sum()), same + int((scores.argmax(axis=1) == choice).sum())
            rows += len(scores)
    return right / max(rows, 1), same / max(rows, 1), float(np.mean([each.sqnr_db for each in sums.values()]))


def measure(graph: Graph, feeds: Sequence[Mapping[str, Array]], samples: Sequence[Sample], target: Target, specs: Sequence[str]) -> Iterator[Row]:
    """One record per line of the table."""
    dense = runner(graph)
    wanted = [dense(sample.feed) for sample in samples]
    for spec in (None, *specs):
        start = time.monotonic()
        pruned = graph if spec is None else prune(graph, feeds, target=target, options=PruneOptions.parse(spec)).graph
        seconds = time.monotonic() - start
        integer = quantize(pruned, feeds).graph
        lowered = lower(integer, target)
        (real, _, real_db), (whole, same, whole_db) = (score(each, samples, wanted) for each in (pruned, integer))
        timed = make_report(lowered.program, simulate(lowered.program, lowered.constants))
        yield {
            "prune": spec or "dense", "float_accuracy": real, "float_sqnr_db": real_db, "int8_accuracy": whole, "int8_agreement": same,
            "int8_sqnr_db": whole_db, "macs": sum(node_macs(pruned, node) for node in pruned), "cycles": timed.cycles,
            "constants_bytes": len(lowered.constants), "energy_pj": timed.energy_pj, "seconds": seconds,
        }  # fmt: skip


def line(row: Row, dense: Row) -> str:
    """One record for a reader, shares of the dense network in brackets."""
    shares = "  ".join(f"{row[key]:>12,} ({row[key] / dense[key] - 1:+6.1%})" for key in ("macs", "cycles"))
    accuracy = f"{row['float_accuracy']:.4f} {row['int8_accuracy']:.4f}  {row['int8_agreement']:.4f}  {row['int8_sqnr_db']:5.1f} dB"
    cost = f"{row['constants_bytes']:>10,} B {row['energy_pj'] / 1e6:8.2f} µJ {row['seconds']:5.1f} s"
    return f"{row['prune']:40s} {accuracy}  {shares}  {cost}"


def draw(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Accuracy against cycles, one panel per network, one line per method, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "npucc"  # the same bytes every time
    figure = Figure(figsize=(6 * len(tables), 4.5), layout="constrained")
    for axes, (network, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for method in dict.fromkeys(method_of(row) for row in rows[1:]):
            points = sorted((row["cycles"], row["int8_accuracy"]) for row in rows[1:] if method_of(row) == method)
            axes.plot(*zip((rows[0]["cycles"], rows[0]["int8_accuracy"]), *points[::-1], strict=True), marker="o", label=method)
        axes.set(title=network, xlabel="cycles", ylabel="INT8 accuracy")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def method_of(row: Row) -> str:
    """What a line is about, its amount left out."""
    method, plain, _ = row["prune"].partition(PLAIN)
    return method.partition("=")[0] + (", magnitude, no repair" if plain else "")


def _shape(argument: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = argument.partition("=")
    return name, tuple(int(size) for size in sizes.split(","))


def _table(paths: Sequence[str | Path], arguments: argparse.Namespace, specs: Sequence[str]) -> list[Row]:
    model, calibration, data = map(Path, paths)
    feeds, shapes = bind_shapes(model, calibration, dict(arguments.shape))
    graph = float_graph(model, shapes)
    ports = [Port(name, graph.tensors[name].shape, graph.tensors[name].dtype) for name in graph.inputs]
    samples = list(open_dataset(data, ports, limit=arguments.limit).samples())
    rows: list[Row] = []
    for row in measure(graph, list(feeds or ()), samples, load_target(arguments.target), specs):
        rows.append(row)
        if not arguments.json:
            print(line(row, rows[0]), flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs=4, action="append", metavar=("NAME", "MODEL", "CALIBRATION", "DATA"))
    parser.add_argument("--shape", action="append", type=_shape, default=[], metavar="NAME=1,3,224,224")
    parser.add_argument("--target", default="edge")
    parser.add_argument("--spec", action="append", default=[], help=f"what --prune takes; default: {', '.join(SPECS)}")
    parser.add_argument("--curve", action="append", default=[], choices=("channels", "block", "unstructured"))
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="evaluate so many samples")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    amounts = [*arguments.spec, *(f"{key}={amount}%" for key in arguments.curve for amount in AMOUNTS)] or SPECS
    specs = [spec + extra for spec in amounts for extra in ("", PLAIN)]
    tables: dict[str, list[Row]] = {}
    for name, *paths in arguments.network or [("bundled", demo.MODEL, demo.CALIBRATION, demo.SAMPLES)]:
        if not arguments.json:
            print(f"{name} on {arguments.target}\n{HEADER}")
        tables[str(name)] = _table(paths, arguments, specs)
    if arguments.json:
        print(json.dumps(tables, indent=2))
    if arguments.svg:
        draw(tables, arguments.svg)


if __name__ == "__main__":
    main()
