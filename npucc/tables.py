"""Reports as tables for a reader. Every number is taken from the values that `--json` prints; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from isa.target import Target

if TYPE_CHECKING:
    from npucc.package import Package
    from npucc.segments import HostNode

SHOWN_HOST_NODES = 20
CYCLE_PARTS = ("ideal", "underuse", "fill", "dma_stall", "sync_stall")
WIDE_HEADERS = ("layer", "op", "cycles", "%", "ideal", "under-use", "fill", "DMA stall", "sync stall", "MACs", "DRAM", "energy")
NARROW_HEADERS = ("layer", "op", "cycles", "%", "ideal", "under", "fill", "DMA", "sync")
WIDE = 125  # columns of the terminal


def grid(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, footer: Sequence[object] | None = None) -> Table:
    """A plain table: the first `left` columns are names, which fold where the terminal is narrow; the others are numbers, which never do."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        show_footer=footer is not None,
    )
    for index, header in enumerate(headers):
        foot = str(footer[index]) if footer is not None else ""
        if index < left:
            table.add_column(header, footer=foot, overflow="fold", min_width=8)
        else:
            table.add_column(header, footer=foot, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_in_one_line(str(cell)) for cell in row))
    return table


def _in_one_line(text: str) -> str:
    """Names may hold anything: what moves the cursor is shown by its code."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Name and value, one pair per line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def totals(report: Mapping[str, Any], *, clock_hz: float) -> list[tuple[str, str]]:
    """The figures of one inference."""
    cycles = int(report["cycles"])
    at_most = "at most " if report.get("at_most") else ""
    return [
        ("cycles", f"{at_most}{cycles:,} ({duration(cycles / clock_hz)} at {clock_hz / 1e6:,.0f} MHz)"),
        *([("", "the target skips zero inputs: npucc run tells the cycles of an input")] if at_most else []),
        ("MACs", f"{at_most}{int(report['macs']):,}"),
        *_skipped(report),
        ("utilization", f"{report['utilization']:.1%} of the peak MAC rate"),
        ("DRAM", f"{size(report['dram_read_bytes'])} read, {size(report['dram_write_bytes'])} written"),
        ("scratchpad peak", size(report["spm_peak_bytes"])),
        ("energy", f"{energy(report['energy_pj'])} estimated: {_shares(report['energy'])}"),
        ("", f"counted events × energy per event ({energy_sources(report)})"),
    ]


def _skipped(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What skipping zeros saves, if it does."""
    if not report.get("skipped_macs"):
        return []
    before, after = report["array_utilization_unskipped"], report["array_utilization"]
    return [("skipped", f"{int(report['skipped_macs']):,} MACs; useful work of the array while it runs: {after:.1%}, without skipping {before:.1%}")]


def precision(quantized: Mapping[str, Any]) -> str:
    """How many activations have more than 8 bits, what that was worth and what it costs."""
    mixed, wide = quantized["mixed"], [row for row in quantized["tensors"] if row["dtype"] in ("s16", "s32")]
    text = f"{len(quantized['tensors'])} activations, {len(wide)} of them in 16 bits"
    if not mixed["judged"]:
        return text
    names = {name for each in mixed["chosen"] for name in each["tensors"]}  # those that only pass on another's values among them
    bought = sum(row["name"] in names for row in wide)
    chosen = f" ({bought} by measurement, {mixed['price']:+.1f}% cycles)" if bought else ""
    figures = f"{mixed['before']:.1f} → {mixed['after']:.1f} dB" if bought else f"{mixed['after']:.1f} dB"
    return f"{text}{chosen}; outputs measured at {figures}, at most {mixed['loss']:.2f} points lost"


def host(nodes: Sequence[HostNode], *, onnx_nodes: int, cycles: int, total: int) -> Table:
    """The nodes that do not run on the NPU, in order, and why; at most SHOWN_HOST_NODES of them."""
    segments = len({node.segment for node in nodes})
    title = (
        f"on the host: {len(nodes)} of {onnx_nodes} ONNX nodes, in {segments} segment{'s' * (segments != 1)}, "
        f"{cycles / max(total, 1):.1%} of the cycles (transfers and latency; the host's own time is not modelled)"
    )
    rows = [(node.name, node.operator, str(node.segment), node.reason) for node in nodes[:SHOWN_HOST_NODES]]
    rows += [("…", f"{len(nodes) - SHOWN_HOST_NODES} more", "", "")] if len(nodes) > SHOWN_HOST_NODES else []
    return grid(title, ("node", "operator", "segment", "why"), rows, left=4)


