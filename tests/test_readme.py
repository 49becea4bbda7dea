"""The pages for readers are true: their Python runs, their commands print what they show, their links lead somewhere.

`pytest tests/test_readme.py --update-golden` writes the outputs of today into the pages. A line `…` stands for lines left out.
Calibration runs in onnxruntime, whose last bits may depend on its version and the processor, and what follows from them may be another choice of
16 bits. So all is compared (numbers with a decimal point loosely) on a machine like that which wrote the pages (`golden/machine.txt`); elsewhere
what `npucc targets` lists, and of other commands the labels of their lines and the accuracies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in ("isa", "runtime", "npucc", "examples") for page in (ROOT / name).rglob("*.md"))])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)[^)\s]*\)")
NUMBER = re.compile(r"(?:(?<![\w.])-)?\d[\d,]*\.?\d*")
LABEL = re.compile(r"^[A-Za-z][A-Za-z ]*?(?=  )", re.MULTILINE)
WRITTEN = Path(__file__).parent / "golden" / "machine.txt"
SHELL = 'npucc() { "$PYTHON" -m npucc "$@"; }; python() { "$PYTHON" "$@"; }; set -o pipefail; '


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the examples and the bundled files at the paths that the pages use."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "npucc" / "demo", tmp_path / "npucc" / "demo", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, folder: Path) -> str:
    """What a command prints, errors included."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-c", SHELL + command]
    done = subprocess.run(shell, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"`{command}` failed:\n{done.stdout}"
    return done.stdout.strip("\n")


def sessions(text: str) -> list[tuple[str, str]]:
    """(command, output) of every console block."""
    pairs = []
    for language, body in FENCE.findall(text):
        if language == "console":
            parts = re.split(r"^\$ (.*)\n", body, flags=re.MULTILINE)[1:]
            pairs += list(zip(parts[::2], (output.strip("\n") for output in parts[1::2]), strict=True))
    return pairs


def machine() -> str:
    """What the last bits of calibration may depend on: onnxruntime, and what the processor can do."""
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", ())
    return "\n".join((f"onnxruntime {onnxruntime.__version__}", *features)) + "\n"


def alike(shown: str, found: str) -> bool:
    """Whether two machines may have written this: the same labels, accuracies that differ by decimals only."""
    lines = found.split("\n")
    accuracies = [line for line in shown.split("\n") if LABEL.match(line) and "accuracy" in line]
    return set(LABEL.findall(shown)) <= set(LABEL.findall(found)) and all(any(same_line(line, other) for other in lines) for line in accuracies)


def same(shown: str, found: str) -> bool:
    """Equal but for decimals, and for what `…` leaves out."""
    head, dots, tail = shown.partition("\n…\n")
    if dots:
        first, last = head.count("\n") + 1, tail.count("\n") + 1
        lines = found.split("\n")
        return len(lines) > first + last and same(head, "\n".join(lines[:first])) and same(tail, "\n".join(lines[-last:]))
    return all(left is not None and right is not None and same_line(left, right) for left, right in zip_longest(shown.split("\n"), found.split("\n")))


def same_line(shown: str, found: str) -> bool:
    numbers = list(zip(NUMBER.findall(shown), NUMBER.findall(found), strict=False))
    blank = [re.sub(r"[\s─]+", " ", NUMBER.sub("#", line)) for line in (shown, found)]
    return blank[0] == blank[1] and all(same_number(*pair) for pair in numbers)


def same_number(shown: str, found: str) -> bool:
    left, right = (float(number.replace(",", "")) for number in (shown, found))
    return left == right or ("." in shown and abs(left - right) <= max(1.0, 0.02 * abs(left)))


def shortened(shown: str, found: str) -> str:
    """The output of today, left out where it was before."""
    head, dots, tail = shown.partition("\n…\n")
    lines = found.split("\n")
    return "\n".join([*lines[: head.count("\n") + 1], "…", *lines[-tail.count("\n") - 1 :]]) if dots else found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_print_what_the_page_shows(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    text = page.read_text(encoding="utf-8")
    update = request.config.getoption("--update-golden")
    like_the_writer = WRITTEN.read_text(encoding="utf-8") == machine()
    for command, shown in sessions(text):
        found = run(command, folder)
        if update:
            before, after = (f"$ {command}\n{output}\n" if output else f"$ {command}\n" for output in (shown, shortened(shown, found)))
            assert before in text
            text = text.replace(before, after, 1)
        else:
            agree = same if like_the_writer or command.startswith("npucc targets") else alike
            advice = "if that is right: pytest tests/test_readme.py --update-golden"
            assert agree(shown, found), f"{page.name}: `{command}` now prints\n{found}\n\n{advice}"
    if update and sessions(text):
        page.write_text(text, encoding="utf-8")
        WRITTEN.write_text(machine(), encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_python_runs(page: Path, folder: Path) -> None:
    """All Python of a page, in order, as one program."""
    code = "\n".join(body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python")
    if code:
        (folder / "page.py").write_text(code, encoding="utf-8")
        run("python page.py", folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if "import torch" not in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example: Path, folder: Path) -> None:
    assert run(f"python -W error examples/{example.name}", folder)


def test_the_comparison_can_fail() -> None:
    assert same("a 1.25 of 10\n…\nend 7", "a 1.30 of 10\nx\ny\nend 7")
    assert not same("a 1.25 of 10", "a 1.25 of 11")
    assert not same("a 1.25", "b 1.25")
    assert not same("a\nb", "a")
    assert not same("93.25%", "81.00%")
    assert not same("a\n…\nend 7", "a\nend 8")
    assert same("drop  -0.50 points", "drop  0.25 points")
    assert not same("drop  -0.50 points", "drop  3.25 points")
    assert not same("zero=-3", "zero=3")
    assert alike("network  a, 25 layers\nNPU accuracy  93.25%", "network  a, 27 layers\nNPU accuracy  93.50%\nloss  1")
    assert not alike("network  a, 25 layers\ncycles  9", "network  a, 25 layers")
    assert not alike("NPU accuracy  93.25%", "NPU accuracy  53.25%")
