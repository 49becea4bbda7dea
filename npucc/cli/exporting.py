"""`npucc export`: the quantized model back as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npucc.cli import options, terminal
from npucc.files import write_bytes
from npucc.package import load

EPILOG = """\b
Example:
  npucc export model.npu -o quantized.onnx
\b
The QDQ model computes what the NPU computes: run it in onnxruntime with the session option
session.x64quantprecision=1 to compare bit by bit. What onnxruntime would compute in float
(softmax, layer normalization, 16-bit tensors) is spelled out in integer operators.
npucc compile takes either form back, with the same integers."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("export", epilog=EPILOG)(export)


def export(
    package: options.PackageFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="Q.onnx", help="The ONNX file to write.", show_default=False)],
    plain: Annotated[bool, typer.Option("--plain", help="Leave Softmax, Sigmoid and the like whole: easier to read, a step off at times.")] = False,
) -> None:
    """Write the quantized model as QDQ ONNX."""
    options.writable(output)
    model = load(package).to_onnx(exact=not plain)
    write_bytes(output, model.SerializeToString(deterministic=True))
    terminal.note(f"wrote {output}: {len(model.graph.node)} nodes")
