"""A program with a mistake is refused by the checker, or the mistake changes nothing, or it is another legal program."""

from __future__ import annotations

import pytest

import npucc
from isa import findings, load_target
from isa.discipline import suspicions
from npucc.lowering import lower
from tests.benchmarks import mutations
from tests.benchmarks.mutations import CAUGHT, OTHER, PROVED, SUSPECTED, UNSTABLE, Judge, Lines, judge_all, mutants, survivors, table

ADDRESSES = ("shift a result", "shift a read")


def test_mistakes_of_order_are_caught_or_none(demo_package: npucc.Package) -> None:
    """Whatever passes the checker gives the same bytes in every order; only addresses and swaps within a queue can make another program."""
    judged = judge_all(demo_package.contents, limit=6, orders=2, seed=0)
    told = f"{table(judged)}\n{survivors(judged)}"
    assert len({each.mutant.kind for each in judged}) == 13, told
    assert SUSPECTED in {each.verdict for each in judged}, told
    for each in judged:
        assert each.verdict != UNSTABLE, told
        if each.mutant.kind in ("delete a wait", "delete a signal"):
            assert each.verdict == CAUGHT, told
        elif not each.mutant.kind.startswith(ADDRESSES) and each.mutant.kind != "swap neighbours of one queue":
            assert each.verdict in (CAUGHT, PROVED), told
        assert each.verdict != OTHER or each.mutant.explanation, told
    assert sum(each.verdict != OTHER for each in judged) > 0.85 * len(judged), told


def test_a_blind_checker_would_be_seen(demo_package: npucc.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs without an event that they need do give bytes that depend on the order."""
    monkeypatch.setattr(mutations, "findings", lambda _: [])
    judge = Judge.of(demo_package.contents, orders=4, seed=0)
    without = [mutant for mutant in mutants(demo_package.program, limit=12, seed=1) if mutant.kind.startswith("delete an event")]
    assert UNSTABLE in {judge.judge(mutant).verdict for mutant in without}


def test_loops_are_written_out(demo_package: npucc.Package) -> None:
    lines = Lines.of(demo_package.program)
    assert not any(tile.steps for line in lines.body for tile in line.tiles)
    assert findings(lines.with_lines({})) == []


@pytest.mark.parametrize("target", ["edge", "cube", "tiny"])
def test_compiled_programs_have_no_marks_of_wrong_addresses(target: str, demo_package: npucc.Package) -> None:
    program = lower(demo_package.graph, load_target(target)).program
    assert suspicions(program) == []
