"""`npucc run`: inferences on the virtual NPU, with what they cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from npucc import tables
from npucc.cli import options, stopping, terminal
from npucc.feeds import Feed, check_feed, open_dataset, synthetic_feeds
from npucc.files import json_text, write_array, write_arrays, write_bytes, write_text
from npucc.package import Package, load
from runtime.errors import RuntimeFault
from runtime.result import Result

EPILOG = """\b
Examples:
  npucc run model.npu                                    made-up input: what it costs
  npucc run model.npu --input samples.npz -o outputs.npz
  npucc run model.npu --input samples.npz --limit 1 --all --json
  npucc run model.npu --trace trace.json                 open it in Perfetto or chrome://tracing
  npucc run model.npu --until 57:3 --dump-memory here    stop when line 57 of `npucc disasm` was executed 3 times
\b
Cycles and energy do not depend on the input's values, but on a target that skips zero inputs. The outputs' first axis counts the samples."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("run", epilog=EPILOG)(run)


def run(  # noqa: PLR0913  one per option
    package: options.PackageFile,
    input: Annotated[Path | None, typer.Option("--input", "-i", metavar="DATA", help=f"Samples: {options.DATA_HELP}.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT.npz", help="Write the outputs, stacked along a leading sample axis.", show_default=False),
    ] = None,
    limit: options.Limit = None,
    all_layers: Annotated[bool, typer.Option("--all", help="Show every layer, in program order.", show_default=False)] = False,
    top: Annotated[int, typer.Option("--top", metavar="N", min=0, help="Show the N layers with the most cycles.")] = 10,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="TRACE.json", help="Write what each engine does when (Chrome trace format).", show_default=False)
    ] = None,
    dump_tensors: Annotated[
        Path | None,
        typer.Option(
            "--dump-tensors", metavar="DIR", help="Write every .tensor and output of the first sample into a folder, as stored.", show_default=False
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until", metavar="LINE[:N]", help="Stop the first sample after the N-th execution of a line of `npucc disasm`.", show_default=False
        ),
    ] = None,
    dump_memory: Annotated[
        Path | None,
        typer.Option("--dump-memory", metavar="DIR", help="Write all memories as they are after the first sample (or --until).", show_default=False),
    ] = None,
    max_cycles: Annotated[
        int | None, typer.Option("--max-cycles", metavar="N", min=1, help="Refuse a program that takes more, before it runs.", show_default=False)
    ] = None,
    counters: Annotated[bool, typer.Option("--counters", help="Show how often each kind of instruction ran.", show_default=False)] = False,
    json: options.Json = False,
) -> None:
    """Run a package and report cycles, memory traffic and energy."""

    place = stopping.line_and_turn(until)
    options.existing(input, "--input")
    options.writable(output)
    options.writable(trace, "--trace")
    options.folder(dump_tensors, "--dump-tensors")
    options.folder(dump_memory, "--dump-memory")
    loaded = load(package)
    _bound(loaded, max_cycles)
    feeds, count = _feeds(loaded, input, limit)
    if place is not None:
        stopping.run_until(loaded, next(feeds), place, folder=dump_memory, json=json)
        return
    with terminal.progress() as progress:
        outputs, first = _run_all(loaded, feeds, count, keep=output is not None, dump=dump_tensors is not None, memory=dump_memory, progress=progress)
    if output is not None:
        write_arrays(output, outputs)
    if trace is not None:
        write_bytes(trace, json_text(loaded.machine.ran.chrome_trace(), indent=None).encode())
    if dump_tensors is not None:
        write_tensors(loaded, first, dump_tensors)
    _report(loaded, first, count=count, synthetic=input is None, json=json, top=None if all_layers else top, counters=counters)


def _bound(package: Package, max_cycles: int | None) -> None:
    """Raises RuntimeFault for a program that would take too long."""
    if max_cycles is not None and (cycles := package.report.cycles) > max_cycles:
        raise RuntimeFault(f"the program takes {cycles:,} cycles", hint=f"--max-cycles allows {max_cycles:,}")


def _feeds(package: Package, path: Path | None, limit: int | None) -> tuple[Iterator[Feed], int]:
    if path is None:
        return synthetic_feeds(package.inputs), 1
    dataset = open_dataset(path, package.inputs, limit=limit)
    return iter(dataset), len(dataset)


def _run_all(
    package: Package, feeds: Iterator[Feed], count: int, *, keep: bool, dump: bool, memory: Path | None, progress: terminal.Report
) -> tuple[dict[str, Any], Result]:
    """(outputs stacked by sample, or nothing if not kept; the first sample's result)."""
    kept: dict[str, list[Any]] = {record.name: [] for record in package.program.outputs}
    first = None
    for index, feed in enumerate(feeds):
        progress("run", index, count)
        result = package.run(feed, tensors=dump and first is None)
        if first is None and memory is not None:
            stopping.write_memories(package.machine.memories_after(check_feed(feed, package.inputs)), memory, {"cycle": result.cycles})
        first = first or result
        if keep:
            for name, value in result.outputs.items():
                kept[name].append(value)
    assert first is not None
    return {name: np.stack(values) for name, values in kept.items() if values}, first


def write_tensors(package: Package, result: Result, folder: Path) -> None:
    """One `.npy` of stored integers per named tensor, and `index.json` that says what they are: real = (stored − zero) · scale."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**result.tensors, **result.raw}
    records = {record.name: record for record in (*package.program.tensors, *package.program.outputs) if record.name in values}
    index = []
    for number, record in enumerate(records.values()):
        file = f"{number:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', record.name)[:80]}.npy"
        write_array(folder / file, values[record.name])
        index.append(
            {"name": record.name, "file": file, "layer": record.layer, "dtype": record.tile.dtype, "scale": record.scale, "zero": record.zero}
        )
    write_text(folder / "index.json", json_text(index) + "\n")


def _report(package: Package, result: Result, *, count: int, synthetic: bool, json: bool, top: int | None, counters: bool) -> None:
    report = result.report.as_dict()
    if json:
        terminal.show_json(
            {
                "target": package.program.target.name,
                "samples": count,
                "input": "synthetic" if synthetic else "data",
                "calibration": package.calibration,
                "operations": package.operations,
                **report,
            }
        )
        return
    if synthetic:
        terminal.note("no --input: ran one made-up sample (standard normal values); only where zero inputs are skipped do values matter")
    if top != 0:
        terminal.show(tables.layers(report, top=top, width=terminal.width()), "")
    if counters:
        terminal.show(tables.counters(report), "")
    samples = f"{count} sample{'s' * (count != 1)}; figures are for one"
    target = package.program.target
    rows = [("target", tables.chip(target)), ("ran", samples), *tables.totals(report, clock_hz=target.clock_hz)]
    terminal.show(tables.facts([*rows, *tables.work(package.operations)]))
