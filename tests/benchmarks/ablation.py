"""What each technique of the quantizer earns: alone (added to min/max with scales per channel) and removed (from all), in dB of the outputs' SQNR.

    python -m tests.benchmarks.ablation --zoo FOLDER TASK [TASK …] [--calibration 48] [--samples 40]
    python -m tests.benchmarks.ablation resnet mobilenet

FOLDER has a `zoo.py` whose TASKS[name] give `path()`, `shapes()`, `calib(n)` and `evaluate(run, limit)`. Without it the names are small networks
with the statistics of trained ones (`trained_like.py`). The samples measured on are not those calibrated with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from npucc import compiler
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.quantize import QuantizeOptions, quantize
from tests.benchmarks import trained_like

Array = np.ndarray[Any, np.dtype[Any]]
Feed = Mapping[str, Array]

#: technique → (option with it, without it)
TECHNIQUES = {
    "least-error ranges": ("method=mse", "method=minmax"),
    "scales per channel": ("per_tensor=no", "per_tensor=yes"),
    "equalization": ("equalize=yes", "equalize=no"),
    "second-order rounding": ("rounding=second_order", "rounding=nearest"),
    "biases from channel means": ("bias_correction=yes", "bias_correction=no"),
    "biases from integer runs": ("bias_samples=32", "bias_samples=0"),
    "16 bits by measurement": ("scheme=auto", "scheme=int8"),
}
BASIC = ("scales per channel",)  # "none" has it too: others build on it, and every tool has it
NOT_BY_DEFAULT = ("16 bits by measurement",)  # "all" is without it: it has a price in cycles


@dataclass(frozen=True, slots=True)
class Case:
    """A float graph with samples to calibrate and others to measure with, and its outputs for those."""

    graph: Graph
    calibration: Sequence[Feed]
    unseen: Sequence[Feed]
    wanted: Sequence[Sequence[Array]]

    def decibels(self, options: str) -> float:
        """Signal to noise of the quantized graph, mean over outputs and samples, each at most 100."""
        integer = quantize(self.graph, self.calibration, options=QuantizeOptions.parse(options)).graph
        found = outputs(integer, self.unseen)
        return float(np.mean([ratio(exact, have) for pair in zip(self.wanted, found, strict=True) for exact, have in zip(*pair, strict=True)]))


def outputs(graph: Graph, feeds: Iterable[Feed]) -> list[list[Array]]:
    """The graph's outputs in onnxruntime, exact for integer graphs."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return [session.run(list(graph.outputs), dict(feed)) for feed in feeds]


def ratio(exact: Array, have: Array) -> float:
    signal, noise = float(np.square(exact, dtype=np.float64).sum()), float(np.square(exact.astype(np.float64) - have).sum())
    return min(10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30))), 100.0)


def make_case(graph: Graph, calibration: Sequence[Feed], unseen: Sequence[Feed]) -> Case:
    return Case(graph, calibration, unseen, outputs(graph, unseen))


def built(name: str, samples: int) -> Case:
    """A small network with the statistics of a trained one."""
    model = trained_like.resnet((1, 2), 16, size=48, classes=20) if name == "resnet" else trained_like.mobilenet(SMALL_MOBILENET, size=48, classes=20)
    return make_case(compiler.float_graph(model, {}), trained_like.images(32, 48, seed=100), trained_like.images(samples, 48, seed=200))


SMALL_MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2))


class _EnoughError(Exception):
    """Stops an evaluation that was only started for its samples."""


def from_zoo(task: Any, calibration: int, samples: int) -> Case:
    """A task of a zoo; it is measured on the first samples of its own evaluation."""
    feeds = [dict(feed) for feed in task.calib(calibration)]
    _, shapes = compiler.bind_shapes(task.path(), feeds, task.shapes())
    graph = compiler.float_graph(task.path(), shapes)
    unseen: list[Feed] = []
    session = onnxruntime.InferenceSession(str(task.path()), providers=["CPUExecutionProvider"])

    def run(feed: Feed) -> list[Array]:
        if len(unseen) == samples:
            raise _EnoughError
        unseen.append({name: np.array(value) for name, value in feed.items()})
        return list(session.run(None, dict(feed)))

    with contextlib.suppress(_EnoughError):
        task.evaluate(run, limit=samples)
    return make_case(graph, feeds, unseen)


def rows(case: Case) -> Iterable[str]:
    """One line per technique: what it gains alone, and what its removal costs."""
    plain = {name: with_it if name in BASIC else without for name, (with_it, without) in TECHNIQUES.items()}
    whole = {name: with_it if name not in NOT_BY_DEFAULT else without for name, (with_it, without) in TECHNIQUES.items()}
    least, most = (case.decibels(",".join(each.values())) for each in (plain, whole))
    yield f"  {'none of them':28} {least:7.1f} dB"
    yield f"  {'all of them':28} {most:7.1f} dB"
    for name, (with_it, without) in TECHNIQUES.items():
        other_way = case.decibels(",".join((plain | {name: without if name in BASIC else with_it}).values()))
        alone = least - other_way if name in BASIC else other_way - least
        change = case.decibels(",".join((whole | {name: with_it if name in NOT_BY_DEFAULT else without}).values())) - most
        kind = "added to all" if name in NOT_BY_DEFAULT else "removed"
        yield f"  {name:28} {alone:+7.1f} dB alone {change:+7.1f} dB {kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet", "mobilenet"])
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--calibration", type=int, default=48)
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    tasks: Mapping[str, Any] = {}
    if args.zoo:
        spec = importlib.util.spec_from_file_location("zoo", args.zoo / "zoo.py")
        assert spec, f"{args.zoo} has no zoo.py"
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tasks = module.TASKS
    for name in args.names:
        case = from_zoo(tasks[name], args.calibration, args.samples) if args.zoo else built(name, args.samples)
        print(name, flush=True)
        for row in rows(case):
            print(row, flush=True)


if __name__ == "__main__":
    main()
