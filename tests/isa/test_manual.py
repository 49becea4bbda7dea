"""The manual is what the table says today, and the code in the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isa import TABLE, manual
from isa.text import parse_program

ROOT = Path(__file__).parents[2]


def test_manual_is_up_to_date() -> None:
    assert manual.MANUAL.read_text(encoding="utf-8") == manual.manual(), "run: python -m isa.manual"


def test_manual_describes_every_instruction() -> None:
    chapters = re.findall(r"^### (\w+)$", manual.manual(), re.MULTILINE)
    assert chapters == [spec.name for spec in TABLE]
    assert "None" not in manual.manual()


def test_format_line() -> None:
    spec = next(spec for spec in TABLE if spec.name == "matmul")
    assert manual.format_of(spec) == "matmul y, a, b [, c] [za=0] [zb=0] [accumulate=0] [wait=…] [signal=…]"


def test_text_in_the_manual_is_npuasm() -> None:
    """The chapter on text without its explanations to the right and its ellipses."""
    (block,) = re.findall(r"```\n(.*?)```", manual.TEXT, re.DOTALL)
    lines = (re.split(r"(?<=\S) {3,}", line)[0].replace(" …", "") for line in block.splitlines())
    program = parse_program("\n".join(line for line in lines if line.strip() != "…"))
    assert [layer.nodes for layer in program.layers] == [("Conv_1", "Relu_2")]


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "isa" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "isa/README.md", "exec"), {})  # noqa: S102  our own README
    shape, dtype, cycles = re.fullmatch(r"(\(.*\)) (\w+) (\d+)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert (shape, dtype) == ("(64, 32)", "int8")
    assert int(cycles) > 64 * 64 * 32 / 16  # the target's 4x4 array can't be quicker
