"""The machine against onnxruntime: time of one inference, side by side in one process; compile and load time, sizes, peak memory.

    python -m tests.benchmarks.speed MODEL.onnx … [--shape x=1,3,224,224] [--target edge] [--rounds 15] [--threads 1] [--json]

The one big idea: rounds are interleaved (each engine once per round, in turn), so that whatever else the computer does hits all alike; a
ratio is the median of the ratios within rounds. The anchor is onnxruntime on the very same quantized model (`package.to_onnx()`) with
`session.x64quantprecision=1`, the fast setting whose results are right; `session.qdqisint8allowed=1` is exact too, and slow.
Peak memory is that of a process of its own, which loads the model and runs it once; `imports` is the same without a model.

Inputs and calibration data are random. The numbers of threads are set by the environment before numpy is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import npucc
from isa import Program
from runtime import Machine
from runtime.kernels import ENGINES

if TYPE_CHECKING:
    import onnxruntime

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
EXACT, SIGNED = {"session.x64quantprecision": "1"}, {"session.qdqisint8allowed": "1"}
ANCHOR = "onnxruntime int8"
#: what the reports call the machine's engines that are installed
OWN = {f"npucc, {engine}": engine for engine in ENGINES if engine == "numpy" or find_spec(engine)}
Feed = dict[str, Any]
Call = Callable[[], list[Any]]  # one inference: its outputs in the model's order
Shapes = dict[str, tuple[int, ...]]


def restart_with_threads(threads: int) -> None:
    """Start this script again with the thread limits in the environment, unless they are there already."""
    if all(os.environ.get(name) == str(threads) for name in THREAD_VARIABLES):
        return
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.speed", *sys.argv[1:]], environment)


# ── the engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def session(model: str | bytes, threads: int, settings: dict[str, str]) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the processor."""
    import onnxruntime  # here: a process that measures the machine's memory must not load it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def random_feed(package: npucc.Package) -> Feed:
    """Standard normal reals; integers 0 and 1, which are legal token numbers and masks."""
    choose = np.random.default_rng(0)
    return {
        port.name: choose.normal(size=port.shape).astype(port.dtype) if port.array_dtype.kind == "f"  # type: ignore[arg-type]
        else choose.integers(0, 2, port.shape).astype(port.dtype)  # type: ignore[arg-type]
        for port in package.inputs
    }  # fmt: skip


def engines(model: Path, package: npucc.Package, threads: int) -> dict[str, Call]:
    """Name → one inference on the same random input."""
    feed = random_feed(package)
    quantized = package.to_onnx().SerializeToString()
    sessions = {
        "onnxruntime fp32": session(str(model), threads, {}),
        ANCHOR: session(quantized, threads, EXACT),
        "onnxruntime int8, signed": session(quantized, threads, SIGNED),
    }
    machines = {name: Machine(package.contents, engine=engine) for name, engine in OWN.items()}
    own: dict[str, Call] = {name: partial(_outputs, machine, feed) for name, machine in machines.items()}
    return own | {name: partial(each.run, None, feed) for name, each in sessions.items()}


def _outputs(machine: Machine, feed: Feed) -> list[Any]:
    return list(machine.run(feed).outputs.values())


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each engine in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(taken) for name, taken in seconds.items()}


# ── peak memory: in a process of its own ─────────────────────────────────────────────────────────────────────────────────────────────


def measure_alone(engine: str, file: str, threads: int) -> dict[str, float]:
    """Load seconds and peak resident bytes of one engine, measured in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.speed", "--alone", engine, "--threads", str(threads), file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def alone(engine: str, file: Path, threads: int) -> dict[str, float]:
    """What `measure_alone` starts."""
    start = time.perf_counter()
    if engine in OWN:
        package = npucc.load(file)
        parsed = time.perf_counter()
        npucc_machine = Machine(package.contents, engine=OWN[engine])
        loaded = time.perf_counter()
        npucc_machine.run(random_feed(package))
        peak = _peak()
        return {"parse_and_check": parsed - start, "decode": loaded - parsed, "load": loaded - start, "peak": peak, "held": held(engine, file)}
    if engine == ANCHOR:
        runner = session(str(file), threads, EXACT)
        loaded = time.perf_counter()
        runner.run(None, {each.name: np.zeros(each.shape, _numpy_type(each.type)) for each in runner.get_inputs()})
        return {"load": loaded - start, "peak": _peak()}
    return {"load": 0.0, "peak": _peak()}


def held(engine: str, file: Path) -> float:
    """The most bytes that Python and numpy hold while they load a package (its constants among them), the machine's empty memories aside."""
    tracemalloc.start()
    contents = npucc.load(file).contents
    Machine(contents, engine=OWN[engine])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(peak - memories(contents.program))


