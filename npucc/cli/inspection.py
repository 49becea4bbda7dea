"""`npucc inspect`: what is in a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from npucc import tables
from npucc.cli import options, terminal
from npucc.package import Package, load

if TYPE_CHECKING:
    from isa import Program, TensorRecord

EPILOG = """\b
Examples:
  npucc inspect model.npu               what it is: inputs, outputs, sizes, cost
  npucc inspect model.npu --layers      cycles per layer and where they go
  npucc inspect model.npu --memory      who lives where
  npucc inspect model.npu --asm | less  the program
  npucc inspect model.npu --graph       the integer graph, and rewrites that did not apply"""

CALIBRATION = {
    "data": "from data", "model": "the model's own scales", "synthetic": "SYNTHETIC (made-up inputs): accuracy means little"
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("inspect", epilog=EPILOG)(inspect)


def inspect(
    package: options.PackageFile,
    asm: Annotated[bool, typer.Option("--asm", help="The program as text.", show_default=False)] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer with its cycles.", show_default=False)] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Addresses and sizes.", show_default=False)] = False,
    graph: Annotated[bool, typer.Option("--graph", help="The integer graph.", show_default=False)] = False,
    json: options.Json = False,
) -> None:
    """Look into a package: a summary, or the parts that are asked for."""
    loaded = load(package)
    if json:
        terminal.show_json(_as_values(loaded, package, asm=asm, graph=graph, memory=memory))
        return
    if not (asm or layers or memory or graph):
        terminal.show(_summary(loaded, package))
        return
    if layers:
        terminal.show(tables.layers(loaded.report.as_dict(), width=terminal.width()))
    if memory:
        terminal.show(*_memory(loaded.program))
    if graph:
        terminal.write_or_show(loaded.graph.text(), None)
        for refused in loaded.refused:
            terminal.write_or_show(f"; not done: {refused.stage}: {refused.reason}\n", None)
    if asm:
        terminal.write_or_show(loaded.text, None)


def _as_values(package: Package, path: Path, *, asm: bool, graph: bool, memory: bool) -> dict[str, Any]:
    program = package.program
    value: dict[str, Any] = {
        "file": str(path), "bytes": path.stat().st_size, "source": program.source, "target": program.target.name, "calibration": package.calibration,
        "inputs": [_port(record) for record in program.inputs], "outputs": [_port(record) for record in program.outputs],
        "refused": [{"stage": each.stage, "reason": each.reason} for each in package.refused], **package.report.as_dict(),
    }  # fmt: skip
    if asm:
        value["asm"] = package.text
    if graph:
        value["graph"] = package.graph.text()
    if memory:
        value["memory"] = [dict(zip(("name", "kind", "space", "address", "bytes", "layer"), row, strict=True)) for row in _regions(program)]
    return value


def _summary(package: Package, path: Path) -> RenderableType:
    program, report = package.program, package.report.as_dict()
    rows: list[tuple[str, object]] = [
        ("package", f"{path} ({tables.size(path.stat().st_size)})"),
        ("source", program.source or "unknown"),
        ("target", tables.chip(program.target)),
        *(("input", _signature(record)) for record in program.inputs),
        *(("output", _signature(record)) for record in program.outputs),
        ("calibration", CALIBRATION.get(package.calibration, "unknown")),
        ("program", tables.program(package)),
        ("constants", tables.size(program.constants_bytes)),
        ("DRAM used", tables.size(program.dram_bytes)),
        *tables.totals(report, clock_hz=program.target.clock_hz),
    ]
    return tables.facts(rows)


def _port(record: TensorRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "shape": record.tile.shape,
        "dtype": record.dtype,
        "stored": record.tile.dtype,
        "scale": record.scale,
        "zero": record.zero,
    }


def _signature(record: TensorRecord) -> str:
    shape = ",".join(map(str, record.tile.shape))
    return f"{record.name} {record.dtype}[{shape}], stored as {record.tile.dtype}: {record.scale:.6g} · (q {-record.zero:+d})"


def _regions(program: Program) -> list[tuple[str, str, str, int, int, str]]:
    """(name, kind, memory, address, bytes, layer) by memory and address."""
    rows = [("(constants)", "constants", "dram", program.constants_address, program.constants_bytes, "")]
    for kind, records in (("input", program.inputs), ("output", program.outputs), ("tensor", program.tensors)):
        for record in records:
            low, high = record.tile.extent()
            rows.append((record.name, kind, record.tile.space, low, high - low, record.layer))
    return sorted(rows, key=lambda row: (row[2], row[3], row[0]))


def _memory(program: Program) -> tuple[RenderableType, ...]:
    target = program.target
    regions = ((name, kind, f"{space} 0x{address:x}", layer, tables.size(count)) for name, kind, space, address, count, layer in _regions(program))
    title = (
        f"DRAM: {tables.size(program.dram_bytes)} used; scratchpad: {tables.size(target.spm_bytes)}; accumulators: {tables.size(target.acc_bytes)}"
    )
    return (tables.grid(title, ("tensor", "kind", "address", "written by", "size"), regions, left=4),)
