"""The errors of the instruction set: each says where, what was found, what was expected and what to do.

    IsaError
    ├── ParseError      the text is not npuasm
    ├── CheckError      the text is npuasm, but not a legal program for its target
    ├── PackageError    the package is damaged or of another version
    └── TargetError     a target description is wrong
"""

from __future__ import annotations


class IsaError(Exception):
    """A fault in a program, package or target. `line` and `column` count from 1; 0 means "no one place"."""

    def __init__(self, message: str, *, file: str = "", line: int = 0, column: int = 0, hint: str = ""):
        self.message, self.file, self.line, self.column, self.hint = message, file, line, column, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        return (f"{place}: " if place else "") + self.message + (f"\n  hint: {self.hint}" if self.hint else "")


class ParseError(IsaError):
    """The text does not follow the grammar or the instruction table."""


class CheckError(IsaError):
    """A legal text that its target cannot run, or whose result would depend on timing."""


class PackageError(IsaError):
    """A `.npu` file that is damaged, incomplete or of another version."""


class TargetError(IsaError):
    """A target description with a missing, unknown or impossible field."""
