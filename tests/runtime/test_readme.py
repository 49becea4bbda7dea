"""The README's program runs, and prints what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[2] / "runtime" / "README.md"


def test_the_snippet_runs() -> None:
    text = README.read_text(encoding="utf-8")
    snippet = text.partition("```python\n")[2].partition("```")[0]
    found: dict[str, object] = {}
    exec(snippet, found)  # noqa: S102  the README of this repository
    run, weights = found["run"], found["weights"]
    assert isinstance(weights, np.ndarray)
    stored = np.clip(np.rint(np.float32(1) / np.float32(0.1)) - 3, -128, 127)
    sums = (stored * weights.reshape(8, 8).astype(np.int64)).sum(axis=0)
    expected = np.clip(np.rint(sums.astype(np.float32) * np.float32(0.01)) + 5, -128, 127)
    assert run.raw["y"][0, :, 1, 1].tolist() == expected.tolist()  # type: ignore[attr-defined]
    stated = dict(re.findall(r"(ideal|underuse|fill|dma_stall|sync_stall)=(\d+)", snippet))
    layer = run.report.layers[0]  # type: ignore[attr-defined]
    assert {name: str(getattr(layer, name)) for name in stated} == stated
    assert len(stated) == 5
