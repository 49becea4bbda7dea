"""The integer network against the float one, per quantization: accuracy, signal-to-noise ratio, cycles, time to compile.

    python -m tests.benchmarks.accuracy [MODEL.onnx DATA.npz CALIBRATION.npz] [--quant int8 auto int16] [--target edge] [--limit 200]

DATA holds an array per model input with a leading sample axis, and `labels` if there is an accuracy to measure. Default: the bundled network.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime

import npucc
from npucc import demo
from npucc.evaluate import Evaluation, Run, evaluate
from npucc.feeds import Port, open_dataset
from npucc.signature import ports_of_model


def original(model: Path) -> Run:
    """The float model in onnxruntime."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def measured(package: npucc.Package, model: Path, data: Path, limit: int) -> Evaluation:
    """The package on the first `limit` samples."""
    ports = [port for port in ports_of_model(model).values() if isinstance(port, Port)]
    samples = islice(open_dataset(data, ports).samples(), limit)
    return evaluate(lambda feed: package.run(feed).outputs, original(model), samples)


def row(args: argparse.Namespace, quant: str) -> str:
    """One line of the table."""
    start = time.perf_counter()
    package = npucc.compile(args.model, args.target, calibration=args.calibration, quant=quant)
    seconds = time.perf_counter() - start
    found = measured(package, args.model, args.data, args.limit)
    accuracy = "-" if found.npu_accuracy is None else f"{found.npu_accuracy:.4f} ({found.float_accuracy:.4f})"
    sqnr = float(np.mean([output.sqnr_db for output in found.outputs]))
    return f"{quant:24} {accuracy:>17} {sqnr:8.1f} {package.report.cycles:12,} {seconds:8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo.MODEL)
    parser.add_argument("data", type=Path, nargs="?", default=demo.SAMPLES)
    parser.add_argument("calibration", type=Path, nargs="?", default=demo.CALIBRATION)
    parser.add_argument("--quant", nargs="+", default=["int8", "auto", "int16"])
    parser.add_argument("--target", default="edge")
    parser.add_argument("--limit", type=int, default=200)
    args = parser.parse_args()
    print(f"{'quantization':24} {'accuracy (float)':>17} {'SQNR dB':>8} {'cycles':>12} {'seconds':>8}")
    for quant in args.quant:
        print(row(args, quant), flush=True)


if __name__ == "__main__":
    main()
