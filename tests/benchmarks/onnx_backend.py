"""ONNX's own backend tests, run by npucc in float mode and by onnxruntime's CPU provider with the same harness.

    python tests/benchmarks/onnx_backend.py [--kind node] [--filter REGEX] [--json RESULTS.json]

A test counts for npucc if onnxruntime passes it. Those that npucc does not pass are printed with their reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from isa.errors import IsaError
from npucc import backend
from npucc.errors import NpuccError
from runtime.errors import RuntimeFault

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
Run = Callable[[onnx.ModelProto, list[Any]], Sequence[Any]]


class Unreadable(Exception):
    """The test's data can't be read."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test went: `reason` is empty where it passed."""

    name: str
    onnxruntime: str
    npucc: str


def cases_of(kind: str, pattern: str) -> Iterator[TestCase]:
    """The cases of a kind whose name matches."""
    return (case for case in load_model_tests(kind=kind) if re.search(pattern, case.name))


def run_case(case: TestCase, run: Run) -> str:
    """Why the case fails; "" when it passes."""
    try:
        folder = Path(case.model_dir or "")
        model = case.model or onnx.load(folder / "model.onnx")
        for inputs, wanted in case.data_sets or _data_sets(folder, model.graph):
            inputs = [np.asarray(value) if isinstance(value, np.generic) else value for value in inputs]
            Runner.assert_similar_outputs(wanted, list(run(model, inputs)), case.rtol, case.atol)
    except (NpuccError, IsaError, RuntimeFault) as error:
        return error.message
    except AssertionError as error:
        return f"another result: {' '.join(str(error).split())[:80]}"
    except Unreadable as error:
        return f"unreadable data: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""


def _data_sets(folder: Path, graph: onnx.GraphProto) -> Iterator[tuple[list[Any], list[Any]]]:
    for data in sorted(folder.glob("test_data_set_*")):
        yield _read(data, "input", graph.input), _read(data, "output", graph.output)


def _read(folder: Path, stem: str, values: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    arrays: list[Any] = []
    for index, value in enumerate(values[: len(list(folder.glob(f"{stem}_*.pb")))]):
        content = (folder / f"{stem}_{index}.pb").read_bytes()
        arrays.append(_decode(content, value.type))
    return arrays


def _decode(content: bytes, kind: onnx.TypeProto) -> Any:
    try:
        if kind.HasField("sequence_type"):
            sequence = onnx.SequenceProto()
            sequence.ParseFromString(content)
            return numpy_helper.to_list(sequence)
        if kind.HasField("optional_type"):
            optional = onnx.OptionalProto()
            optional.ParseFromString(content)
            return numpy_helper.to_optional(optional)
        tensor = onnx.TensorProto()
        tensor.ParseFromString(content)
        return numpy_helper.to_array(tensor)
    except Exception as error:
        raise Unreadable(str(error)) from None


def by_onnxruntime(model: onnx.ModelProto, inputs: list[Any]) -> Sequence[Any]:
    """The reference: onnxruntime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(zip([value.name for value in session.get_inputs()], inputs, strict=False))))


def by_npucc(model: onnx.ModelProto, inputs: list[Any]) -> Sequence[Any]:
    """npucc in float mode."""
    for value in inputs:
        if not isinstance(value, np.ndarray | np.generic):
            raise NpuccError(f"an input is a {type(value).__name__}, not a tensor")
    return list(backend.run_model(model, inputs))


def main() -> int:
    """Run the tests and print counts; 1 when a test that onnxruntime passes fails without a stated reason."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--filter", default="", help="a regular expression on the tests' names")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes, surprises = {}, 0
    for kind in chosen.kind or KINDS:
        outcomes[kind] = [Outcome(case.name, run_case(case, by_onnxruntime), run_case(case, by_npucc)) for case in cases_of(kind, chosen.filter)]
        surprises += report(kind, outcomes[kind])
    if chosen.json:
        rows = {kind: [[each.name, each.onnxruntime, each.npucc] for each in group] for kind, group in outcomes.items()}
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(surprises > 0)


#: what the machine can't hold, by the text of the refusal
EXCLUDED = (
    (r"has element type STRING", "strings"), (r"is a (list|NoneType)|is not a tensor|not a tensor", "sequences and optional values"),
    (r"has element type", "element types below 8 bits or beyond numpy's"), (r"holds nothing|has shape .*0", "tensors without elements"),
    (r"is also an input", "an output that is an input"), (r"opset", "opsets before 7"),
)  # fmt: skip


def report(kind: str, outcomes: Sequence[Outcome]) -> int:
    """Print the counts of a kind; the number of failures that no exclusion explains."""
    counts = Counter((not each.onnxruntime, not each.npucc) for each in outcomes)
    print(f"{kind}: {len(outcomes)} tests; onnxruntime passes {counts[True, True] + counts[True, False]}, npucc {counts[True, True]} of those")
    if counts[False, True]:
        print(f"  npucc passes {counts[False, True]} that onnxruntime fails")
    missed = [each for each in outcomes if not each.onnxruntime and each.npucc]
    why: dict[str, list[Outcome]] = {}
    for each in missed:
        why.setdefault(next((reason for text, reason in EXCLUDED if re.search(text, each.npucc)), ""), []).append(each)
    for reason, group in sorted(why.items()):
        print(f"  {len(group)} excluded: {reason}" if reason else f"  {len(group)} FAILED")
        for each in group:
            print(f"    {each.name}: {each.npucc[:140]}")
    return len(why.get("", ()))


if __name__ == "__main__":
    sys.exit(main())
