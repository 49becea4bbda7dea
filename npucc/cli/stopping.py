"""`npucc run --until LINE` and `--dump-memory`: the machine's memories at one point of a program, to hold against hardware."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from npucc import tables
from npucc.cli import terminal
from npucc.feeds import Feed, check_feed
from npucc.files import json_text, write_array, write_bytes, write_text
from npucc.package import Package
from runtime import Stop

SHOWN_VALUES = 8


def line_and_turn(text: str | None) -> tuple[int, int] | None:
    """`57` or `57:3`: a line of the program's text, and which execution of it."""
    if text is None:
        return None
    line, _, turn = text.partition(":")
    try:
        found = int(line), int(turn or 1)
    except ValueError:
        found = 0, 0
    if min(found) < 1:
        told = f"{text!r} is no line; write a line's number as `npucc disasm` counts them, and which execution of it if not the first: 57:3"
        raise typer.BadParameter(told, param_hint="'--until'")
    return found


def run_until(package: Package, feed: Feed, place: tuple[int, int], *, folder: Path | None, json: bool) -> None:
    """One sample up to a line; what that line read and wrote is shown, the memories go into the folder."""
    stop = package.machine.run_until(check_feed(feed, package.inputs), place[0], turn=place[1])
    found = {"line": place[0], "turn": place[1], "instruction": stop.instruction.name, "executed": stop.executed, "cycle": stop.cycle}
    if folder is not None:
        write_memories(stop.memories, folder, found)
        for name, values in stop.operands.items():
            write_array(folder / f"operand_{name}.npy", values)
    if json:
        terminal.show_json(found | {"operands": {name: _summary(values) for name, values in stop.operands.items()}})
        return
    terminal.show(_table(stop), "")
    terminal.show(tables.facts([("line", _line(package, place)), ("executed", f"{stop.executed:,} instructions"), ("cycle", f"{stop.cycle:,}")]))


def write_memories(memories: Mapping[str, Any], folder: Path, about: Mapping[str, Any]) -> None:
    """`dram.bin`, `spm.bin`, `acc.bin`: the bytes as they lie; `memory.json` says when."""
    folder.mkdir(parents=True, exist_ok=True)
    for space, values in memories.items():
        write_bytes(folder / f"{space}.bin", values.tobytes())
    write_text(folder / "memory.json", json_text({**about, "bytes": {space: len(values) for space, values in memories.items()}}) + "\n")


def _table(stop: Stop) -> Any:
    """The operands after the instruction: result first."""
    rows = []
    for name, values in stop.operands.items():
        summary = _summary(values)
        shown = " ".join(map(str, values.reshape(-1)[:SHOWN_VALUES])) + (" …" if values.size > SHOWN_VALUES else "")
        rows.append((name, summary["dtype"], "×".join(map(str, summary["shape"])), shown, values.min(), values.max()))
    return tables.grid(f"operands of {stop.instruction.name}, after it", ("operand", "type", "shape", "values", "low", "high"), rows, left=4)


def _summary(values: Any) -> dict[str, Any]:
    return {"dtype": values.dtype.name, "shape": list(values.shape), "low": values.min().item(), "high": values.max().item()}


def _line(package: Package, place: tuple[int, int]) -> str:
    line, turn = place
    return f"{line}, execution {turn}: {' '.join(package.text.splitlines()[line - 1].split())}"
