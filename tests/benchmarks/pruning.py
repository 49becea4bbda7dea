"""What pruning costs and saves: accuracy, multiply-accumulates, cycles, one line per method and amount.

    python -m tests.benchmarks.pruning [MODEL.onnx --calibration DATA --data DATA] [--shape x=1,3,224,224] [--target edge]
                                       [--spec channels=30% --spec 2:4 …] [--limit 500] [--json]

The one big idea: every line is the same street, compiled and measured alike: the float graph, dense INT8, then for each SPEC the pruned
float graph and its INT8 form. Without arguments: the bundled network and its data. Accuracy is that of the graph in onnxruntime (INT8 as
QDQ, which agrees with the machine); without labels it is the agreement with the float network. Cycles are those of the program.
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
from runtime.timing import simulate

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = dict[str, Array]

#: each amount with the whole method, and as plain magnitude without repair
SPECS = ("channels=20%", "channels=30%", "channels=45%", "cycles=0.75", "2:4")
PLAIN = ",criterion=magnitude,repair=no"


def runner(graph: Graph) -> Callable[[Mapping[str, Array]], Outputs]:
    """The graph, float or integer, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def score(graph: Graph, samples: Sequence[Sample], wanted: Sequence[Outputs]) -> tuple[float, float]:
    """(share of rows whose largest score is the label, or the float network's, mean SQNR over the outputs in dB)."""
    run, right, rows = runner(graph), 0, 0
    sums: dict[str, ErrorSum] = {}
    for sample, exact in zip(samples, wanted, strict=True):
        found = run(sample.feed)
        for name, value in exact.items():
            sums.setdefault(name, ErrorSum()).add(found[name], value)
        scores, dense = score_rows(next(iter(found.values()))), score_rows(next(iter(exact.values())))
        if scores is not None and dense is not None:
            labels = dense.argmax(axis=1) if sample.labels is None else np.asarray(sample.labels).reshape(-1)
            right, rows = right + int((scores.argmax(axis=1) == labels).sum()), rows + len(scores)
    return right / max(rows, 1), float(np.mean([each.sqnr_db for each in sums.values()]))


def measure(
    graph: Graph, feeds: Sequence[Mapping[str, Array]], samples: Sequence[Sample], target: Target, specs: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One record per line of the table."""
    dense = runner(graph)
    wanted = [dense(sample.feed) for sample in samples]
    for spec in (None, *specs):
        start = time.monotonic()
        pruned = graph if spec is None else prune(graph, feeds, target=target, options=PruneOptions.parse(spec)).graph
        seconds = time.monotonic() - start
        integer = quantize(pruned, feeds).graph
        lowered = lower(integer, target)
        (real, real_db), (whole, whole_db) = (score(each, samples, wanted) for each in (pruned, integer))
        yield {
            "prune": spec or "dense",
            "float_accuracy": real,
            "float_sqnr_db": real_db,
            "int8_accuracy": whole,
            "int8_sqnr_db": whole_db,
            "macs": sum(node_macs(pruned, node) for node in pruned),
            "cycles": simulate(lowered.program, lowered.constants).total_cycles,
            "constants_bytes": len(lowered.constants),
            "seconds": seconds,
        }


def line(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """One record for a reader, shares of the dense network in brackets."""
    shares = "  ".join(f"{row[key]:>12,} ({row[key] / dense[key] - 1:+6.1%})" for key in ("macs", "cycles"))
    accuracy = f"{row['float_accuracy']:.4f} {row['int8_accuracy']:.4f}  {row['int8_sqnr_db']:6.1f} dB"
    return f"{row['prune']:44s} {accuracy}  {shares}  {row['constants_bytes']:>10,} B  {row['seconds']:5.1f} s"


def _shape(argument: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = argument.partition("=")
    return name, tuple(int(size) for size in sizes.split(","))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=demo.MODEL)
    parser.add_argument("--calibration", type=Path, default=demo.CALIBRATION, metavar="DATA")
    parser.add_argument("--data", type=Path, default=demo.SAMPLES, metavar="DATA")
    parser.add_argument("--shape", action="append", type=_shape, default=[], metavar="NAME=1,3,224,224")
    parser.add_argument("--target", default="edge")
    parser.add_argument("--spec", action="append", help=f"what --prune takes; default: {', '.join(SPECS)}, each also by magnitude without repair")
    parser.add_argument("--limit", type=int, default=500, help="evaluate so many samples")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    feeds, shapes = bind_shapes(arguments.model, arguments.calibration, dict(arguments.shape))
    graph = float_graph(arguments.model, shapes)
    ports = [Port(name, graph.tensors[name].shape, graph.tensors[name].dtype) for name in graph.inputs]
    samples = list(open_dataset(arguments.data, ports, limit=arguments.limit).samples())
    specs = arguments.spec or [spec + extra for spec in SPECS for extra in ("", PLAIN)]
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(f"{'':44s}  float   INT8     SQNR      {'MACs':>14s}  {'cycles':>20s}  {'constants':>20s}    time")
    for row in measure(graph, list(feeds or ()), samples, load_target(arguments.target), specs):
        rows.append(row)
        if not arguments.json:
            print(line(row, rows[0]), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
