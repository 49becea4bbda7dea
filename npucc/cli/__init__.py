"""The command line: one module per group of commands, one place where errors become messages and exit codes.

The one big idea: a command is a thin function: read options, call the Python API, print. Whatever goes wrong below it
arrives here as an exception, and leaves as one message on standard error: 1 the model, program or data is at fault,
2 the command was used wrongly.
"""

from __future__ import annotations

import io
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import typer

from isa.errors import IsaError
from npucc.cli import assembly, catalog, compiling, demonstration, evaluation, exporting, inspection, running
from npucc.errors import NpuccError

EPILOG = """\b
A first look (nothing but the package is needed):
  npucc demo
\b
From a model to numbers:
  npucc compile model.onnx --calibration samples.npz -o model.npu
  npucc run model.npu --input samples.npz -o outputs.npz
  npucc eval model.npu --reference model.onnx --data labelled.npz
\b
Look inside:
  npucc inspect model.npu --layers
  npucc inspect model.npu --asm
  npucc disasm model.npu -o model.npuasm
\b
Exit codes: 0 done; 1 the model, program or data is at fault; 2 wrong usage.
NPUCC_DEBUG=1 shows the Python traceback of an error."""

app = typer.Typer(
    name="npucc", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip

for _module in (compiling, running, evaluation, inspection, assembly, exporting, catalog, demonstration):
    _module.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"npucc {_version('npucc')}")
        raise typer.Exit


@app.callback()
def npucc(
    _version: bool = typer.Option(False, "--version", help="Print the version and leave.", callback=_show_version, is_eager=True),
) -> None:
    """Compile ONNX networks for a virtual NPU, run them bit-exactly, count cycles and energy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Never raises for what a user can cause."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no µ or ─ gets a question mark, not a crash
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="npucc")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  the interpreter flushes it on exit
        return 0
    except Exception as error:  # noqa: BLE001  the last line of defence
        return _explain(error)
    return 0


def _explain(error: Exception) -> int:
    """One message for an exception, and its exit code."""
    if os.environ.get("NPUCC_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exc()
    if isinstance(error, NpuccError | IsaError):
        return _fail(str(error), 1)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", 1)
    if isinstance(error, MemoryError):
        return _fail("not enough memory for this model or data", 1)
    versions = ", ".join((f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in ("npucc", "onnx", "onnxruntime", "numpy"))))
    return _fail(
        f"this is a bug in npucc: {type(error).__name__}: {error}\n"
        f"  hint: run again with NPUCC_DEBUG=1 and report the traceback, the command and the versions: {versions}",
        1,
    )


def _fail(message: str, code: int) -> int:
    print(f"npucc: {message}" if code == 130 else f"error: {message}", file=sys.stderr)  # noqa: T201
    return code


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
