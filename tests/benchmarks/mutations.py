"""How much the static checker sees: programs with one mistake each, and what becomes of them.

    python -m tests.benchmarks.mutations [FILE.npu | MODEL.onnx …] [--input DATA.npz] [--target NAME] [--limit 100] [--orders 4] [--seed 0]

The one big idea: a mutant is caught, or it is run: in line order and in random legal orders, and its output bytes are compared with
those of the program it was made from. Bytes that depend on the order mean that the checker is wrong. Bytes that are the same mean
that the mistake was none; for events and for independent neighbours that is proved, since a race-free program computes what its
lines compute in the order of the text. What remains is another program, legal and the same in every order, that computes something else;
some of these have marks of a wrong address (`isa.discipline`), which a compiled program never has: they are suspected.

A program's loops are written out first, so a mistake happens in one execution of one line.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import npucc
from isa import SPEC, Event, Instruction, Layer, Package, Program, Tile, address_at, findings, unroll
from isa.discipline import suspicions
from isa.geometry import footprint, overlaps
from isa.program import DTYPES
from npucc import demo
from npucc.feeds import open_dataset
from npucc.signature import ports_of_program
from runtime import Machine, RuntimeFault
from runtime.boundary import to_real

CAUGHT, SUSPECTED, PROVED, SAME, FAULT = "caught", "suspected", "harmless", "same bytes", "refused at load"
OTHER, UNSTABLE = "other bytes", "DEPENDS ON ORDER"
VERDICTS = (CAUGHT, SUSPECTED, PROVED, SAME, FAULT, OTHER, UNSTABLE)
Bytes = dict[str, bytes]
Channel = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`program` with one mistake. `keeps_values`: the text order still computes the same, whatever the queues do. `where`: for the reader."""

    kind: str
    where: str
    explanation: str
    program: Program
    keeps_values: bool


@dataclass(frozen=True, slots=True)
class Judged:
    mutant: Mutant
    verdict: str
    remark: str  # the first finding or suspicion, if any


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Lines:
    """A program as one list of instructions, each with the number of its layer."""

    program: Program
    layers: tuple[int, ...]
    body: tuple[Instruction, ...]

    @staticmethod
    def of(program: Program) -> Lines:
        """Loops written out."""
        flat = [(number, _at(line, iterations)) for number, layer in enumerate(program.layers) for line, iterations in unroll(layer.body)]
        return Lines(program, tuple(number for number, _ in flat), tuple(line for _, line in flat))

    def with_lines(self, changed: dict[int, Instruction]) -> Program:
        """The program with some of its lines replaced."""
        bodies: list[list[Instruction]] = [[] for _ in self.program.layers]
        for index, (number, line) in enumerate(zip(self.layers, self.body, strict=True)):
            bodies[number].append(changed.get(index, line))
        layers: tuple[Layer, ...] = tuple(replace(layer, body=tuple(body)) for layer, body in zip(self.program.layers, bodies, strict=True))
        return replace(self.program, layers=layers)

    def queue(self, index: int) -> str:
        return SPEC[self.body[index].name].queue

    def neighbours(self, index: int) -> Iterator[int]:
        """The instructions before and after in the same queue."""
        for step in (-1, 1):
            other = index + step
            while 0 <= other < len(self.body) and self.queue(other) != self.queue(index):
                other += step
            if 0 <= other < len(self.body):
                yield other


def _at(line: Instruction, iterations: tuple[int, ...]) -> Instruction:
    """A line of a loop as it is in one iteration."""
    return replace(line, tiles=tuple(replace(tile, address=address_at(tile, iterations), steps=()) for tile in line.tiles)) if iterations else line


def _without(events: tuple[Event, ...], position: int) -> tuple[Event, ...]:
    return events[:position] + events[position + 1 :]


