"""The arguments and options that several commands share, and how their text becomes values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from isa.errors import TargetError
from isa.target import Target, load_target

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX model.", exists=True, dir_okay=False, readable=True, show_default=False)]
PackageFile = Annotated[
    Path,
    typer.Argument(
        metavar="OUT.npu", help="A package made by `npucc compile` (or demo, asm).", exists=True, dir_okay=False, readable=True, show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on standard output.", show_default=False)]
TargetName = Annotated[str, typer.Option("--target", "-t", metavar="NAME|FILE.toml", help="The NPU to compile for; `npucc targets` lists them.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Use only the first N samples.", show_default=False)]

DATA_HELP = "an .npz whose arrays have the model's input names and a leading sample axis, or a folder of such files"


def target(name: str) -> Target:
    """The target of `--target`; a name that does not exist is wrong usage, a faulty file is the file's fault."""
    try:
        return load_target(name)
    except TargetError as error:
        if Path(name).is_file():
            raise
        raise typer.BadParameter(str(error), param_hint="'--target'") from None


def _quant(spec: str | None) -> str | None:
    """`--quant`, refused here when it does not parse: wrong usage, not the model's fault. `help` lists the keys."""
    if spec is None:
        return None
    from npucc.compiler import FLOAT_MODE, quantize_options
    from npucc.errors import QuantizeError
    from npucc.quantize import QuantizeOptions

    if spec == "help":
        for field in dataclasses.fields(QuantizeOptions):
            typer.echo(f"{field.name}={field.default}\n    {field.metadata.get('meaning', '')}")
        raise typer.Exit
    if spec == FLOAT_MODE:
        return spec
    try:
        quantize_options(spec)
    except QuantizeError as error:
        raise typer.BadParameter(str(error), param_hint="'--quant'") from None
    return spec


def _prune(spec: str | None) -> str | None:
    """`--prune`, refused here when it does not parse. `help` explains it."""
    if spec is None:
        return None
    from npucc.compiler import prune_options
    from npucc.errors import PruneError
    from npucc.prune import options

    if spec == "help":
        typer.echo(options.__doc__)
        raise typer.Exit
    try:
        prune_options(spec)
    except PruneError as error:
        raise typer.BadParameter(str(error), param_hint="'--prune'") from None
    return spec


# Both are looked at before anything else, so that `npucc compile --quant help` needs no model.
Quant = Annotated[
    str | None,
    typer.Option(
        "--quant",
        metavar="SPEC",
        callback=_quant,
        is_eager=True,
        help="auto (16 bits where they pay), int8 or int16, then key=value,… (`help` lists them); or none: all in float, on the host.",
        show_default=False,
    ),
]
Prune = Annotated[
    str | None,
    typer.Option(
        "--prune",
        metavar="SPEC",
        callback=_prune,
        is_eager=True,
        help="Remove channels or weights: channels=30%, cycles=0.7,drop=0.5, 2:4, block=70%, unstructured=60%, "
        "skip=LAYER, LAYER@2:4, …; `help` explains.",
        show_default=False,
    ),
]


def shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """`x=1,3,224,224` → {"x": (1, 3, 224, 224)}."""
    result: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        name, equals, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not equals or not name or not shape or min(shape) < 1:
            raise typer.BadParameter(f"{text!r} is no shape; write the input's name and its sizes: x=1,3,224,224", param_hint="'--shape'")
        if name in result:
            raise typer.BadParameter(f"input {name!r} is given twice", param_hint="'--shape'")
        result[name] = shape
    return result


def existing(path: Path | None, option: str) -> Path | None:
    """DATA: a file or folder that is there."""
    if path is not None and not path.exists():
        raise typer.BadParameter(f"{str(path)!r} does not exist", param_hint=f"'{option}'")
    return path


def writable(path: Path | None, option: str = "-o") -> Path | None:
    """An output file whose folder exists: found out before the work, not after it."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder; give a file name", param_hint=f"'{option}'")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {str(path.parent)!r} does not exist", param_hint=f"'{option}'")
    return path


def folder(path: Path | None, option: str) -> Path | None:
    """A folder to write into; it may be made."""
    if path is not None and path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a file; give a folder", param_hint=f"'{option}'")
    return path
