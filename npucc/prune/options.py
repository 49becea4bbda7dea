"""What to prune and how much, and its text form for the command line.

channels=30%            channels, until 30 % of the multiply-accumulates are gone
cycles=0.7              channels, until the compiled program takes 0.7 of the cycles
cycles=0.7,drop=0.5     … but at most 0.5 points of disagreement with the dense network; the report says which limit was met
2:4                     of each 4 neighbouring weights at most 2 stay (any N:M)
channels=30%,2:4        both, channels first
skip=PATTERN            leave alone the layers whose name matches (with * and ?); may be repeated
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from npucc.errors import PruneError
from npucc.graph import Node

CRITERIA = ("second_order", "activation", "magnitude")
KEYS = "channels=30%, cycles=0.7, drop=0.5, 2:4, skip=PATTERN, criterion=…, repair=yes|no, samples=512, rows=16384"


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """`channels`: share of the multiply-accumulates to remove; `cycles`: share of the cycles to reach; `drop`: points of top-1 disagreement
    allowed on held-back samples; `pattern`: (N, M); `rows`: places, over all samples, that the statistics of
    a layer look at.

    Raises PruneError where a value is not allowed.
    """

    channels: float | None = None
    cycles: float | None = None
    drop: float | None = None
    pattern: tuple[int, int] | None = None
    skip: tuple[str, ...] = ()
    criterion: str = "second_order"
    repair: bool = True
    samples: int = 512
    rows: int = 16384

    def __post_init__(self) -> None:
        if self.channels is None and self.cycles is None and self.pattern is None:
            raise PruneError("there is nothing to prune", hint=f"write for example {KEYS}")
        for name, value in (("channels", self.channels), ("cycles", self.cycles)):
            if value is not None and not 0 < value < 1:
                raise PruneError(f"{name} is {value:g}", hint=f"expected a share between 0 and 1, as {name}=0.3 or {name}=30%")
        if self.channels is not None and self.cycles is not None:
            raise PruneError("both channels and cycles are given", hint="give one of the two budgets")
        if self.drop is not None and (self.cycles is None or not self.drop >= 0):
            raise PruneError(f"drop is {self.drop:g}", hint="expected points, 0 or more, together with cycles=…")
        if self.pattern is not None and not 1 <= self.pattern[0] < self.pattern[1] <= 64:
            raise PruneError(f"the pattern is {self.pattern[0]}:{self.pattern[1]}", hint="expected N:M with 1 ≤ N < M ≤ 64, as 2:4")
        if self.criterion not in CRITERIA:
            raise PruneError(f"there is no criterion {self.criterion!r}", hint=f"choose one of {', '.join(CRITERIA)}")
        if self.samples < 1 or self.rows < 1:
            raise PruneError(f"samples is {self.samples}, rows is {self.rows}", hint="expected at least 1")

    def skips(self, node: Node) -> bool:
        """Whether a pattern names this node, its result, or an ONNX node that it stands for."""
        names = (node.name, *node.outputs, *node.sources)
        return any(fnmatchcase(name, pattern) for pattern in self.skip for name in names)

    @classmethod
    def parse(cls, text: str) -> PruneOptions:
        """The text form (see above). Raises PruneError."""
        values: dict[str, object] = {}
        skip: list[str] = []
        for part in (piece.strip() for piece in text.split(",")):
            name, equals, value = (word.strip() for word in part.partition("="))
            parsed: object
            if ratio := re.fullmatch(r"(\d+):(\d+)", part):
                name, parsed = "pattern", (int(ratio[1]), int(ratio[2]))
            elif name == "skip" and value:
                skip.append(value)
                continue
            elif not equals or name not in _PARSERS:
                raise PruneError(f"{part!r} is no pruning option", hint=f"write one or several of {KEYS}")
            else:
                parsed = _PARSERS[name](name, value)
            if name in values:
                raise PruneError(f"the option {name!r} is given twice")
            values[name] = parsed
        return cls(**values, skip=tuple(skip))  # type: ignore[arg-type]


def _share(name: str, text: str) -> float:
    number = _number(name, text.removesuffix("%"))
    return number / 100 if text.endswith("%") else number


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number != number:
        raise PruneError(f"{name}={text!r} is no number", hint=f"write one or several of {KEYS}")
    return number


def _count(name: str, text: str) -> int:
    if not text.isdecimal():
        raise PruneError(f"{name}={text!r} is no whole number", hint=f"write {name}=512")
    return int(text)


def _yes(name: str, text: str) -> bool:
    words = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
    if text.lower() not in words:
        raise PruneError(f"{name}={text!r} is neither yes nor no", hint=f"write {name}=yes or {name}=no")
    return words[text.lower()]


def _word(name: str, text: str) -> str:  # noqa: ARG001  the shape of a parser
    return text


_PARSERS = {
    "channels": _share, "cycles": _share, "drop": _number, "criterion": _word, "repair": _yes, "samples": _count, "rows": _count,
}  # fmt: skip
