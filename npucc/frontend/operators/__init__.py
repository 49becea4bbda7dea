"""The ONNX operators that can be imported: one record each, grouped by what they do.

The one big idea: the differences between ONNX opsets end here. An importer reads attributes or inputs, whichever its opset uses, and emits
canonical nodes.
"""

from npucc.frontend.node import Importer
from npucc.frontend.operators import (
    attention,
    blocks,
    elementwise,
    indexing,
    integers,
    layout,
    linear,
    matrix,
    normalization,
    pooling,
    quantized,
    recurrent,
    reduction,
    resize,
    transformer,
)

#: the records by the module that has them
GROUPS: dict[str, tuple[Importer, ...]] = {
    module.__name__.rpartition(".")[2]: module.TABLE
    for module in (
        matrix, linear, elementwise, integers, pooling, reduction, normalization, layout, indexing, resize, recurrent, attention, transformer,
        quantized, blocks,
    )
}  # fmt: skip
TABLE: tuple[Importer, ...] = tuple(record for group in GROUPS.values() for record in group)
OPERATORS: dict[tuple[str, str], Importer] = {(record.domain, record.name): record for record in TABLE}


def supported_operators() -> tuple[tuple[str, str], ...]:
    """(operator, note) of every ONNX operator that can be imported, sorted."""
    return tuple(sorted((f"{record.domain}.{record.name}" if record.domain else record.name, record.note) for record in TABLE))


__all__ = ["GROUPS", "OPERATORS", "TABLE", "supported_operators"]
