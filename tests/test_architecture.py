"""The one-way street holds: who may import whom, and that a hardware team can use `isa` and `runtime` alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import isa
import npucc
import runtime

STANDARD = set(sys.stdlib_module_names) | {"tomllib"}  # which Python 3.10 does not have yet
# google: protobuf, which is how onnx reads and writes
ALLOWED = {
    "isa": STANDARD | {"isa", "lark", "numpy", "tomli"},
    "runtime": STANDARD | {"isa", "runtime", "numpy"},
    "npucc": STANDARD | {"isa", "runtime", "npucc", "numpy", "google", "onnx", "onnxruntime", "networkx", "rich", "typer"},
}
#: modules of the optional compiled engine, and the files that may import them
OPTIONAL = {"runtime/compiled.py": {"numba", "llvmlite"}, "runtime/native.py": {"llvmlite"}}
FOLDERS = {"isa": isa, "runtime": runtime, "npucc": npucc}


def sources(package: str) -> list[Path]:
    folder = Path(next(iter(FOLDERS[package].__path__)))
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(top-level module, line) of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            yield (node.module or "").partition(".")[0], node.lineno


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    files = sources(package)
    assert files
    wrong = [
        f"{path}:{line}: {package} imports {name}"
        for path in files
        for name, line in imports(path)
        if name not in ALLOWED[package] | OPTIONAL.get(f"{path.parent.name}/{path.name}", set())
    ]
    assert not wrong, "\n".join(wrong)


WITHOUT_COMPILER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"npucc", "onnx", "onnxruntime", "networkx", "typer", "rich"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
from isa.package import load
from runtime import Machine

package = load(sys.argv[1])
with np.load(sys.argv[2]) as feed:
    run = Machine(package).run({name: feed[name] for name in feed.files})
np.savez(sys.argv[3], cycles=run.report.cycles, **run.raw)
"""


def test_a_package_runs_without_the_compiler(demo_package: npucc.Package, tmp_path: Path) -> None:
    """In a process where npucc, onnx and networkx can't be imported: the same bytes and cycles."""
    feed = {"image": np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)}
    here = demo_package.run(feed)
    demo_package.save(tmp_path / "a.npu")
    np.savez(tmp_path / "in.npz", image=feed["image"])
    command = [sys.executable, "-c", WITHOUT_COMPILER, *(str(tmp_path / name) for name in ("a.npu", "in.npz", "out.npz"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as there:
        assert int(there["cycles"]) == here.cycles
        for name, raw in here.raw.items():
            assert there[name].dtype == raw.dtype
            assert np.array_equal(there[name], raw)


def test_the_package_imports_nothing_heavy_until_it_is_used() -> None:
    """`npucc --help` must not wait for onnx and onnxruntime."""
    code = "import sys, npucc.cli; print([name for name in ('onnx', 'onnxruntime', 'networkx') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
