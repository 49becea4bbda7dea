"""What to prune and how much, and its text form for the command line: parts with commas between.

channels=30%            channels, until 30 % of the multiply-accumulates are gone
cycles=0.7              channels, until the compiled program takes 0.7 of the cycles
2:4                     of each 4 neighbouring weights at most 2 stay (any N:M), along the sum: kernel row, kernel column, input channel
block=70%               70 % of the blocks of a layer's weights, in the size of the target's array
unstructured=60%        60 % of a layer's weights, wherever they are
drop=0.5                with cycles: at most 0.5 points of accuracy lost, the cycles as they come;
                        with a pattern: only in as many layers as that allows, those first that lose least for what they save
skip=LAYER              leave alone the layers whose name matches (with * and ?); may be repeated
LAYER@2:4, LAYER@block=50%, LAYER@unstructured=50%
                        another pattern for the layers whose name matches; the last that matches counts
LAYER@channels=25%      the layers whose name matches lose 25 % of their channels, whatever the budget takes elsewhere
criterion=second_order  what goes: second_order, activation or magnitude
repair=yes              whether what stays is refitted
arrange=yes             whether channels may first change places so that N:M among neighbours loses less
samples=512, rows=16384 calibration samples to use at most, and places in them, over all samples, that a layer's statistics look at

channels or cycles go with one pattern: channels=30%,2:4. Accuracy lost is estimated without labels, of the integer network against the dense integer
network: other answers cost what the dense network thought its own more probable by (npucc/loss.py; where no output answers a
question, the energy of the outputs' error in per cent). The calibration samples measure it in halves: each half judges what was fitted on the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from npucc.errors import PruneError
from npucc.graph import Node
from npucc.prune.patterns import BlockPattern, NeighbourPattern, Pattern

CRITERIA = ("second_order", "activation", "magnitude")
KEYS = (
    "channels=30%, cycles=0.7, drop=0.5, 2:4, block=70%, unstructured=60%, skip=LAYER, LAYER@2:4, LAYER@channels=25%, "
    "criterion=…, repair=yes|no, arrange=yes|no, samples=512, rows=16384"
)


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """`channels`: share of the multiply-accumulates to remove; `cycles`: share of the cycles to reach; `drop`: points of accuracy
    allowed; `pattern`: of the weights; `skip`: names of layers to leave alone; `layers`: (name, its own pattern or share of channels).

    Raises PruneError where a value is not allowed.
    """

    channels: float | None = None
    cycles: float | None = None
    drop: float | None = None
    pattern: Pattern | None = None
    skip: tuple[str, ...] = ()
    layers: tuple[tuple[str, Pattern | float], ...] = ()
    criterion: str = "second_order"
    repair: bool = True
    arrange: bool = True
    samples: int = 512
    rows: int = 16384

    def __post_init__(self) -> None:
        if self.channels is None and self.cycles is None and self.pattern is None and not self.layers:
            raise PruneError("there is nothing to prune", hint=f"write for example {KEYS}")
        shares = [("channels", amount) for _, amount in self.layers if isinstance(amount, float)]
        for name, value in (("channels", self.channels), ("cycles", self.cycles), *shares):
            if value is not None and not 0 < value < 1:
                raise PruneError(f"{name} is {value:g}", hint=f"expected a share between 0 and 1, as {name}=0.3 or {name}=30%")
        if self.channels is not None and self.cycles is not None:
            raise PruneError("both channels and cycles are given", hint="give one of the two budgets")
        self._check_drop()
        for pattern in (self.pattern, *(amount for _, amount in self.layers)):
            _check_pattern(pattern)
        if self.criterion not in CRITERIA:
            raise PruneError(f"there is no criterion {self.criterion!r}", hint=f"choose one of {', '.join(CRITERIA)}")
        if self.samples < 1 or self.rows < 1:
            raise PruneError(f"samples is {self.samples}, rows is {self.rows}", hint="expected at least 1")

    def _check_drop(self) -> None:
        if self.drop is None:
            return
        if not self.drop >= 0 or (self.cycles is None and not self.has_patterns):
            raise PruneError(f"drop is {self.drop:g}", hint="expected points, 0 or more, together with cycles=… or a pattern")
        if self.has_patterns and (self.channels is not None or self.cycles is not None):
            raise PruneError("drop is given for both channels and a pattern", hint="it searches one of the two: leave out the other, or drop")

    @property
    def has_patterns(self) -> bool:
        """Whether some layer may get a pattern."""
        return self.pattern is not None or any(not isinstance(amount, float) for _, amount in self.layers)

    def skips(self, node: Node) -> bool:
        """Whether the node is to be left alone."""
        return any(_matches(node, name) for name in self.skip)

    def pattern_of(self, node: Node) -> Pattern | None:
        """The pattern for a layer's weights."""
        if self.skips(node):
            return None
        own = [amount for name, amount in self.layers if not isinstance(amount, float) and _matches(node, name)]
        return own[-1] if own else self.pattern

    def channels_of(self, node: Node) -> float | None:
        """The share of channels that a layer must lose, if that was said."""
        own = [amount for name, amount in self.layers if isinstance(amount, float) and _matches(node, name)]
        return None if self.skips(node) or not own else own[-1]

    @classmethod
    def parse(cls, text: str) -> PruneOptions:
        """The text form (see above). Raises PruneError."""
        values: dict[str, object] = {}
        skip: list[str] = []
        layers: list[tuple[str, Pattern | float]] = []
        for part in (piece.strip() for piece in text.split(",")):
            layer, at, amount = ("", "", part) if part.startswith("skip") else (word.strip() for word in part.rpartition("@"))
            name, value = _amount(amount)
            if at:
                if not layer or name not in ("pattern", "channels"):
                    raise PruneError(f"{part!r} is no pruning option", hint="after @ write 2:4, block=50%, unstructured=50% or channels=25%")
                layers.append((layer, value))  # type: ignore[arg-type]
            elif name == "skip":
                skip.append(str(value))
            elif name in values:
                raise PruneError(f"the option {name!r} is given twice")
            else:
                values[name] = value
        return cls(**values, skip=tuple(skip), layers=tuple(layers))  # type: ignore[arg-type]


