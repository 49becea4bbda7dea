"""`npucc compile`: a model becomes a package."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from npucc import tables
from npucc.cli import options, terminal
from npucc.package import SYNTHETIC, Package

SYNTHETIC_WARNING = "no --calibration: the scales come from made-up inputs, so cycles and energy are right, but accuracy means little"

EPILOG = """\b
Examples:
  npucc compile model.onnx --calibration samples.npz -o model.npu
  npucc compile model.onnx --check              where each node runs, before any work
  npucc compile model.onnx --target cube --shape input=1,3,224,224 --json
  npucc compile model.onnx --target my_npu.toml --dump-after import
  npucc compile model.onnx --calibration samples.npz --prune channels=30%
\b
Calibration decides the scales of all tensors, so give some dozens of inputs like those of real use.
Without it the scales come from made-up inputs: cycles and energy are right, the results mean little.
\b
--dump-after prints the graph (or program) after a stage; without -o, the compiler stops there."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("compile", epilog=EPILOG)(compile_model)


def compile_model(  # noqa: PLR0913  one per option
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.npu", help="The package to write. [default: MODEL.npu, here]", show_default=False)
    ] = None,
    target: options.TargetName = "edge",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", metavar="DATA", help=f"Typical inputs: {options.DATA_HELP}.", show_default=False)
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="x=1,3,224,224", help="Bind an input's open sizes; repeat per input.", show_default=False)
    ] = None,
    prune: options.Prune = None,
    quant: options.Quant = None,
    host: Annotated[
        bool, typer.Option("--host/--no-host", help="Let onnxruntime run, as host segments, what the NPU can't; --no-host makes it an error.")
    ] = True,
    check: Annotated[bool, typer.Option("--check", help="Only tell where each node would run; nothing is calibrated or written.")] = False,
    dump_after: Annotated[
        str | None, typer.Option("--dump-after", metavar="STAGE", help="Print the value after a stage.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    """Compile an ONNX model for an NPU and write a package.

    The model is imported, simplified, quantized with the calibration data (8 bits, 16 where it pays), and lowered to instructions of the target.
    """
    from npucc import compiler

    if check:
        _check(model, options.shapes(shape), json=json)
        return
    chip, bound = options.target(target), options.shapes(shape)
    options.existing(calibration, "--calibration")
    options.writable(output)
    _known_stage(dump_after)
    path = output or Path(f"{model.name.removesuffix('.onnx')}.npu")
    if path.exists() and path.samefile(model):
        raise typer.BadParameter(f"{str(path)!r} is the model itself", param_hint="'-o'")
    dump, package = None, None
    with terminal.progress() as progress:
        for step in compiler.steps(model, chip, calibration=calibration, shapes=bound, prune=prune, quant=quant, host=host, progress=progress):
            if step.stage == dump_after:
                dump = step.text()
                if output is None:
                    break
            if isinstance(step.value, Package):
                package = step.value
    if package is None:
        _show_dump(dump_after, dump, json=json)
        return
    package.save(path)
    _show_package(package, path, stage=dump_after, dump=dump, json=json)


def _check(model: Path, shapes: dict[str, tuple[int, ...]], *, json: bool) -> None:
    """Place every node and show the table."""
    from npucc import operators

    rows = operators.place(model, shapes)
    counts = dict(operators.summary(rows))
    if json:
        terminal.show_json({"nodes": [asdict(row) for row in rows], "counts": counts})
        return
    title = f"{len(rows)} nodes: " + ", ".join(f"{count} {place}" for place, count in counts.items())
    terminal.show(tables.grid(title, ("node", "operator", "place", "why"), [(row.node, row.operator, row.place, row.reason) for row in rows], left=4))


def _known_stage(name: str | None) -> None:
    if name is not None:
        from npucc.compiler import stages

        names = [stage.name for stage in stages()]
        if name not in names:
            raise typer.BadParameter(f"{name!r} is no stage; the stages are {', '.join(names)}", param_hint="'--dump-after'")


def _show_dump(stage: str | None, dump: str | None, *, json: bool) -> None:
    if json:
        terminal.show_json({"stage": stage, "dump": dump})
    else:
        terminal.write_or_show(dump or "", None)


def _show_package(package: Package, path: Path, *, stage: str | None, dump: str | None, json: bool) -> None:
    target, report = package.program.target, package.report.as_dict()
    if package.calibration == SYNTHETIC:
        terminal.warn(SYNTHETIC_WARNING)
    if json:
        extra: dict[str, object] = {} if dump is None else {"stage": stage, "dump": dump}
        extra |= {"host_nodes": [asdict(node) for node in package.host_nodes], "host_cycles": package.host_cycles, "operations": package.operations}
        extra |= {name: found for name, found in (("pruned", package.pruned), ("quantized", package.quantized)) if found is not None}
        terminal.show_json(
            {"output": str(path), "bytes": path.stat().st_size, "target": target.name, "calibration": package.calibration, **report, **extra}
        )
        return
    if dump is not None:
        terminal.write_or_show(dump, None)
    program = f"{tables.program(package)}, {tables.size(package.program.constants_bytes)} of constants"
    rows = [("wrote", f"{path} ({tables.size(path.stat().st_size)})"), ("target", tables.chip(target)), ("program", program)]
    rows += [] if package.quantized is None else [("quantized", tables.precision(package.quantized))]
    terminal.show(tables.facts([*rows, *tables.totals(report, clock_hz=target.clock_hz), *tables.work(package.operations)]))
    if package.host_nodes:
        terminal.show("", tables.host(package.host_nodes, onnx_nodes=package.onnx_nodes, cycles=package.host_cycles, total=package.report.cycles))
    if package.pruned is not None:
        terminal.show("", tables.pruning(package.pruned))
