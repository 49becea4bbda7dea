"""`npucc demo`: the whole way, with the network and data that come with the package."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from npucc import demo as bundled
from npucc import tables
from npucc.cli import options, terminal
from npucc.cli.evaluation import accuracy, measure
from npucc.feeds import open_dataset
from npucc.package import Package

EPILOG = """\b
Examples:
  npucc demo
  npucc demo --target cube --json
  npucc demo -o shapes.npu && npucc inspect shapes.npu --layers
\b
The network tells ten kinds of drawn shapes apart (32x32 pixels); examples/train_demo.py made it."""

EXCERPT_LINES = 14


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("demo", epilog=EPILOG)(demo)


def demo(
    target: options.TargetName = "edge",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT.npu", help="Keep the package.", show_default=False)] = None,
    limit: options.Limit = None,
    json: options.Json = False,
) -> None:
    """Compile the bundled network, run its labelled samples, show accuracy, cost and a piece of the program."""
    from npucc import compiler

    chip = options.target(target)
    options.writable(output)
    with terminal.progress() as progress:
        package = compiler.compile(bundled.MODEL, chip, calibration=bundled.CALIBRATION, progress=progress)
        if output is not None:
            package.save(output)
        result = measure(package, bundled.MODEL, open_dataset(bundled.SAMPLES, package.inputs, limit=limit), layer_samples=0, progress=progress)
    report = package.report.as_dict()
    if json:
        terminal.show_json(
            {
                "target": chip.name,
                "calibration": package.calibration,
                **report,
                **{key: value for key, value in result.as_dict().items() if key != "layers"},
            }
        )
        return
    rows = [
        ("network", f"{bundled.MODEL.name}, {tables.program(package)}"),
        ("target", tables.chip(chip)),
    ]
    parts: list[RenderableType] = [tables.facts([*rows, *accuracy(result, package), *tables.totals(report, clock_hz=chip.clock_hz)]), ""]
    terminal.show(*parts, tables.layers(report, top=5, width=terminal.width()), "", *excerpt(package))
    if output is not None:
        terminal.note(f"wrote {output}")


def excerpt(package: Package) -> list[RenderableType]:
    """The start of the text of the layer with the most MACs, and the ONNX nodes it came from."""
    layer = max(package.program.layers, key=lambda each: each.macs)
    lines = package.text.splitlines()
    start = [index for index, line in enumerate(lines) if line.startswith(".layer")][package.program.layers.index(layer)]
    body = list(takewhile(lambda line: not line.startswith(".layer"), lines[start + 1 :]))
    shown = [lines[start], *body[:EXCERPT_LINES], *([f"  ; … {len(body) - EXCERPT_LINES} more lines"] if len(body) > EXCERPT_LINES else [])]
    return [f"ONNX nodes {', '.join(layer.nodes)} became:", "\n".join(shown)]
