"""The errors a user can cause. Each says where, what was found, what was expected and what to do.

    NpuccError
    ├── ImportModelError   the ONNX model can't be taken
    │   ├── NotHeldError   an input or output is nothing that the machine's memory can hold
    │   └── DamagedError   a node that yields nothing of use wherever it runs
    ├── GraphError         a stage produced a graph that does not verify
    ├── QuantizeError      calibration data or options do not fit the model
    ├── PruneError         pruning options or data do not fit the model
    ├── CompileError       the network does not fit the target
    └── DataError          input or label data do not fit the model

Errors of programs, packages and targets are `isa.errors.IsaError`; a fault while running is `runtime.errors.RuntimeFault`.
"""

from __future__ import annotations


class NpuccError(Exception):
    """A clear message for the user: `node` is the ONNX node (or tensor) at fault, `hint` what to do."""

    def __init__(self, message: str, *, file: str = "", node: str = "", hint: str = ""):
        self.message, self.file, self.node, self.hint = message, file, node, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.file, f"node {self.node!r}" if self.node else "") if part)
        return (f"{place}: " if place else "") + self.message + (f"\n  hint: {self.hint}" if self.hint else "")


class ImportModelError(NpuccError):
    """The ONNX model is damaged, or uses something that can't be compiled."""


class NotHeldError(ImportModelError):
    """An input or output that is no tensor of numbers with at least one element: a string, a sequence, an optional value, an empty tensor."""


class DamagedError(ImportModelError):
    """A node that is not moved to the host, as it yields nothing of use there either."""


class GraphError(NpuccError):
    """A graph that does not verify."""


class QuantizeError(NpuccError):
    """Calibration data or quantization options that do not fit the model."""


class PruneError(NpuccError):
    """Pruning options or data that do not fit the model."""


class CompileError(NpuccError):
    """A layer that the target can't hold or run."""


class DataError(NpuccError):
    """Inputs or labels that do not fit the model."""
