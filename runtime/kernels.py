"""What each instruction does: one `bind` function per line of the instruction table.

The one big idea: a kernel is bound once, to the arrays its operands name, and returns a closure without arguments that runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from isa.spec import SPEC
from runtime.errors import RuntimeFault
from runtime.host import bind_give, bind_host, bind_take
from runtime.kernels_elementwise import bind_copy, bind_elementwise, bind_fill, bind_gather, bind_lut
from runtime.kernels_matrix import bind_conv, bind_dwconv, bind_matmul
from runtime.kernels_window import bind_avgpool, bind_maxpool, bind_reduce, bind_resize
from runtime.requantize import bind_requant
from runtime.site import Run, Site

Bind = Callable[[Site], Run]
ENGINES = ("numpy", "numba")
#: the environment variable that chooses the engine where no argument does
VARIABLE = "NPU_ENGINE"

KERNELS: dict[str, Bind] = {
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


def kernels_of(engine: str | None = None) -> Mapping[str, Bind]:
    """The kernels of an engine: `numpy`, or `numba`, which compiles what pays; both give the same bytes.

    Without a name: what the environment variable NPU_ENGINE says, else numba if it can be imported. Raises RuntimeFault.
    """
    name = engine or os.environ.get(VARIABLE)
    if name and name not in ENGINES:
        raise RuntimeFault(f"unknown engine {name!r}", hint=f"use one of {', '.join(ENGINES)}")
    if name == "numpy":
        return KERNELS
    try:
        from runtime import fast
    except ImportError as error:
        if not name:
            return KERNELS
        raise RuntimeFault(f"the engine 'numba' cannot be used: {error}", hint="pip install 'npucc[fast]', or use the engine 'numpy'") from error
    return KERNELS | {mnemonic: _either(bind, KERNELS[mnemonic]) for mnemonic, bind in fast.KERNELS.items()}


def _either(first: Callable[[Site], Run | None], second: Bind) -> Bind:
    """The closure of the first kernel, or of the second where the first has none."""
    return lambda site: first(site) or second(site)
