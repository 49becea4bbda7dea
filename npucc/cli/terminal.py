"""Where output goes: results to standard output; warnings and progress to standard error.

The one big idea: standard output holds only what was asked for, so that it can be piped; JSON is alone there.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from npucc.files import json_text, write_text

PIPE_WIDTH = 160  # of tables that are not read on a terminal

Report = Callable[[str, int, int], None]


def show(*parts: RenderableType) -> None:
    """Print tables and text on standard output: coloured on a terminal; elsewhere plain, wide and without trailing blanks."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    if console.is_terminal:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
        return
    plain = Console(file=io.StringIO(), highlight=False, markup=False, width=PIPE_WIDTH)
    with plain.capture() as captured:
        for part in parts:
            plain.print(part, soft_wrap=isinstance(part, str))
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().split("\n")))


def width() -> int:
    """Columns to print in."""
    console = Console(file=sys.stdout)
    return console.width if console.is_terminal else PIPE_WIDTH


def show_json(value: object) -> None:
    """The one JSON value of a command."""
    sys.stdout.write(json_text(value) + "\n")


def write_or_show(text: str, path: Path | None) -> None:
    """Plain text into a file, or to standard output."""
    if path is None:
        sys.stdout.write(text)
    else:
        write_text(path, text)


def warn(message: str) -> None:
    """A line on standard error that the user should see."""
    Console(file=sys.stderr, highlight=False, markup=False).print(f"warning: {message}", style="yellow", soft_wrap=True)


def note(message: str) -> None:
    """A line on standard error about what was done."""
    Console(file=sys.stderr, highlight=False, markup=False).print(message, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Report]:
    """`report(what, done, total)`: a line on standard error that is gone in the end; nothing if that is no terminal."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _silent
        return
    columns = (SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as display:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    display.update(task, visible=False)
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done, total=total)

        yield report


def _silent(what: str, done: int, total: int) -> None:  # noqa: ARG001  the shape of a Report
    return None