def _matches(node: Node, pattern: str) -> bool:
    """Whether a pattern names this node, its result, or an ONNX node that it stands for."""
    return any(fnmatchcase(name, pattern) for name in (node.name, *node.outputs, *node.sources))


def _check_pattern(pattern: Pattern | float | None) -> None:
    if isinstance(pattern, NeighbourPattern) and not 1 <= pattern.keep < pattern.of <= 64:
        raise PruneError(f"the pattern is {pattern}", hint="expected N:M with 1 ≤ N < M ≤ 64, as 2:4")
    if isinstance(pattern, BlockPattern) and not 0 < pattern.share < 1:
        raise PruneError(f"the pattern is {pattern}", hint="expected a share between 0 and 1, as block=0.7 or block=70%")


def _amount(text: str) -> tuple[str, object]:
    """(field, value) of one part."""
    if ratio := re.fullmatch(r"(\d+):(\d+)", text):
        return "pattern", NeighbourPattern(int(ratio[1]), int(ratio[2]))
    name, equals, value = (word.strip() for word in text.partition("="))
    if not equals or not value or name not in _PARSERS:
        raise PruneError(f"{text!r} is no pruning option", hint=f"write one or several of {KEYS}")
    return ("pattern" if name in ("block", "unstructured") else name), _PARSERS[name](name, value)


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


def _blocks(name: str, text: str) -> BlockPattern:
    return BlockPattern(_share(name, text)) if name == "block" else BlockPattern(_share(name, text), 1, 1)


_PARSERS: dict[str, Callable[[str, str], object]] = {
    "channels": _share, "cycles": _share, "drop": _number, "block": _blocks, "unstructured": _blocks, "skip": _word,
    "criterion": _word, "repair": _yes, "arrange": _yes, "samples": _count, "rows": _count,
}  # fmt: skip
