"""Energy: counted events times what one of them costs on the target.

The one big idea: a sum anyone can check by hand. The picojoules per event are fields of the target; their sources are printed
with every report.
"""

from __future__ import annotations

from isa.target import Target
from runtime.costs import Work

#: what the default numbers of a target go back to
SOURCES = {
    "mac": "int8 multiply-accumulate 0.2 + 0.03 pJ and its registers, 45 nm: Horowitz, ISSCC 2014",
    "vector": "float32 add 0.9 pJ and control, 45 nm: Horowitz, ISSCC 2014",
    "spm": "64-bit access of a 1 MB SRAM 100 pJ, 45 nm: Horowitz, ISSCC 2014",
    "acc": "64-bit access of a 32 KB SRAM 20 pJ, 45 nm: Horowitz, ISSCC 2014",
    "dram": "LPDDR4 8 pJ/bit: accelergy-cacti-plug-in",
}


def energy(work: Work, target: Target) -> dict[str, float]:
    """Picojoules by component, in the order of SOURCES."""
    return {
        "mac": work.macs * target.pj_mac,
        "vector": work.vector_operations * target.pj_vector,
        "spm": work.spm_bytes * target.pj_spm_byte,
        "acc": work.acc_bytes * target.pj_acc_byte,
        "dram": work.dram_bytes * target.pj_dram_byte,
    }
