"""What a kernel is given when it is bound: the operands of one dynamic instruction as arrays.

The one big idea: everything that can be known before a run is known here (shapes, addresses, attributes, and the content of
operands that the program provably loads from its constants), so that the closure a kernel returns only computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from isa.program import Instruction
from runtime.errors import RuntimeFault
from runtime.gemm import FloatSums
from runtime.memory import Array
from runtime.scratch import Scratch

if TYPE_CHECKING:
    from runtime.host import Host

#: what a kernel returns: one execution of its instruction
Run = Callable[[], None]


@dataclass(frozen=True)
class Site:
    """One dynamic instruction: `views` by operand name (optional operands may be missing), every attribute by name.

    `constants` has (a key that stands for the content, the content) of operands where every run finds the same bytes.
    `memo` keeps what is made of such content, by key, for all sites of a program.
    `host` is what the instructions of the host queue talk to.
    `sums` are what operand a of a requant holds, as float32 without the bias; `offered` takes such sums from a matrix instruction.
    `window` stands for the content of the windows of a conv's operand x: equal ones hold the same values.
    """

    instruction: Instruction
    views: Mapping[str, Array]
    attributes: Mapping[str, Any]
    scratch: Scratch
    memo: dict[Any, Any]
    constants: Mapping[str, tuple[Any, Array]] = field(default_factory=dict)
    window: Any = None
    host: Host | None = None
    sums: FloatSums | None = None
    offered: list[FloatSums] = field(default_factory=list)

    def fault(self, message: str, hint: str = "") -> NoReturn:
        """Refuse this instruction."""
        raise RuntimeFault(f"{self.instruction.name}: {message}", line=self.instruction.line, hint=hint)


def sequence(*steps: Run | None) -> Run:
    """One closure for several; None is nothing to do."""
    present = [step for step in steps if step is not None]
    if len(present) == 1:
        return present[0]

    def run() -> None:
        for step in present:
            step()

    return run
