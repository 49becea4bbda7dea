"""What each technique of the quantizer earns: alone (added to min/max with scales per channel) and removed (from all), in dB of the outputs' SQNR.

    python -m tests.benchmarks.ablation [NAME …] [--zoo FOLDER] [--calibration 48] [--samples 40]

FOLDER has a `zoo.py` whose TASKS[name] give `path()`, `shapes()`, `calib(n)` and `evaluate(run, limit)`. `resnet` and `mobilenet` are small networks
with the statistics of trained ones (`trained_like.py`). The samples measured on are not those calibrated with. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from npucc import compiler
from npucc.export import to_onnx
from npucc.graph import Graph
from npucc.quantize import QuantizeOptions, quantize
from tests.benchmarks import trained_like

Array = np.ndarray[Any, np.dtype[Any]]
Feed = Mapping[str, Array]
Options = Mapping[str, Any]

#: technique → (options with it, without it)
TECHNIQUES: Mapping[str, tuple[Options, Options]] = {
    "least-error ranges": ({"method": "mse"}, {"method": "minmax"}),
    "scales per channel": ({"per_tensor": False}, {"per_tensor": True}),
    "equalization": ({"equalize": True}, {"equalize": False}),
    "second-order rounding": ({"rounding": "second_order"}, {"rounding": "nearest"}),
    "biases from channel means": ({"bias_correction": True}, {"bias_correction": False}),
    "biases from integer runs": ({"bias_samples": 32}, {"bias_samples": 0}),
    "measured ranges, free 16 bits": ({"scheme": "auto", "method": "auto", "budget": 0.0}, {}),
    "16 bits by measurement": ({"scheme": "auto"}, {}),
}
BASIC = "scales per channel"  # "none" has it too: others build on it, and every tool has it
#: "all" is without: both need scheme=auto, which takes 16 bits where they cost no cycles, too
ADDED = ("measured ranges, free 16 bits", "16 bits by measurement")


@dataclass(frozen=True, slots=True)
class Case:
    """A float graph with samples to calibrate and others to measure with, and its outputs for those."""

    graph: Graph
    calibration: Sequence[Feed]
    unseen: Sequence[Feed]
    wanted: Sequence[Sequence[Array]]

    def decibels(self, options: Options) -> float:
        """Signal to noise of the quantized graph, mean over outputs and samples, each at most 100."""
        integer = quantize(self.graph, self.calibration, options=QuantizeOptions(**{"scheme": "int8"} | dict(options))).graph
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


BUILT: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "resnet": lambda: trained_like.resnet((1, 2), 16, size=48, classes=20),
    "mobilenet": lambda: trained_like.mobilenet(((1, 16, 1, 1), (6, 24, 2, 2)), size=48, classes=20),
}


def built(name: str, samples: int) -> Case:
    """A small network with the statistics of a trained one."""
    if name not in BUILT:
        raise SystemExit(f"there is no network {name!r}: choose one of {', '.join(BUILT)}, or a task of a zoo")
    model = BUILT[name]()
    return make_case(compiler.float_graph(model, {}), trained_like.images(32, 48, seed=100), trained_like.images(samples, 48, seed=200))


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


@dataclass(frozen=True, slots=True)
class Gains:
    """Decibels with none and with all techniques; per technique: added to none, and taken from all (or added to them, see `ADDED`)."""

    none: float
    all: float
    alone: Mapping[str, float]
    change: Mapping[str, float]


def measure(case: Case) -> Gains:
    def merged(used: Iterable[str]) -> dict[str, Any]:
        parts = [TECHNIQUES[name][0 if name in used else 1] for name in TECHNIQUES]
        return {key: value for part in parts for key, value in part.items()}

    plain, whole = {BASIC}, set(TECHNIQUES) - set(ADDED)
    none, everything = (case.decibels(merged(each)) for each in (plain, whole))
    alone = {name: case.decibels(merged(plain ^ {name})) - none for name in TECHNIQUES}
    change = {name: case.decibels(merged(whole ^ {name})) - everything for name in TECHNIQUES}
    return Gains(none, everything, alone | {BASIC: -alone[BASIC]}, change)


def table(gains: Mapping[str, Gains]) -> Iterator[str]:
    """Markdown lines: per network a column for what a technique gains alone and what its removal (or addition) changes."""
    yield f"| technique | {' | '.join(f'{name}: alone | removed' for name in gains)} |"
    yield "|---|" + "---|---|" * len(gains)
    yield f"| none; all | {' | '.join(f'{each.none:.1f} | {each.all:.1f}' for each in gains.values())} |"
    for name in TECHNIQUES:
        note = " (added)" if name in ADDED else ""
        yield f"| {name} | {' | '.join(f'{each.alone[name]:+.1f} | {each.change[name]:+.1f}{note}' for each in gains.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet", "mobilenet"])
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--calibration", type=int, default=48)
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    tasks = tasks_of(args.zoo) if args.zoo else {}
    cases = {name: from_zoo(tasks[name], args.calibration, args.samples) if name in tasks else built(name, args.samples) for name in args.names}
    print("\n".join(table({name: measure(case) for name, case in cases.items()})))


def tasks_of(folder: Path) -> Mapping[str, Any]:
    """The tasks of a zoo."""
    spec = importlib.util.spec_from_file_location("zoo", folder / "zoo.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} has no zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.TASKS)


if __name__ == "__main__":
    main()
