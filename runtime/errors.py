"""The one error of the machine: a program or an input that it can't run."""

from __future__ import annotations

from isa.errors import IsaError


class RuntimeFault(IsaError):  # noqa: N818  a fault of the machine, as hardware has them
    """A tile outside its memory, operands that do not fit together, a deadlock, or inputs that do not fit the program."""
