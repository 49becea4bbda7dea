"""`npucc targets` and `npucc ops`: what there is to compile for, and what can be compiled."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from isa.target import Target, load_target, target_names
from npucc import tables
from npucc.cli import options, terminal

TARGETS_EPILOG = """\b
Examples:
  npucc targets                       the targets that come with npucc
  npucc targets edge > my_npu.toml    a description to copy and change, then
  npucc compile model.onnx --target my_npu.toml"""


OPS_EPILOG = """\b
Examples:
  npucc ops                     ONNX operators, where they run and with which limits
  npucc ops --target cube       the same, with the engine that does the work
\b
Operators without a place on the NPU run on the host, as segments that every report lists; `compile --check` tells beforehand."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("ops", epilog=OPS_EPILOG)(ops)
    app.command("targets", epilog=TARGETS_EPILOG)(targets)


def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE.toml]", help="Print this target whole, as TOML.", show_default=False)] = None,
    json: options.Json = False,
) -> None:
    """List the targets, or print one to copy."""
    if name is not None:
        chip = options.target(name)
        if json:
            terminal.show_json(dataclasses.asdict(chip))
        else:
            terminal.write_or_show(toml(chip), None)
        return
    chips = [load_target(each) for each in target_names()]
    if json:
        terminal.show_json([dataclasses.asdict(chip) for chip in chips])
        return
    rows = [(chip.name, chip.description, _array(chip), _peak(chip), tables.size(chip.spm_bytes), _bandwidth(chip)) for chip in chips]
    terminal.show(tables.grid("", ("target", "what it is", "array", "peak", "scratchpad", "DRAM"), rows, left=2))


def toml(chip: Target) -> str:
    """The target as a file for `--target`, with every field."""
    lines = [f"# {chip.name}: copy this file, change it, and compile with --target FILE.toml"]
    for field in dataclasses.fields(chip):
        value = getattr(chip, field.name)
        if field.name != "name":  # the file's own name
            text = str(value).lower() if isinstance(value, bool) else f'"{_escape(value)}"' if isinstance(value, str) else repr(value)
            lines.append(f"{field.name} = {text}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _array(chip: Target) -> str:
    sizes = (chip.rows, chip.cols) if chip.family == "systolic" else (chip.rows, chip.cols, chip.depth)
    return f"{chip.family} {'×'.join(map(str, sizes))}{' sparse' * (chip.skip != 'none')}"


def _peak(chip: Target) -> str:
    return f"{2 * chip.macs_per_cycle * chip.clock_hz / 1e12:.3g} TOPS"


def _bandwidth(chip: Target) -> str:
    return f"{chip.dram_bytes_per_cycle * chip.clock_hz / 1e9:.3g} GB/s"


def ops(
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", metavar="NAME|FILE.toml", help="Show the graph operators and who runs them on this target.", show_default=False
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """List the ONNX operators and where they run, and the graph operators they come down to."""
    from npucc import operators
    from npucc.ops import TABLE

    chip = options.target(target) if target is not None else None
    onnx = operators.table()
    graph = [(record.name, record.meaning, operators.engine(record)) for record in TABLE if not record.float_only]
    if json:
        terminal.show_json({
            "target": chip.name if chip else None, "onnx": [dataclasses.asdict(row) for row in onnx],
            "graph": [{"name": name, "meaning": meaning, "engine": engine} for name, meaning, engine in graph],
        })  # fmt: skip
        return
    places = [(row.name, row.place, row.note) for row in onnx]
    terminal.show(tables.grid(f"{len(onnx)} ONNX operators", ("operator", "place", "conditions, or why not on the NPU"), places, left=3))
    if chip is not None:
        rates = {
            operators.MATRIX: f"{chip.macs_per_cycle} MACs per cycle",
            operators.VECTOR: f"{chip.vec_lanes} elements per cycle",
            operators.MOVES: f"{chip.dram_bytes_per_cycle:g} bytes per cycle",
            operators.FOLDED: "",
            operators.HOST: f"{chip.host_latency} cycles per segment",
        }
        rows = [(name, meaning, engine, rates[engine]) for name, meaning, engine in graph]
        terminal.show(
            "",
            tables.grid(
                f"the {len(graph)} graph operators they become, on target {chip.name}", ("operator", "meaning", "engine", "at most"), rows, left=4
            ),
        )
