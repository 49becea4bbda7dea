"""Damaged programs, packages and graphs: run, or refused in the words of the tools. `tests.fuzz.hostile` does the same for longer."""

from __future__ import annotations

import npucc
from tests.fuzz.hostile import attack


def test_damage_is_refused_or_run(demo_package: npucc.Package) -> None:
    outcomes = {attack(demo_package.contents, seed) for seed in range(150)}
    assert {"file: refused", "graph: refused", "text: refused by the parser", "text: accepted by the checker, run"} <= outcomes
