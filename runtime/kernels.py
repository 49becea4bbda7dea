"""What each instruction does: one `bind` function per line of the instruction table.

The one big idea: a kernel is bound once, to the arrays its operands name, and returns a closure without arguments that runs it.
"""

from __future__ import annotations

from collections.abc import Callable

from isa.spec import SPEC
from runtime.host import bind_give, bind_host, bind_take
from runtime.kernels_elementwise import bind_copy, bind_elementwise, bind_fill, bind_gather, bind_lut
from runtime.kernels_matrix import bind_conv, bind_dwconv, bind_matmul
from runtime.kernels_window import bind_avgpool, bind_maxpool, bind_reduce, bind_resize
from runtime.requantize import bind_requant
from runtime.site import Site

KERNELS: dict[str, Callable[[Site], Callable[[], None]]] = {
    "ld": bind_copy, "st": bind_copy, "gather": bind_gather,
    "conv": bind_conv, "dwconv": bind_dwconv, "matmul": bind_matmul,
    "requant": bind_requant,
    **dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "cmp", "select", "cvt", "sqrt"), bind_elementwise),
    "lut": bind_lut, "fill": bind_fill,
    "maxpool": bind_maxpool, "avgpool": bind_avgpool, "reduce": bind_reduce, "resize": bind_resize,
    "take": bind_take, "host": bind_host, "give": bind_give,
}  # fmt: skip

if KERNELS.keys() != SPEC.keys():
    raise AssertionError(f"kernels and instruction table differ: {KERNELS.keys() ^ SPEC.keys()}")
