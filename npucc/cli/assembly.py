"""`npucc asm`, `disasm` and `check`: programs as text, without a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from npucc import tables
from npucc.cli import options, terminal

ASM_EPILOG = """\b
Examples:
  npucc disasm model.npu -o model.npuasm       edit model.npuasm, then
  npucc asm model.npuasm --constants model.npu -o edited.npu
  npucc asm program.npuasm --constants constants.bin -o program.npu
\b
The text is checked before the package is written. An assembled package runs, but has no graph:
`npucc export` and the per-layer part of `npucc eval` need one."""

DISASM_EPILOG = """\b
Examples:
  npucc disasm model.npu
  npucc disasm model.npu -o model.npuasm --constants constants.bin"""

CHECK_EPILOG = """\b
Examples:
  npucc check model.npu
  npucc check program.npuasm
\b
Checked are bounds, alignment, element types, capacity, event pairing, deadlock and races.
All findings are printed, each with its line."""

Text = Annotated[
    Path, typer.Argument(metavar="PROGRAM.npuasm", help="The program's text.", exists=True, dir_okay=False, readable=True, show_default=False)
]
Either = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="A package (.npu) or a program's text (.npuasm).", exists=True, dir_okay=False, readable=True, show_default=False
    ),
]


MAXIMUM_TEXT_BYTES = 1 << 28


#: looking for wrong addresses takes four bytes per byte of memory
LARGEST_SUSPECTED_DRAM = 1 << 28


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("asm", epilog=ASM_EPILOG)(asm)
    app.command("disasm", epilog=DISASM_EPILOG)(disasm)
    app.command("check", epilog=CHECK_EPILOG)(check)


def asm(
    program: Text,
    constants: Annotated[
        Path | None,
        typer.Option(
            "--constants",
            metavar="FILE",
            help="The constants' bytes: a .bin file, or a package to take them from.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.npu", help="The package to write. [default: PROGRAM.npu, here]", show_default=False)
    ] = None,
) -> None:
    """Assemble text into a package."""
    import isa

    options.writable(output)
    package = isa.pack_text(_text(program), _constants(constants), file=str(program), tool="npucc asm")
    isa.check(package.program, file=str(program))
    path = output or Path(program.with_suffix(".npu").name)
    package.save(path)
    terminal.note(f"wrote {path}: {tables.number(len(package.program.layers), 'layer')}, {tables.size(len(package.constants))} of constants")


def disasm(
    package: options.PackageFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.npuasm", help="Write the text there instead of printing it.", show_default=False)
    ] = None,
    constants: Annotated[
        Path | None, typer.Option("--constants", metavar="OUT.bin", help="Write the constants' bytes too.", show_default=False)
    ] = None,
) -> None:
    """Print a package's program as text."""
    import isa
    from npucc.files import write_bytes

    options.writable(output)
    options.writable(constants, "--constants")
    loaded = isa.Package.load(package)
    if constants is not None:
        write_bytes(constants, loaded.constants)
    terminal.write_or_show(loaded.text, output)


def check(file: Either, json: options.Json = False) -> None:
    """Check a program: would it run, and always give the same bytes?

    Warnings are about legal lines that look like a wrong address: a result that nobody reads, an operand made by two instructions.
    """
    import isa
    from isa.discipline import suspicions

    text = None if _is_package(file) else _text(file)
    mistakes = isa.mistakes(text) if text is not None else []
    findings, warnings = [isa.Finding(each.line, each.column, each.message, each.hint) for each in mistakes], list[isa.Finding]()
    if not mistakes:
        program = isa.Package.load(file).program if text is None else isa.parse_program(text)
        findings = isa.findings(program)
        warnings = suspicions(program) if not findings and program.dram_bytes <= LARGEST_SUSPECTED_DRAM else []
    if text is not None:
        findings, warnings = isa.with_columns(findings, text), isa.with_columns(warnings, text)
    if json:
        lists = {"findings": findings, "warnings": warnings}
        shown = {kind: [dataclasses.asdict(f) for f in each] for kind, each in lists.items()}
        terminal.show_json({"ok": not findings, **shown})
    else:
        for kind, each in [*(("error", f) for f in findings), *(("warning", f) for f in warnings)]:
            typer.echo(f"{kind}: {file}:{'' if each.line else ' '}{each}", err=True)
        if not findings:
            typer.echo(f"{file}: {tables.number(len(program.layers), 'layer')}, no findings")
    if findings:
        raise typer.Exit(1)


def _constants(path: Path | None) -> bytes:
    """The bytes of a .bin file, or a package's constants."""
    import isa

    if path is None:
        return b""
    return isa.Package.load(path).constants if path.suffix == ".npu" else path.read_bytes()


def _is_package(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"PK" or path.suffix == ".npu"


def _text(path: Path) -> str:
    """The file as text. Raises ParseError for what can't be a program."""
    import isa

    if path.stat().st_size > MAXIMUM_TEXT_BYTES:
        raise isa.ParseError(
            f"the file has {path.stat().st_size} bytes", file=str(path), hint="a program's text is far shorter; is this the right file?"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise isa.ParseError(
            f"byte {error.start} is not UTF-8 text", file=str(path), hint="give a program's text (.npuasm), or a package (.npu)"
        ) from None