def drop_wait(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Delete one wait."""
    yield from _drop(lines, "waits")


def drop_signal(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Delete one signal."""
    yield from _drop(lines, "signals")


def _drop(lines: Lines, field: str) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    kind = f"delete a {field[:-1]}"
    for index, line in enumerate(lines.body):
        events: tuple[Event, ...] = getattr(line, field)
        for position in range(len(events)):
            changed = replace(line, **{field: _without(events, position)})  # type: ignore[arg-type]
            yield kind, _maker(lines, kind, {index: changed})


def drop_event(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Delete a wait and the signal that it waits for."""
    kind = "delete an event (both ends)"
    for giver, given, taker, taken in event_pairs(lines):
        first, second = lines.body[giver], lines.body[taker]
        changed = {giver: replace(first, signals=_without(first.signals, given)), taker: replace(second, waits=_without(second.waits, taken))}
        yield kind, _maker(lines, kind, changed)


def event_pairs(lines: Lines) -> Iterator[tuple[int, int, int, int]]:
    """(line, position) of each signal with (line, position) of the wait that it belongs to: the k-th with the k-th."""
    given: dict[Channel, list[tuple[int, int]]] = {}
    taken: dict[Channel, list[tuple[int, int]]] = {}
    for index, line in enumerate(lines.body):
        own = lines.queue(index)
        for position, event in enumerate(line.signals):
            given.setdefault((own, event.queue, event.id), []).append((index, position))
        for position, event in enumerate(line.waits):
            taken.setdefault((event.queue, own, event.id), []).append((index, position))
    for channel, signals in given.items():
        for signal, wait in zip(signals, taken.get(channel, []), strict=False):
            yield *signal, *wait


def move_wait(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Let the neighbour in the same queue wait instead."""
    yield from _move(lines, "waits")


def move_signal(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Let the neighbour in the same queue signal instead."""
    yield from _move(lines, "signals")


def _move(lines: Lines, field: str) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    for index, line in enumerate(lines.body):
        events: tuple[Event, ...] = getattr(line, field)
        for position, event in enumerate(events):
            for other in lines.neighbours(index):
                kind = f"move a {field[:-1]} to the {'next' if other > index else 'previous'}"
                left = replace(line, **{field: _without(events, position)})  # type: ignore[arg-type]
                right = replace(lines.body[other], **{field: (*getattr(lines.body[other], field), event)})  # type: ignore[arg-type]
                yield kind, _maker(lines, kind, {index: left, other: right})


def shift_address(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Move one operand by one element (or one unit of the target's alignment), or by its own size, up or down."""
    for index, line in enumerate(lines.body):
        for number, (operand, tile) in enumerate(zip(SPEC[line.name].operands, line.tiles, strict=False)):
            low, high = tile.extent()
            unit = max(DTYPES[tile.dtype], lines.program.target.alignment)
            role = "read" if operand.role == "read" else "result"
            for name, amount in (("one element", unit), ("its own size", -(-(high - low) // unit) * unit)):
                kind = f"shift a {role} by {name}"
                for offset in {amount, -amount}:
                    moved = replace(line, tiles=(*line.tiles[:number], replace(tile, address=tile.address + offset), *line.tiles[number + 1 :]))
                    yield kind, _maker(lines, kind, {index: moved}, keeps_values=False, explanation=_what_it_meets(lines, role, tile))


def _what_it_meets(lines: Lines, role: str, tile: Tile) -> str:
    if role == "result":
        return f"writes other bytes of {tile.space}, all of which may be written; whoever reads there finds older or neighbouring bytes"
    first = lines.program.constants_address
    if tile.space == "dram" and first <= tile.address < first + lines.program.constants_bytes:
        return "loads neighbouring constants: blocks within the constants have no borders"
    return f"reads neighbouring bytes of {tile.space} that were written earlier: bytes have no owner"


def swap_neighbours(lines: Lines) -> Iterator[tuple[str, Callable[[], Mutant]]]:
    """Exchange an instruction with the next line, and with the next one of its queue."""
    for index, line in enumerate(lines.body):
        for other in sorted({min(index + 1, len(lines.body) - 1), *lines.neighbours(index)}):
            if other <= index or line == lines.body[other]:
                continue
            kind = f"swap neighbours of {'one queue' if lines.queue(index) == lines.queue(other) else 'two queues'}"
            kept = all(independent(lines.body[first], lines.body[second]) for first, second in _crossings(index, other))
            told = "the two touch the same bytes, and their new order is legal too"
            yield kind, _maker(lines, kind, {index: lines.body[other], other: line}, keeps_values=kept, explanation=told)


def _crossings(index: int, other: int) -> Iterator[tuple[int, int]]:
    """The pairs of lines whose order in the text a swap changes."""
    yield index, other
    for between in range(index + 1, other):
        yield index, between
        yield between, other


def independent(first: Instruction, second: Instruction) -> bool:
    """Whether neither writes a byte that the other one touches."""
    return not any(
        (mine.role != "read" or theirs.role != "read") and a.space == b.space and overlaps(footprint(a), a.address, footprint(b), b.address)
        for mine, a in zip(SPEC[first.name].operands, first.tiles, strict=False)
        for theirs, b in zip(SPEC[second.name].operands, second.tiles, strict=False)
    )


def _maker(lines: Lines, kind: str, changed: dict[int, Instruction], *, keeps_values: bool = True, explanation: str = "") -> Callable[[], Mutant]:
    where = " / ".join(f"{lines.program.layers[lines.layers[index]].name}: {lines.body[index].name} #{index}" for index in changed)
    return lambda: Mutant(kind, where, explanation, lines.with_lines(changed), keeps_values)


MISTAKES = (drop_wait, drop_signal, drop_event, move_wait, move_signal, shift_address, swap_neighbours)


def mutants(program: Program, *, limit: int, seed: int) -> Iterator[Mutant]:
    """Up to `limit` mutants of each kind (all, if there are fewer), chosen by `seed`."""
    lines = Lines.of(program)
    choose = random.Random(seed)
    for mistake in MISTAKES:
        kinds: dict[str, list[Callable[[], Mutant]]] = {}
        for kind, make in mistake(lines):
            kinds.setdefault(kind, []).append(make)
        for makers in kinds.values():
            chosen = makers if len(makers) <= limit else choose.sample(makers, limit)
            yield from (make() for make in chosen)


# ── what becomes of them ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def two_inputs(program: Program, data: Path | None, seed: int) -> tuple[dict[str, Any], ...]:
    """The first two samples of the data; without data random ones: reals over the whole range of a byte, integers that any table of tokens has."""
    if data is not None:
        return tuple(islice(open_dataset(data, ports_of_program(program), limit=2), 2))
    return tuple(_random_inputs(program, np.random.default_rng(seed + number)) for number in range(2))


def _random_inputs(program: Program, choose: np.random.Generator) -> dict[str, Any]:
    inputs = {}
    for record in program.inputs:
        low, high = (-100, 100) if np.dtype(record.dtype).kind == "f" else (0, 2)
        stored = choose.integers(low, high, record.tile.shape)
        inputs[record.name] = to_real(record, stored.astype(np.int8)) if low else stored.astype(record.dtype)
    return inputs


def output_bytes(machine: Machine, inputs: Sequence[dict[str, Any]], *, order: str = "program", seed: int = 0) -> list[Bytes]:
    """The outputs as stored, for each of the inputs."""
    return [{name: stored.tobytes() for name, stored in machine.run(each, order=order, seed=seed).raw.items()} for each in inputs]


@dataclass(frozen=True, slots=True)
class Judge:
    """What the unchanged program yields, and how many random orders a mutant is run in."""

    constants: bytes
    inputs: tuple[dict[str, Any], ...]
    expected: list[Bytes]
    orders: int

    @staticmethod
    def of(package: Package, *, orders: int, seed: int, data: Path | None = None) -> Judge:
        inputs = two_inputs(package.program, data, seed)
        return Judge(package.constants, inputs, output_bytes(Machine(package), inputs), orders)

    def judge(self, mutant: Mutant) -> Judged:
        """Check the mutant; run it if the checker finds nothing; look for marks of a wrong address if its bytes differ."""
        found = findings(mutant.program)
        if found:
            return Judged(mutant, CAUGHT, found[0].message)
        try:
            with np.errstate(all="ignore"):  # bytes that are read as a float they never were
                machine = Machine(mutant.program, self.constants)
                plain = output_bytes(machine, self.inputs)
                shuffled = [output_bytes(machine, self.inputs, order="random", seed=seed) for seed in range(self.orders)]
        except RuntimeFault as fault:
            return Judged(mutant, FAULT, str(fault))
        if any(each != plain for each in shuffled):
            return Judged(mutant, UNSTABLE, "")
        if plain != self.expected:
            suspected = suspicions(mutant.program)
            verdict = UNSTABLE if mutant.keeps_values else SUSPECTED if suspected else OTHER
            return Judged(mutant, verdict, suspected[0].message if suspected else "")
        return Judged(mutant, PROVED if mutant.keeps_values else SAME, "")


def judge_all(package: Package, *, limit: int, orders: int, seed: int, data: Path | None = None) -> list[Judged]:
    """Every sampled mutant of the package's program with its verdict."""
    judge = Judge.of(package, orders=orders, seed=seed, data=data)
    return [judge.judge(mutant) for mutant in mutants(package.program, limit=limit, seed=seed)]


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(judged: Sequence[Judged]) -> str:
    """One line per kind of mistake: how many mutants, and how many had which end."""
    counts: dict[str, Counter[str]] = {}
    for each in judged:
        counts.setdefault(each.mutant.kind, Counter())[each.verdict] += 1
    used = [verdict for verdict in VERDICTS if any(count[verdict] for count in counts.values()) or verdict in (CAUGHT, PROVED, OTHER, UNSTABLE)]
    rows = [("mistake", "mutants", *used, "found or no mistake")]
    total: Counter[str] = Counter()
    for kind, count in counts.items():
        total += count
        rows.append((kind, *_cells(count, used)))
    rows.append(("all", *_cells(total, used)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(size) if column else cell.ljust(size) for column, (cell, size) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _cells(count: Counter[str], used: Sequence[str]) -> list[str]:
    good = count.total() - count[OTHER] - count[UNSTABLE]
    return [str(count.total()), *(str(count[verdict]) for verdict in used), f"{100 * good / count.total():.1f} %"]


def survivors(judged: Sequence[Judged]) -> str:
    """The mutants that compute something else, by explanation, and every one whose bytes depend on the order."""
    told = Counter(f"{each.mutant.kind}: {each.mutant.explanation}" for each in judged if each.verdict == OTHER)
    lines = [f"{count:6}  {reason}" for reason, count in told.most_common()]
    lines += [f"UNSOUND {each.mutant.kind}: {each.mutant.where}" for each in judged if each.verdict == UNSTABLE]
    return "\n".join(lines)


def open_package(path: Path, target: str) -> Package:
    """A package, compiled first if it is an ONNX model (with made-up calibration data)."""
    if path.suffix == ".npu":
        return Package.load(path)
    calibration = demo.CALIBRATION if path == Path(demo.MODEL) else None
    return npucc.compile(path, target, calibration=calibration).contents


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[Path(demo.MODEL)], help=".npu packages or .onnx models; the bundled network if none")
    parser.add_argument("--input", type=Path, help="samples that the programs are run on (.npz), instead of random values")
    parser.add_argument("--target", default="edge", help="for ONNX models")
    parser.add_argument("--limit", type=int, default=100, help="mutants of each kind and program")
    parser.add_argument("--orders", type=int, default=4, help="random orders that a mutant which passes the checker is run in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    everything: list[Judged] = []
    for path in options.files:
        package = open_package(path, options.target)
        judged = judge_all(package, limit=options.limit, orders=options.orders, seed=options.seed, data=options.input)
        everything += judged
        print(f"{path.name} on {package.program.target.name}\n{table(judged)}\n{survivors(judged)}\n", flush=True)
    if len(options.files) > 1:
        print(f"all {len(options.files)} programs\n{table(everything)}\n{survivors(everything)}")


if __name__ == "__main__":
    main()
