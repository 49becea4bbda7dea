"""npucc: a compiler from ONNX to a virtual NPU, with the NPU.

    import npucc

    package = npucc.compile("model.onnx", target="edge", calibration=feeds)
    result = package.run({"x": array})

The one big idea: a one-way street of values. ONNX becomes a Graph, the Graph a Program, the Program a text that the machine runs;
nothing downstream knows what is upstream.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npucc.compiler import compile, stages, steps
    from npucc.errors import CompileError, DataError, GraphError, ImportModelError, NpuccError, PruneError, QuantizeError
    from npucc.package import Package, load
    from runtime.result import Result

__all__ = [
    "CompileError", "DataError", "GraphError", "ImportModelError", "NpuccError", "Package", "PruneError", "QuantizeError", "Result",
    "compile", "load", "stages", "steps",
]  # fmt: skip

_HOMES = {
    "compile": "npucc.compiler", "stages": "npucc.compiler", "steps": "npucc.compiler", "Package": "npucc.package", "load": "npucc.package",
    "Result": "runtime.result",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: `import npucc.feeds` must not wait for networkx and onnx."""
    if name not in __all__:
        raise AttributeError(f"module 'npucc' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "npucc.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
