"""What can be chosen about quantization, and its text form for the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from npucc.errors import QuantizeError
from npucc.quantize.ranges import METHODS

SCHEMES = ("auto", "int8", "int16")
ROUNDINGS = ("second_order", "nearest")
OWN = "own"  # `priced_on`: compile's own target
GROUPS = (32, 64, 128)
WORDS = {"w4": ("weight_bits", "4")}
MEASURED = "auto"  # `method`: by measured error


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Raises QuantizeError where a value is not allowed."""

    scheme: str = field(
        default="auto",
        metadata={"meaning": "auto: 16 bits for the few activations that a measurement finds worth it; int8: none but by rule; int16: all that can"},
    )
    budget: float = field(default=30.0, metadata={"meaning": "for auto: at most so many percent more cycles for 16 bits"})
    drop: float = field(
        default=-1.0,
        metadata={"meaning": "for auto: the fewest cycles that lose at most so many points of accuracy (estimated), whatever the budget; -1: off"},
    )
    priced_on: str = field(
        default="edge", metadata={"meaning": "for auto: whose cycles count; one target for all, so that none changes a value; own: that of compile"}
    )
    method: str = field(
        default=MEASURED,
        metadata={
            "meaning": "how ranges are chosen: " + "; ".join(f"{each.name}: {each.meaning}" for each in METHODS)
            + "; auto: each tensor that matters by what errs least at the outputs"
        },
    )  # fmt: skip
    percentile: float = field(default=99.99, metadata={"meaning": "for method=percentile: how many of a hundred values lie in the range"})
    samples: int = field(default=128, metadata={"meaning": "calibrate with at most so many samples"})
    equalize: bool = field(
        default=True, metadata={"meaning": "make channels equally loud where that is estimated to lower the error; not with per_tensor"}
    )
    rounding: str = field(
        default="second_order", metadata={"meaning": "of weights: second_order (on what their layers read in `round_samples`) or nearest"}
    )
    round_samples: int = field(default=32, metadata={"meaning": "samples to round weights with"})
    weight_bits: int = field(
        default=8, metadata={"meaning": "4 (or the word w4): a weight is one of 15 values, times a whole number for each `group` of them"}
    )
    group: int = field(default=64, metadata={"meaning": "for weight_bits=4: neighbouring weights of an output that share a factor; 32, 64 or 128"})
    per_tensor: bool = field(default=False, metadata={"meaning": "one scale for a whole weight instead of one per output channel"})
    bias_correction: bool = field(
        default=True, metadata={"meaning": "shift biases by the mean error that rounding the weights causes, from channel means"}
    )
    bias_samples: int = field(
        default=32, metadata={"meaning": "correct biases with so many samples run through the integer graph, at least 8 where they are slow; 0: not"}
    )

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise QuantizeError(f"there is no scheme {self.scheme!r}", hint=f"choose one of {', '.join(SCHEMES)}")
        if not self.budget >= 0:
            raise QuantizeError(f"budget is {self.budget:g}", hint="expected percent of cycles, 0 or more")
        if self.drop < 0 and self.drop != -1:
            raise QuantizeError(f"drop is {self.drop:g}", hint="expected points of accuracy, 0 or more; -1: no such limit")
        if self.drop >= 0 and self.scheme != "auto":
            raise QuantizeError(f"drop is given with the scheme {self.scheme}", hint="write auto,drop=…: only a measurement can keep it")
        known = (MEASURED, *(each.name for each in METHODS))
        if self.method not in known:
            raise QuantizeError(f"there is no method {self.method!r}", hint=f"choose one of {', '.join(known)}")
        if not 50 < self.percentile <= 100:
            raise QuantizeError(f"percentile is {self.percentile:g}", hint="expected more than 50 and at most 100, as 99.99")
        if self.samples < 1:
            raise QuantizeError(f"samples is {self.samples}", hint="at least one sample is needed")
        if self.rounding not in ROUNDINGS:
            raise QuantizeError(f"there is no rounding {self.rounding!r}", hint=f"choose one of {', '.join(ROUNDINGS)}")
        if self.weight_bits not in (4, 8):
            raise QuantizeError(f"weight_bits is {self.weight_bits}", hint="choose 8 or 4")
        if self.group not in GROUPS:
            raise QuantizeError(f"group is {self.group}", hint=f"choose one of {', '.join(map(str, GROUPS))}")
        if self.round_samples < 1:
            raise QuantizeError(f"round_samples is {self.round_samples}", hint="at least one sample is needed")
        if self.bias_samples < 0:
            raise QuantizeError(f"bias_samples is {self.bias_samples}", hint="expected 0 (no correction) or more")

    @property
    def limits_drop(self) -> bool:
        """Whether a drop of accuracy decides about 16 bits, and no budget of cycles."""
        return self.drop >= 0

    @property
    def default_method(self) -> str:
        """The range method of tensors for which none is measured."""
        return METHODS[0].name if self.method == MEASURED else self.method

    @classmethod
    def parse(cls, text: str) -> QuantizeOptions:
        """`auto,budget=10` or `int8,method=percentile,percentile=99.9`: a scheme (may be left out) and fields of this class. Raises QuantizeError."""
        values: dict[str, object] = {}
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        for index, part in enumerate(piece.strip() for piece in text.split(",")):
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals and index == 0 and name in SCHEMES:
                values["scheme"] = name
                continue
            if part in WORDS:
                name, value, equals = *WORDS[part], "="
            if name not in fields or not equals:
                known = ", ".join(fields)
                schemes = ", ".join(SCHEMES)
                raise QuantizeError(f"{part!r} is no quantization option", hint=f"write {schemes} or none, then key=value,… with the keys {known}")
            if name in values:
                raise QuantizeError(f"the option {name!r} is given twice")
            values[name] = _parse(name, value, type(fields[name].default))
        return cls(**values)  # type: ignore[arg-type]


def _parse(name: str, text: str, kind: type) -> object:
    if kind is str:
        return text
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
        if text.lower() in words:
            return words[text.lower()]
        raise QuantizeError(f"{name}={text!r} is neither yes nor no", hint=f"write {name}=yes or {name}=no")
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise QuantizeError(f"{name}={text!r} is no number", hint=f"write {name}=… with {'a whole number' if kind is int else 'a number'}")
    return number
