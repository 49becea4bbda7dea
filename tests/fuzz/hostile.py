"""Damaged programs and packages: each is run, or refused with a clear error, in bounded time and memory.

    python -m tests.fuzz.hostile [FILE.npu] [--minutes 10] [--seed 0]

The one big idea: damage is done where the meaning is (a number, a name, a line, a member of the package with its checksum made right
again), so that it gets past the first check and meets the next: parser, package reader, static checker, machine, graph reader. Only the
errors that a user is meant to see may come out. What the checker accepts must run; what it refuses is given to the machine all the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import npucc
from isa import IsaError, Package, Program, findings, format_program, parse_program
from npucc import demo, reference
from npucc.errors import NpuccError
from runtime import Machine, RuntimeFault, simulate

SECONDS = 60  # for one damaged file
BYTES = 6 << 30  # of memory, for the whole process
CYCLES = 3_000_000  # programs that take longer are not run
REFUSED = (IsaError, RuntimeFault, NpuccError)
NUMBERS = ("0", "1", "-1", "7", "127", "128", "255", "4096", "65535", "65536", "1000000", "1000000000", "2147483647", "2147483648",
           "-2147483648", "18446744073709551616", "1e400", "nan", "0x0", "0x1", "0xffffffff", "-0x40", "1e-45", "3.5")  # fmt: skip
_NUMBER = re.compile(r"-?0x[0-9a-f]+|-?\d+(?:\.\d+)?(?:e-?\d+)?")
_WORD = re.compile(r"[A-Za-z_.][A-Za-z_.0-9]*")


class TooSlow(Exception):
    """A damaged file took longer than SECONDS."""


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def another_number(line: str, chance: random.Random) -> str:
    """One number becomes an edge case, or its neighbour."""
    found = list(_NUMBER.finditer(line))
    if not found:
        return line
    at = chance.choice(found)
    near = [str(int(at[0], 0) + step) for step in (-1, 1)] if re.fullmatch(r"-?(0x[0-9a-f]+|[1-9]\d*|0)", at[0]) else []
    return line[: at.start()] + chance.choice([*NUMBERS, *near, *near, *near]) + line[at.end() :]


def another_word(line: str, chance: random.Random) -> str:
    """One name becomes another that programs have."""
    found = list(_WORD.finditer(line))
    names = ("ld", "st", "conv", "dwconv", "matmul", "requant", "add", "lut", "loop", "end", "s8", "s16", "s32", "f32", "u8", "pad", "mm.0", "host")
    at = chance.choice(found) if found else None
    return line[: at.start()] + chance.choice(names) + line[at.end() :] if at else line


def without_a_piece(line: str, chance: random.Random) -> str:
    """Some characters are gone."""
    start = chance.randrange(len(line) + 1)
    return line[:start] + line[start + chance.randrange(1, 12) :]


def with_a_piece(line: str, chance: random.Random) -> str:
    """Some characters are added."""
    start = chance.randrange(len(line) + 1)
    return line[:start] + chance.choice((",", ":", "[", "]", "{", "}", "%", "@", "$", "+", "*i", "=", '"', "\\", "\0", "é", " ", ";")) + line[start:]


EDITS: tuple[Callable[[str, random.Random], str], ...] = (another_number, another_number, another_word, without_a_piece, with_a_piece)


def damaged_text(text: str, chance: random.Random) -> str:
    """One to three lines edited, dropped, doubled, moved, or put into a loop."""
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(lines))
        kind = chance.randrange(10)
        if kind < 6:
            lines[at] = chance.choice(EDITS)(lines[at], chance)
        elif kind == 6:
            del lines[at]
        elif kind == 7:
            lines.insert(chance.randrange(len(lines)), lines[at])
        elif kind == 8:
            lines.insert(chance.randrange(len(lines)), lines.pop(at))
        else:
            lines[at : at + 1] = [f"loop {chance.choice(('0', '2', '1000', '1000000', '1000000000'))}", lines[at], "end"]
        lines = lines or [""]
    return "\n".join(lines)


def damaged_bytes(blob: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out or doubled."""
    changed = bytearray(blob)
    for _ in range(chance.choice((1, 1, 4, 32))):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    if chance.random() < 0.3:
        start = chance.randrange(len(changed) + 1)
        del changed[start : start + chance.randrange(1, 1 + max(1, len(changed) // 4))]
    return bytes(changed)


def damaged_json(blob: bytes, chance: random.Random) -> bytes:
    """One value somewhere in the tree is another."""
    tree = json.loads(blob)
    parents = [(node, key) for node in _nodes(tree) for key in (node if isinstance(node, dict) else range(len(node)))]
    parent, key = chance.choice(parents)
    if chance.random() < 0.2:
        del parent[key]
    else:
        parent[key] = chance.choice([None, -1, 0, 1 << 40, 1.5, "", "x", [], {}, True, [1, [2, [3]]], "s8", chance.choice(parents)[1]])
    return json.dumps(tree).encode()


def _nodes(tree: Any) -> list[Any]:
    if not isinstance(tree, dict | list):
        return []
    below = [node for child in (tree.values() if isinstance(tree, dict) else tree) for node in _nodes(child)]
    return [tree, *below] if tree else below


# ── attacks: each gives a word for what became of the damage ────────────────────────────────────────────────────────────────────────


def attack_text(package: Package, chance: random.Random) -> str:
    """Parser, printer, checker and machine."""
    try:
        program = parse_program(damaged_text(package.text, chance))
    except IsaError:
        return "text: refused by the parser"
    assert parse_program(format_program(program)) == program, "what was read is not printed as it was"
    accepted = not findings(program)
    constants = damaged_bytes(package.constants, chance) if chance.random() < 0.3 else package.constants
    outcome = _run(program, constants)
    assert not accepted or outcome != "refused" or program.constants_bytes != len(constants), "the checker accepts what the machine refuses"
    return f"text: {'accepted' if accepted else 'refused'} by the checker, {outcome}{'' if accepted or outcome == 'refused' else ' all the same'}"


def _run(program: Program, constants: bytes) -> str:
    """One inference on zeros."""
    try:
        if simulate(program).total_cycles > CYCLES:
            return "too long to run"
        machine = Machine(program, constants)  # refuses an input that does not fit its memory, before anybody makes one
        machine.run({record.name: np.zeros(record.tile.shape, record.dtype) for record in program.inputs})
    except RuntimeFault:
        return "refused"
    return "run"


def attack_file(package: Package, chance: random.Random) -> str:
    """The package reader: bytes of the file."""
    try:
        Package.from_bytes(damaged_bytes(package.to_bytes(), chance))
    except IsaError:
        return "file: refused"
    return "file: read"


def attack_graph(package: Package, chance: random.Random) -> str:
    """The graph that a package carries, under right checksums."""
    members = dict(package.members)
    name = chance.choice(sorted(members))
    members[name] = (damaged_json if name.endswith(".json") and chance.random() < 0.8 else damaged_bytes)(members[name], chance)
    again = npucc.Package(Package(package.program, package.constants, package.manifest, members))
    try:
        graph = again.graph
    except REFUSED:
        return "graph: refused"
    try:
        again.to_onnx()
        reference.run(graph, {name: np.zeros(graph.tensors[name].shape, np.float32) for name in graph.inputs})
    except REFUSED:
        return "graph: read, then refused"
    return "graph: read"


ATTACKS: tuple[Callable[[Package, random.Random], str], ...] = (attack_text, attack_text, attack_file, attack_graph)


def attack(package: Package, seed: int) -> str:
    """One damaged file; raises what a user must never see, TooSlow included."""
    chance = random.Random(seed)

    def too_slow(*_: Any) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        return chance.choice(ATTACKS)(package, chance)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Attack until the time is up; stop at the first failure and name its seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", nargs="?", type=Path, help="a .npu file [default: the bundled network's]")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first attack; each has the next one's number")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    package = Package.load(options.package) if options.package else npucc.compile(demo.MODEL, calibration=demo.CALIBRATION).contents
    package = Package(package.program, package.constants, package.manifest, {name: package.members[name] for name in package.members})
    outcomes: Counter[str] = Counter()
    seed, end = options.seed, time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        try:
            outcomes[attack(package, seed)] += 1
        except BaseException:
            print(f"seed {seed} fails; see it again with --seed {seed}")
            raise
        seed += 1
    print(f"{seed - options.seed} damaged files, none got through unseen; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8}  {outcome}")


if __name__ == "__main__":
    main()