def memories(program: Program) -> int:
    """Bytes of the machine's memories. Of its DRAM the part with the constants is never touched, and so not resident."""
    return program.dram_bytes + program.target.spm_bytes + program.target.acc_bytes


def _numpy_type(name: str) -> str:
    return {"tensor(float)": "float32", "tensor(double)": "float64"}.get(name, name.removeprefix("tensor(").removesuffix(")"))


def _peak() -> float:
    """Peak resident bytes of this process (Linux; `getrusage` would count the parent's as well)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(model: Path, target: str, shapes: Shapes, *, rounds: int, threads: int) -> dict[str, Any]:
    """Everything about one model, in seconds and bytes."""
    import onnx  # here: see `session`

    start = time.perf_counter()
    package = npucc.compile(model, target, shapes={name: shape for name, shape in shapes.items() if name in _input_names(model)})
    compile_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        packed, quantized = Path(folder) / "model.npu", Path(folder) / "quantized.onnx"
        package.save(packed)
        onnx.save(package.to_onnx(), quantized)
        files = {**dict.fromkeys(OWN, packed), ANCHOR: quantized, "imports": packed}
        memory = {engine: measure_alone(engine, str(file), threads) for engine, file in files.items()}
        size = packed.stat().st_size
    calls = engines(model, package, threads)
    seconds = interleaved(calls, rounds)
    outputs = {name: call() for name, call in calls.items()}
    expected = outputs[next(iter(OWN))]
    return {
        "model": model.name,
        "seconds": {name: float(np.median(taken)) for name, taken in seconds.items()},
        "over_anchor": {name: float(np.median(taken / seconds[ANCHOR])) for name, taken in seconds.items()},
        "equal": {name: all(map(np.array_equal, expected, values)) for name, values in outputs.items()},
        "compile": compile_seconds,
        "package_bytes": size,
        "constants_bytes": package.program.constants_bytes,
        "activations_bytes": memories(package.program) - package.program.constants_bytes,
        "lines": package.text.count("\n"),
        "instructions": package.instructions,
        "alone": memory,
    }


def _input_names(model: Path) -> set[str]:
    import onnx  # here: see `session`

    return {each.name for each in onnx.load(model, load_external_data=False).graph.input}


def text(found: dict[str, Any]) -> str:
    """One model's numbers for the reader."""
    seconds, ratios, memory = found["seconds"], found["over_anchor"], found["alone"]
    lines = [found["model"]]
    for name, taken in seconds.items():
        same = "the same bytes" if found["equal"][name] else "other bytes"
        lines.append(f"  {name:26}{1e3 * taken:9.2f} ms   {ratios[name]:5.2f} × {ANCHOR}   {same}")
    lines.append(
        f"  compiled in {found['compile']:.1f} s: package {found['package_bytes'] / 1e6:.2f} MB, constants {found['constants_bytes'] / 1e6:.2f} MB, "
        f"{found['lines']} lines, {found['instructions']} instructions"
    )
    for name in OWN:
        ours = memory[name]
        lines.append(
            f"  {name} loaded in {ours['load']:.2f} s (read, parse, check {ours['parse_and_check']:.2f}, decode {ours['decode']:.2f}), "
            f"in {ours['held'] / found['constants_bytes']:.2f} × the constants' memory"
        )
    told = ", ".join(f"{name} {each['peak'] / 1e6:.0f} MB" for name, each in memory.items())
    limit = 2 * found["constants_bytes"] + found["activations_bytes"] + 150e6
    lines.append(f"  peak memory: {told}; 2 × constants + activations + 150 MB are {limit / 1e6:.0f} MB")
    return "\n".join(lines)


def _shape(argument: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = argument.partition("=")
    return name, tuple(int(size) for size in sizes.split(","))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--shape", action="append", type=_shape, default=[], metavar="NAME=1,3,224,224", help="of an input whose sizes are open")
    parser.add_argument("--target", default="edge")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--alone", choices=(*OWN, ANCHOR, "imports"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    restart_with_threads(options.threads)
    if options.alone:
        print(json.dumps(alone(options.alone, options.models[0], options.threads)))
        return
    found = []
    for model in options.models:
        found.append(measure(model, options.target, dict(options.shape), rounds=options.rounds, threads=options.threads))
        if not options.json:
            print(text(found[-1]), flush=True)
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
