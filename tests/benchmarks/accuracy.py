"""The integer networks against the float ones: a table of a whole folder of tasks, or of one model under several options.

    python -m tests.benchmarks.accuracy FOLDER [--task NAME …] [--quant auto int8] [--samples 48] [--limit N] [--target edge cube]
    python -m tests.benchmarks.accuracy [MODEL.onnx DATA.npz CALIBRATION.npz]

FOLDER holds a module `zoo.py` with `TASKS`: name → task, which has `path()` of its ONNX model, `shapes()`, `calib(n)` feeds, `metric`, and
`evaluate(run, limit) -> {metric: value}` where `run(feeds)` gives the outputs in order. DATA holds an array per model input with a leading
sample axis, and `labels` if there is an accuracy to measure. Without arguments: the bundled network.

The table is Markdown. Agreement (share of rows with the same largest entry; "–" where rows are no scores) and signal-to-noise ratio (mean
over the samples of decibels) compare an output with the float model's: the first, or that which `--output NAME=INDEX` says for a task. The last
column counts the values, of all outputs of a few samples, that are not those of onnxruntime on the exported model.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import npucc
from isa.target import Target, load_target
from npucc import demo
from npucc.evaluate import compare
from npucc.feeds import Port, open_dataset
from npucc.lowering import lower
from npucc.signature import ports_of_model
from runtime.timing import simulate

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Array]], list[Array]]

HEADERS = ("network", "n", "metric", "float", "NPU", "agreement", "SQNR", "cycles, {}", "for 16 bits", "compile", "other than onnxruntime's")
CHECKED = 4  # samples whose outputs are compared with onnxruntime's on the exported model


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the table. `evaluate` runs a network over the samples and gives its metric."""

    name: str
    model: Path
    calibration: Callable[[int], Any]
    shapes: Mapping[str, tuple[int, ...]]
    metric: str
    evaluate: Callable[[Run, int | None], float | None]


@dataclass(slots=True)
class Comparison:
    """An output of the NPU beside the float model's, sample by sample."""

    package: npucc.Package
    original: Run
    output: int
    exported: Run
    decibels: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    others: int = 0

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """The NPU's outputs; on the way the error is noted."""
        found, wanted = list(self.package.run(feed).outputs.values()), self.original(feed)
        if len(self.decibels) < CHECKED:
            self.others += sum(int(np.count_nonzero(np.asarray(each) != have)) for each, have in zip(self.exported(feed), found, strict=True))
        (error,) = compare({"y": found[self.output]}, {"y": np.asarray(wanted[self.output])})
        self.decibels.append(error.sqnr_db)
        self.agreements += [] if error.top1_agreement is None else [error.top1_agreement]
        return found


def in_onnxruntime(model: str | bytes) -> Run:
    """A model on one thread, exact if it is in integers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, dict(feed))


def tasks_of(folder: Path) -> Iterator[Task]:
    """The tasks of a folder's `zoo.py`."""
    spec = importlib.util.spec_from_file_location("zoo", folder / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    for name, task in module.TASKS.items():

        def evaluate(run: Run, limit: int | None, task: Any = task) -> float:
            return float(task.evaluate(run, limit)[task.metric])

        yield Task(name, Path(task.path()), task.calib, task.shapes() or {}, task.metric, evaluate)


def single_task(model: Path, data: Path, calibration: Path) -> Task:
    """One model with its own data."""
    ports = [port for port in ports_of_model(model).values() if isinstance(port, Port)]

    def evaluate(run: Run, limit: int | None) -> float | None:
        hits: list[Array] = []
        for sample in islice(open_dataset(data, ports).samples(), limit):
            scores = np.asarray(run(sample.feed)[0])
            if sample.labels is not None:
                hits.append(scores.reshape(-1, scores.shape[-1]).argmax(axis=1) == np.asarray(sample.labels).reshape(-1))
        return float(np.concatenate(hits).mean()) if hits else None

    return Task(model.stem, model, lambda count: list(islice(open_dataset(calibration, ports), count)), {}, "top-1", evaluate)


def row(task: Task, quant: str, args: argparse.Namespace) -> Sequence[str]:
    """One line: both networks on the same samples."""
    start = time.perf_counter()
    feeds = list(task.calibration(args.samples))
    package = npucc.compile(task.model, args.target[0], calibration=feeds, shapes=task.shapes, quant=quant)
    seconds = time.perf_counter() - start
    floats = in_onnxruntime(str(task.model))
    outputs = dict(pair.split("=") for pair in args.output)
    comparison = Comparison(package, floats, int(outputs.get(task.name, 0)), in_onnxruntime(package.to_onnx().SerializeToString()))
    found, wanted = task.evaluate(comparison.run, args.limit), task.evaluate(floats, args.limit)
    mixed = (package.quantized or {}).get("mixed", {})
    cycles = [package.report.cycles, *(cycles_on(package, load_target(name)) for name in args.target[1:])]
    return (
        task.name if len(args.quant) == 1 else f"{task.name}, {quant}", f"{len(comparison.decibels):,}", task.metric, _figure(wanted), _figure(found),
        f"{np.mean(comparison.agreements):.3f}" if comparison.agreements else "–", f"{np.mean(comparison.decibels):.1f} dB",
        *(f"{count:,}" for count in cycles), f"{mixed.get('price', 0):+.1f} %", f"{seconds:.0f} s", f"{comparison.others}",
    )  # fmt: skip


def cycles_on(package: npucc.Package, target: Target) -> int:
    """Of the same integers on another target."""
    lowered = lower(package.graph, target)
    return simulate(lowered.program, lowered.constants).total_cycles


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo.MODEL, metavar="FOLDER|MODEL.onnx")
    parser.add_argument("data", type=Path, nargs="?", default=demo.SAMPLES)
    parser.add_argument("calibration", type=Path, nargs="?", default=demo.CALIBRATION)
    parser.add_argument("--task", nargs="+", default=[], help="only these tasks of the folder")
    parser.add_argument("--output", nargs="+", default=[], metavar="NAME=INDEX", help="of which output agreement and SQNR are")
    parser.add_argument("--quant", nargs="+", default=["auto"])
    parser.add_argument("--samples", type=int, default=48, help="to calibrate with")
    parser.add_argument("--limit", type=int, help="evaluate on at most so many samples of a task")
    parser.add_argument("--target", nargs="+", default=["edge"], help="whose cycles are told; the values are the same on all")
    args = parser.parse_args()
    tasks = tasks_of(args.model) if args.model.is_dir() else iter([single_task(args.model, args.data, args.calibration)])
    headers = [text for header in HEADERS for text in ([header.format(name) for name in args.target] if "{}" in header else [header])]
    print("| " + " | ".join(headers) + " |", "|" + "---|" * len(headers), sep="\n")
    for task in tasks:
        if not args.task or task.name in args.task:
            for quant in args.quant:
                print("| " + " | ".join(row(task, quant, args)) + " |", flush=True)


if __name__ == "__main__":
    main()
