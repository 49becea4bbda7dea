"""Targets: the shipped ones load, wrong ones are refused by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from isa import Layer, Program, Target, TargetError, format_program, load_target, parse_program, target_names


@pytest.mark.parametrize("name", target_names())
def test_shipped_targets_load_and_travel_with_the_text(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.description
    program = Program(target, (), (), (), 0, 0, 0, (Layer("a", "b", (), 0, ()),))
    assert parse_program(format_program(program)).target == target


def test_peak_is_derived() -> None:
    assert Target("a", rows=4, cols=8, depth=3).macs_per_cycle == 32
    assert Target("a", rows=4, cols=8, depth=3, family="mac").macs_per_cycle == 96


WRONG = {
    'family = "gpu"': "family is 'gpu'\n  hint: use 'systolic' or 'mac'",
    'dataflow = "xs"': "dataflow is 'xs'\n  hint: use 'ws' or 'os' or 'is'",
    "rows = 0": "rows is 0\n  hint: it must be at least 1, and below 2**48",
    "dram_latency = -1": "dram_latency is -1\n  hint: it cannot be negative, nan or 2**48 and above",
    "clock_hz = nan": "clock_hz is nan\n  hint: it must be above 0, and below 2**48",
    "pj_mac = nan": "pj_mac is nan\n  hint: it cannot be negative, nan or 2**48 and above",
}


@pytest.mark.parametrize("line", WRONG)
def test_impossible_fields_are_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        load_target(path)
    assert str(caught.value).endswith(WRONG[line])


def test_unknown_fields_types_and_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    for line, message in (("rowz = 1", "a.toml: unknown field 'rowz'"), ('rows = "4"', "a.toml: rows is '4'"), ("rows =", "a.toml: not a TOML file")):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(TargetError, match=message):
            load_target(path)
    with pytest.raises(TargetError, match=rf"no target 'edgy'\n  hint: known: {', '.join(target_names())}; or give a .toml file"):
        load_target("edgy")
