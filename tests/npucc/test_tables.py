"""Tables on narrow and wide terminals: names may fold, numbers are never cut."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType

import npucc
from npucc import tables


def text(part: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        console.print(part)
    return captured.get()


@pytest.mark.parametrize("width", [80, 100, 124, 125, 200])
def test_layers_fit_the_terminal_with_every_number_whole(width: int, demo_package: npucc.Package) -> None:
    report = demo_package.report.as_dict()
    shown = text(tables.layers(report, width=width), width)
    assert "…" not in shown
    assert all(len(line) <= width for line in shown.splitlines())
    found = set(re.findall(r"[\d,]+", shown))
    assert all(f"{layer['cycles']:,}" in found for layer in report["layers"])
    assert ("under-use" in shown) == (width >= tables.WIDE)


def test_the_longest_layers_come_first(demo_package: npucc.Package) -> None:
    shown = text(tables.layers(demo_package.report.as_dict(), top=3), 200)
    names = [line.split()[0] for line in shown.splitlines()[3:6]]
    assert names == [layer.name for layer in sorted(demo_package.report.layers, key=lambda layer: -layer.cycles)[:3]]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (tables.size(0), "0 B"),
        (tables.size(1023), "1023 B"),
        (tables.size(1024), "1.0 KiB"),
        (tables.size(5 << 30), "5.0 GiB"),
        (tables.energy(0), "0 pJ"),
        (tables.energy(1500), "1.50 nJ"),
        (tables.energy(2.5e9), "2.50 mJ"),
        (tables.duration(2.5), "2.500 s"),
        (tables.duration(0.0042), "4.200 ms"),
        (tables.duration(4.2e-5), "42.0 µs"),
    ],
)
def test_quantities(found: str, wanted: str) -> None:
    assert found == wanted


def test_energy_sources_are_named_once() -> None:
    report = {"energy_sources": {"a": "adder 1 pJ: Horowitz, ISSCC 2014 (twice)", "b": "memory: Horowitz, ISSCC 2014", "c": "dram: a paper"}}
    assert tables.energy_sources(report) == "Horowitz, ISSCC 2014; a paper"
    assert tables.energy_sources({}) == "the target's energy table"


def test_a_name_of_two_lines_stands_in_one() -> None:
    (name,) = tables.grid("", ("node",), [("conv\n[1]\x1b\u00e9",)]).columns[0].cells
    assert name == "conv\\n[1]\\x1b\u00e9"