def work(operations: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The row that says how much of the work the host does; none where it does nothing."""
    if operations is None or not any(operations["host"].values()):
        return []
    macs, elements = operations["host_mac_share"], operations["host_element_share"]
    return [("on the host", f"{macs:.1%} of the MACs, {elements:.1%} of all other operations, counted in elements")]


def _shares(components: Mapping[str, float]) -> str:
    total = sum(components.values()) or 1.0
    return ", ".join(f"{name} {value / total:.0%}" for name, value in components.items())


def energy_sources(report: Mapping[str, Any]) -> str:
    """Where the energies per event come from, each source once: what follows the last colon of a component's note."""
    notes = report.get("energy_sources", {}).values()
    names = (str(note).rpartition(": ")[2].partition(" (")[0] for note in notes)
    return "; ".join(dict.fromkeys(names)) or "the target's energy table"


def layers(report: Mapping[str, Any], *, top: int | None = None, width: int = WIDE) -> Table:
    """Layers with the parts of their cycles: all in program order, or the `top` longest. Below WIDE columns the parts are percentages."""
    records: list[Mapping[str, Any]] = list(report["layers"])
    chosen = records if top is None or top >= len(records) else sorted(records, key=lambda layer: -int(layer["cycles"]))[:top]
    title = number(len(records), "layer") if len(chosen) == len(records) else f"the {len(chosen)} longest of {number(len(records), 'layer')}"
    whole = {part: sum(int(layer[part]) for layer in records) for part in CYCLE_PARTS}
    total = {"name": "total", "op": "", **report, **whole, "dram_bytes": report["dram_read_bytes"] + report["dram_write_bytes"]}
    row, headers = (_wide_row, WIDE_HEADERS) if width >= WIDE else (_narrow_row, NARROW_HEADERS)
    cycles = max(int(report["cycles"]), 1)
    return grid(title, headers, (row(layer, cycles) for layer in chosen), left=2, footer=row(total, cycles))


def counters(report: Mapping[str, Any]) -> Table:
    """How often each kind of instruction ran, and for how many cycles its engine was at work for it."""
    total = max(int(report["cycles"]), 1)
    rows = (
        (row["engine"], row["instruction"], f"{row['count']:,}", f"{row['cycles']:,}", f"{row['cycles'] / total:.1%}") for row in report["counters"]
    )
    return grid("instructions by engine", ("engine", "instruction", "executed", "cycles", "of all"), rows, left=2)


def _wide_row(layer: Mapping[str, Any], total: int) -> tuple[str, ...]:
    parts = (f"{int(layer[part]):,}" for part in CYCLE_PARTS)
    cost = (f"{int(layer['macs']):,}", size(layer["dram_bytes"]), energy(layer["energy_pj"]))
    return (layer["name"], layer["op"], f"{int(layer['cycles']):,}", f"{100 * layer['cycles'] / total:.1f}", *parts, *cost)


def _narrow_row(layer: Mapping[str, Any], total: int) -> tuple[str, ...]:
    cycles = max(int(layer["cycles"]), 1)
    parts = (f"{layer[part] / cycles:.0%}" for part in CYCLE_PARTS)
    return (layer["name"], layer["op"], f"{int(layer['cycles']):,}", f"{100 * layer['cycles'] / total:.1f}", *parts)


def pruning(report: Mapping[str, Any]) -> Table:
    """What pruning removed, layer by layer, and how well the rest was refitted."""
    rows = (
        (row["name"], row["op"], row["pattern"], *(f"{row[key]:,}" for key in ("weights", "kept", "macs", "macs_kept")), *_errors(row))
        for row in report["layers"]
    )
    headers = ("layer", "op", "pattern", "weights", "kept", "MACs", "kept", "error", "repaired")
    total = ("total", "", "", "", "", f"{report['macs']:,}", f"{report['macs_kept']:,}", "", f"{report['output_error']:.2%}")
    told = f", {report['cycles_kept']:,} of {report['cycles']:,} cycles" if report.get("compiled") else ""
    told += "" if report["loss"] is None else f", about {report['loss']:.2f} points lost"
    meaning = "error of each layer's result before and after the repair; the last line is the network's output"
    title = f"pruned until: {report['stopped']}{told}\n{meaning}"
    return grid(title, headers, rows, left=3, footer=total)


def _errors(row: Mapping[str, Any]) -> list[str]:
    return ["" if row[key] is None else f"{row[key]:.2%}" for key in ("error_before", "error_after")]


def chip(target: Target) -> str:
    """A target's name and what it is."""
    return f"{target.name} ({target.description})" if target.description else target.name


def program(package: Package) -> str:
    """How long a program is."""
    return f"{number(len(package.program.layers), 'layer')}, {number(package.instructions, 'instruction')}"


def number(count: int, noun: str) -> str:
    """`1 layer`, `25 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{int(count)} B"


def energy(picojoules: float) -> str:
    """Energy for a reader."""
    for unit, scale in (("J", 1e12), ("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)):
        if picojoules >= scale:
            return f"{picojoules / scale:,.2f} {unit}"
    return f"{picojoules:.0f} pJ"


def duration(seconds: float) -> str:
    """Time for a reader."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:,.3f} {unit}"
    return f"{seconds * 1e6:,.1f} µs"
