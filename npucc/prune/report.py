"""What was pruned, layer by layer: frozen records that become JSON or a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """Channels that lie in the same dimensions. `error`: energy of the outputs' error over that of the outputs, this family pruned alone."""

    name: str
    channels: int
    kept: int
    layers: tuple[str, ...]
    error: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One matrix operator: its pattern, if it got one; weights that stay of those that were there; the relative error of its answers (to those
    of the dense network at the outputs that stay, and what a residual connection now lacks) before and after the repair, the layers before it
    repaired; None where nothing was measured.

    `error_alone`: of the network's outputs, with this layer's pattern alone, where layers were chosen by it.
    """

    name: str
    op: str
    pattern: str
    weights: int
    kept: int
    macs: int
    macs_kept: int
    error_before: float | None
    error_after: float | None
    error_alone: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PruneReport:
    """`output_error`: energy of the error over that of the outputs, over calibration samples; `cycles`: estimated (see price.py), or, if `compiled`,
    of the programs that compiling gives, where there is a budget; `loss`: points of accuracy lost to pruning, in integers, estimated (see
    npucc.loss; each half of the samples judging what was fitted on the other), where there is a drop to keep; `stopped`: which limit ended
    the search."""

    macs: int
    macs_kept: int
    cycles: float
    cycles_kept: float
    output_error: float
    loss: float | None
    zero_channels: int
    families: tuple[FamilyRow, ...]
    layers: tuple[LayerRow, ...]
    stopped: str = ""
    compiled: bool = False

    def as_dict(self) -> dict[str, Any]:
        names = ("macs", "macs_kept", "cycles", "cycles_kept", "output_error", "loss", "zero_channels", "stopped", "compiled")
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "families": [row.as_dict() for row in self.families], "layers": [row.as_dict() for row in self.layers]}
