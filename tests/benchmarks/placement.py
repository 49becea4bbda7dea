"""Where each operator of a model goes: one table per model, and the host's share of the work.

    python -m tests.benchmarks.placement MODEL.onnx … [--shape MODEL:INPUT=1,3,224,224]

MODEL in `--shape` is the file's name without its ending. Nothing is calibrated. The exit code is 1 where the host multiplies, or does 1 % or
more of the other work.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from npucc import operations, operators
from npucc.frontend import import_model

LEAST = 0.01  # of the work that is not multiply-accumulates
Shapes = Mapping[str, tuple[int, ...]]


def show(path: Path, shapes: Shapes) -> bool:
    """Print the table of a model; whether the host does next to nothing."""
    rows = operators.place(path, shapes)
    split = operations.count(import_model(path, shapes=shapes, host=True))
    places: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        places[row.place][row.operator] += 1
    print(
        f"{path.stem}: {len(rows)} nodes, {split.npu.macs + split.host.macs:,} MACs ({split.mac_share:.2%} on the host), "
        f"{split.npu.elements + split.host.elements:,} other element operations ({split.element_share:.2%} on the host)"
    )
    for place in operators.PLACES:
        if places[place]:
            print(f"  {place}: " + ", ".join(f"{operator} {count}" for operator, count in places[place].most_common()))
    return split.host.macs == 0 and split.element_share < LEAST


def shapes_of(texts: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """By model."""
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for text in texts:
        where, _, sizes = text.partition("=")
        name, _, port = where.partition(":")
        found[name][port] = tuple(int(size) for size in sizes.split(","))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--shape", action="append", default=[])
    chosen = parser.parse_intermixed_args()
    shapes = shapes_of(chosen.shape)
    passed = [show(path, shapes.get(path.stem, {})) for path in chosen.models]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
