"""Where each ONNX operator runs, and where each node of a model does: `npucc ops`, OPERATORS.md and `npucc compile --check`.

The one big idea: nothing is written down here that stands elsewhere. What can be imported comes from `frontend.OPERATORS` with its notes,
engines from the traits in `ops.TABLE`, the rest of the operators from the installed onnx.

`python -m npucc.operators` writes OPERATORS.md anew; a test compares it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from npucc.frontend import control, functions, importer, operators
from npucc.frontend.constants import BOUNDED, NOT_CONSTANT
from npucc.frontend.hosting import NO_TENSORS
from npucc.frontend.load import load_model
from npucc.frontend.operators import quantized
from npucc.frontend.prepare import prepare
from npucc.ops import OPS, Operator, Pool, Reduce
from npucc.segments import attributes_of

MANUAL = Path(__file__).parent / "OPERATORS.md"
MATRIX, VECTOR, MOVES, FOLDED, HOST = "matrix engine", "vector engine, int8", "DMA or view", "folded", "host"
PLACES = {
    MATRIX: "int8 products in the matrix engine, int32 sums",
    VECTOR: "integers in the vector engine: by table, elementwise, over windows or rows",
    MOVES: "only bytes move: often no instruction at all, else DMA",
    FOLDED: "computed when the model is compiled",
    HOST: "onnxruntime, as part of a host segment",
}
#: what an operator group of the frontend comes down to, where it is not the vector engine
GROUPS = dict.fromkeys(("matrix", "linear", "recurrent", "attention", "transformer", "blocks"), MATRIX) | {"layout": MOVES, "quantized": FOLDED}
#: operators that come down to something else than the rest of their group
ENGINES = {
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization", "CumSum", "Attention", "CausalConvWithState"), MATRIX),
    **dict.fromkeys(("Compress", "GatherElements", "GatherND", "ReverseSequence", "Scatter", "ScatterElements", "ScatterND"), MOVES),
    **dict.fromkeys(("RotaryEmbedding", "BiasGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization"), VECTOR),
    "CenterCropPad": MOVES, "GatherBlockQuantized": MOVES, "IsInf": FOLDED, "IsNaN": FOLDED,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Support:
    """Where an ONNX operator runs, under which conditions, or why not on the NPU."""

    name: str
    place: str
    note: str


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a node of a model runs; `reason` where that is the host."""

    node: str
    operator: str
    place: str
    reason: str


def engine(record: Operator) -> str:
    """Who runs a graph operator."""
    if record.host:
        return HOST
    if record.float_only:
        return FOLDED
    if record.matrix:
        return MATRIX
    return MOVES if record.moves_data and not issubclass(record.attributes, Pool | Reduce) else VECTOR


def table() -> tuple[Support, ...]:
    """Every operator of the installed onnx's default domain, and those of other domains that can be imported, by name."""
    known = {schema.name: schema for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    groups = {id(record): group for group, records in operators.GROUPS.items() for record in records}
    rows = {}
    for (domain, name), record in operators.OPERATORS.items():
        title = f"{domain}.{name}" if domain else name
        rows[title] = Support(title, ENGINES.get(name, GROUPS.get(groups[id(record)], VECTOR)), record.note)
    for each in quantized.WRITTEN_OUT:
        title, written = (f"{domain}.{name}" if domain else name for domain, name in ((each.domain, each.name), (each.where, each.operator)))
        rows[title] = Support(title, rows[written].place, f"as {each.operator}; {each.note}")
    for name, note in (*functions.EXPANDED.items(), *control.WRITTEN_OUT.items()):
        rows[name] = Support(name, ENGINES.get(name, VECTOR), note)
    for name, schema in known.items():
        rows.setdefault(name, Support(name, FOLDED, importer.FOLDED[name]) if name in importer.FOLDED else Support(name, HOST, _why_host(schema)))
    return tuple(rows[name] for name in sorted(rows))


def _why_host(schema: onnx.defs.OpSchema) -> str:
    """Why an operator that can't be imported can't."""
    name = schema.name
    if schema.deprecated:
        return "deprecated"
    if name in importer.CONTROL_FLOW:
        return "control flow"
    if NO_TENSORS.search(name):
        return "sequences, optional values and strings exist on the host only"
    if name in BOUNDED and name != "TopK":
        return "the size of its result depends on data"
    if name in NOT_CONSTANT:
        return "random numbers"
    return "no integer form yet"


def manual() -> str:
    """OPERATORS.md."""
    rows = table()
    counts = Counter(row.place for row in rows)
    places = "\n".join(f"| {place} | {counts[place]} | {meaning} |" for place, meaning in PLACES.items())
    lines = "\n".join(f"| {row.name} | {row.place} | {row.note.replace('|', '/')} |" for row in rows)
    return f"""# ONNX operators and where they run

Generated by `python -m npucc.operators`; do not edit. onnx's default domain as of opset {onnx.defs.onnx_opset_version()}, and the operators of
other domains that can be imported.

Whatever has only constant inputs is folded. A node that does not meet the conditions given here goes to the host, like an operator that
is listed there, with the reason in the report; `npucc compile --check MODEL` tells beforehand, `--no-host` makes it an error.

| place | operators | what runs there |
|---|---|---|
{places}

| operator | place | conditions, or why not on the NPU |
|---|---|---|
{lines}
"""


def place(model: str | Path | onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Placed, ...]:
    """Every node of a model that its outputs depend on, in order. Raises ImportModelError."""
    graph = importer.import_model(model, shapes=shapes, host=True)
    engines: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for node in graph:
        if OPS[node.op].host:
            reasons |= {name: reason for name, _, reason in attributes_of(node).nodes}
        for source in node.sources:
            engines.setdefault(source, []).append(engine(OPS[node.op]))
    proto, file = load_model(model)
    return tuple(_placed(node.name, node.op_type, engines, reasons) for node in prepare(proto, file))


def _placed(name: str, operator: str, engines: Mapping[str, list[str]], reasons: Mapping[str, str]) -> Placed:
    if name in reasons:
        return Placed(name, operator, HOST, reasons[name])
    found = engines.get(name, [FOLDED])
    return Placed(name, operator, next(each for each in (MATRIX, VECTOR, MOVES, FOLDED) if each in found), "")


def summary(rows: tuple[Placed, ...]) -> Iterator[tuple[str, int]]:
    """(place, number of nodes) of the places in use."""
    counts = Counter(row.place for row in rows)
    return ((each, counts[each]) for each in PLACES if counts[each])


if __name__ == "__main__":
    MANUAL.write_text(manual(), encoding="utf-8")
