"""What one inference gives: values, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.memory import Array
from runtime.report import LayerReport, Report


@dataclass(frozen=True, slots=True)
class Result:
    """One inference. Arrays are in the model's (logical) shapes, outputs in its order.

    `outputs`: what the outputs stand for (float32, or the model's integer or boolean type); `raw`: as stored;
    `tensors`: the stored values of the tensors that were asked for; `report`: cycles, bytes, energy.
    """

    outputs: dict[str, Array]
    raw: dict[str, Array]
    tensors: dict[str, Array]
    report: Report

    @property
    def cycles(self) -> int:
        return self.report.cycles

    @property
    def macs(self) -> int:
        return self.report.macs

    @property
    def utilization(self) -> float:
        """Ideal MAC cycles over cycles."""
        return self.report.utilization

    @property
    def energy_pj(self) -> float:
        return self.report.energy_pj

    @property
    def dram_read_bytes(self) -> int:
        return self.report.dram_read_bytes

    @property
    def dram_write_bytes(self) -> int:
        return self.report.dram_write_bytes

    @property
    def spm_peak_bytes(self) -> int:
        return self.report.spm_peak_bytes

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        return self.report.layers
