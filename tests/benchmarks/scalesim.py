"""Array cycles of a whole network against SCALE-Sim, layer by layer.

    python -m tests.benchmarks.scalesim RESNET50.onnx REFERENCE.csv [--target scalesim-32x32-ws]

The one big idea: the same instruction stream that computes the values is timed; per layer the cycles of its matrix instructions are added
up and compared with SCALE-Sim's `compute_cycles`. These are one less per layer, because they number the last cycle counting from 0.

REFERENCE.csv has one line per convolution or fully connected layer with the columns layer, M_outpix, K, N and compute_cycles. Layers with
the same product are matched in order, so the two may list a block's branches differently. Calibration data are made up: cycles do not
depend on values.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import npucc
from npucc.graph import Graph, Node
from npucc.ops import OPS
from runtime.timing import simulate

#: M output pixels, K products per output, N outputs
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Reference:
    """One line of the reference."""

    layer: str
    shape: Shape
    cycles: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer of a program: the matrix product that it is, how many matrix instructions do it, and the array cycles they take."""

    layer: str
    shape: Shape
    tiles: int
    cycles: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A layer on both sides; either may be missing."""

    measured: Measured | None
    reference: Reference | None

    @property
    def difference(self) -> str:
        """In one line; "" when both count the same cycles."""
        if self.measured is None:
            return "the program has no such layer"
        if self.reference is None:
            return "the reference has no such layer"
        more = self.measured.cycles - (self.reference.cycles + 1)
        return "" if more == 0 else f"{more:+} cycles: cut into {self.measured.tiles} tiles, each of which fills and drains the array"


def references(path: Path) -> list[Reference]:
    """The reference file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Reference(row["layer"], (int(row["M_outpix"]), int(row["K"]), int(row["N"])), int(row["compute_cycles"])) for row in rows]


def measure(package: npucc.Package) -> list[Measured]:
    """Every layer that has matrix instructions, in the order of the program."""
    timeline = simulate(package.program)
    tiles: Counter[int] = Counter()
    cycles: Counter[int] = Counter()
    for step, start, end in zip(timeline.steps, timeline.starts.tolist(), timeline.ends.tolist(), strict=True):
        if step.line.queue == "mm":
            tiles[step.layer] += 1
            cycles[step.layer] += end - start
    shapes = {node.name: product_shape(package.graph, node) for node in package.graph if OPS[node.op].matrix}
    return [Measured(package.program.layers[layer].name, shapes[package.program.layers[layer].name], tiles[layer], cycles[layer]) for layer in tiles]


def product_shape(graph: Graph, node: Node) -> Shape:
    """A convolution (im2col) or matrix product as M × K × N."""
    result, weights = graph.tensors[node.outputs[0]].shape, graph.tensors[node.inputs[1]].shape
    if node.op == "matmul":
        return math.prod(result[:-1]), weights[-2], weights[-1]
    return result[0] * math.prod(result[2:]), math.prod(weights[1:]), weights[0]


def compare(measured: Iterable[Measured], expected: Iterable[Reference]) -> Iterator[Compared]:
    """Pairs of equal shape, in the program's order; then the references that are left."""
    left: dict[Shape, deque[Reference]] = {}
    for reference in expected:
        left.setdefault(reference.shape, deque()).append(reference)
    for layer in measured:
        same = left.get(layer.shape)
        yield Compared(layer, same.popleft() if same else None)
    for rest in left.values():
        yield from (Compared(None, reference) for reference in rest)


def table(compared: Iterable[Compared]) -> str:
    """One line per layer."""
    lines = [f"{'layer':14}{'SCALE-Sim layer':20}{'M':>7}{'K':>6}{'N':>6}{'tiles':>7}{'npucc':>10}{'SCALE-Sim':>11}  difference beyond the 1"]
    for each in compared:
        ours, theirs = each.measured, each.reference
        shape = (ours or theirs).shape  # type: ignore[union-attr]
        lines.append(
            f"{ours.layer if ours else '-':14}{theirs.layer if theirs else '-':20}{shape[0]:7}{shape[1]:6}{shape[2]:6}"
            f"{ours.tiles if ours else 0:7}{ours.cycles if ours else 0:10}{theirs.cycles if theirs else 0:11}  {each.difference or 'equal'}"
        )
    return "\n".join(lines)


def summary(compared: list[Compared]) -> str:
    """The totals."""
    equal = sum(not each.difference for each in compared)
    ours = sum(each.measured.cycles for each in compared if each.measured)
    theirs = sum(each.reference.cycles for each in compared if each.reference)
    tiles = sum(each.measured.tiles for each in compared if each.measured)
    return f"{equal} of {len(compared)} layers equal; {tiles} tiles; {ours} cycles, SCALE-Sim {theirs} (+{len(compared)} for its count from 0)"


def main() -> None:
    """The command line: exit code 1 unless all layers are equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--target", default="scalesim-32x32-ws")
    options = parser.parse_args()
    compared = list(compare(measure(npucc.compile(options.model, options.target)), references(options.reference)))
    print(f"{table(compared)}\n{options.target}: {summary(compared)}")
    sys.exit(any(each.difference for each in compared))


if __name__ == "__main__":
    main()
