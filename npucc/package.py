"""The compiled model as a user holds it: run it, look into it, save it, take it out as QDQ ONNX.

The one big idea: it is the `.npu` file and nothing else. A package that was just compiled and one that was loaded are the same value;
what is derived (the graph, the machine) is made when it is first asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import isa
from isa import Instruction, Loop, Program
from npucc.errors import CompileError
from npucc.feeds import Port, check_feed
from npucc.signature import ports_of_program

if TYPE_CHECKING:
    import onnx

    from npucc.graph import Graph
    from npucc.prune import PruneReport
    from npucc.quantize import QuantizeReport
    from npucc.segments import HostNode
    from runtime.host import HostEngine
    from runtime.machine import Machine
    from runtime.report import Report
    from runtime.result import Result

SYNTHETIC, FROM_DATA, FROM_MODEL, UNKNOWN = "synthetic", "data", "model", "unknown"


@dataclass(frozen=True, slots=True)
class Refused:
    """A rewrite that was looked at and not done: the stage, and the reason with the node's name."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Package:
    """A program, its constants, and the integer graph that it computes (missing in packages made by `npucc asm`)."""

    contents: isa.Package
    file: str = ""

    @staticmethod
    def create(
        program: Program, constants: bytes, *, graph: Graph, calibration: str, refused: Iterable[Refused] = (),
        pruned: PruneReport | None = None, quantized: QuantizeReport | None = None,
    ) -> Package:
        """The package of a finished compilation. `calibration`: see the property."""
        from npucc import operations, segments, serialize

        models = [segments.attributes_of(node) for node in segments.host_nodes(graph)]
        text, blob = serialize.to_bytes(segments.with_models(graph, [b""] * len(models)))  # a model is a member of its own
        members = {segments.MEMBER.format(number): each.model for number, each in enumerate(models)}
        manifest = {
            "host": [[name, operator, number, reason] for number, each in enumerate(models) for name, operator, reason in each.nodes],
            "operations": operations.count(graph).as_dict(),
            "tool": f"npucc {_own_version()}",
            "calibration": calibration,
            "refused": [[each.stage, each.reason] for each in refused],
            **({"pruned": pruned.as_dict()} if pruned else {}),
            **({"quantized": quantized.as_dict()} if quantized else {}),
        }
        return Package(isa.Package(program, constants, manifest, {serialize.JSON_NAME: text, serialize.BIN_NAME: blob, **members}))

    def save(self, path: str | Path) -> None:
        """Write the `.npu` file whole or not at all; the same package gives the same bytes. Raises PackageError."""
        self.contents.save(path)

    @property
    def program(self) -> Program:
        return self.contents.program

    @property
    def text(self) -> str:
        """The program as npuasm."""
        return self.contents.text

    @property
    def instructions(self) -> int:
        """Lines of the program that are instructions (a loop's body counts once)."""
        return sum(_count(layer.body) for layer in self.program.layers)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Names, ONNX shapes and element types of the inputs."""
        return ports_of_program(self.program)

    @property
    def calibration(self) -> str:
        """Where the scales come from: `data`, `model` (which brought them all), `synthetic` (made-up inputs: accuracy means little) or `unknown`."""
        found = self.contents.manifest.get("calibration")
        return found if found in (SYNTHETIC, FROM_DATA, FROM_MODEL) else UNKNOWN

    @property
    def pruned(self) -> dict[str, Any] | None:
        """What pruning removed, layer by layer (see npucc.prune.PruneReport.as_dict); None for a network that was not pruned."""
        found = self.contents.manifest.get("pruned")
        return found if isinstance(found, dict) else None

    @property
    def quantized(self) -> dict[str, Any] | None:
        """What the quantizer decided, tensor by tensor (see npucc.quantize.QuantizeReport.as_dict); None in float mode and for `npucc asm`."""
        found = self.contents.manifest.get("quantized")
        return found if isinstance(found, dict) else None

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Rewrites that did not apply while compiling, with their reasons."""
        entries = self.contents.manifest.get("refused")
        pairs = [entry for entry in entries if isinstance(entry, list) and len(entry) == 2] if isinstance(entries, list) else []
        return tuple(Refused(str(stage), str(reason)) for stage, reason in pairs)

    @property
    def host_nodes(self) -> tuple[HostNode, ...]:
        """The ONNX nodes that onnxruntime runs, each with its segment and the reason."""
        from npucc.segments import HostNode

        entries = self.contents.manifest.get("host")
        rows = [row for row in entries if isinstance(row, list) and len(row) == 4] if isinstance(entries, list) else []
        return tuple(HostNode(str(row[0]), str(row[1]), row[2], str(row[3])) for row in rows if isinstance(row[2], int))

    @property
    def operations(self) -> dict[str, Any] | None:
        """The work on the NPU and on the host (see npucc.operations.Split); None when the package does not say."""
        found = self.contents.manifest.get("operations")
        return found if isinstance(found, dict) else None

    @property
    def onnx_nodes(self) -> int:
        """How many ONNX nodes the program does the work of, on the NPU and on the host; those that cost nothing are not counted."""
        return len({name for layer in self.program.layers for name in layer.nodes})

    @property
    def host_cycles(self) -> int:
        """Cycles of an inference in which only the host works or is waited for."""
        return sum(layer.cycles for layer in self.report.layers if layer.op == "host")

    @cached_property
    def graph(self) -> Graph:
        """The integer graph. Raises CompileError when the package has none, PackageError when it is damaged."""
        from npucc import segments, serialize

        try:
            text, blob = (self.contents.members[name] for name in (serialize.JSON_NAME, serialize.BIN_NAME))
        except KeyError:
            raise CompileError(
                "the package has a program but no graph", file=self.file, hint="packages made by `npucc asm` have none; compile the ONNX model"
            ) from None
        graph, models = serialize.from_bytes(text, blob, file=self.file), self._segments()
        if len(models) != len(segments.host_nodes(graph)):
            raise isa.PackageError(f"the graph has {len(segments.host_nodes(graph))} host segments, the package {len(models)}", file=self.file)
        return segments.with_models(graph, models)

    @cached_property
    def machine(self) -> Machine:
        """The NPU with this program loaded and decoded; made once, run often."""
        from runtime.machine import Machine

        return Machine(self.contents, host=self._engine())

    def _engine(self) -> HostEngine | None:
        """onnxruntime with the package's host segments; None when it has none."""
        from npucc import segments

        return segments.Engine(self._segments()) if self._segments() else None

    def _segments(self) -> tuple[bytes, ...]:
        """The models of the host segments, by number."""
        from npucc import segments

        names = itertools.takewhile(self.contents.members.__contains__, map(segments.MEMBER.format, itertools.count()))
        return tuple(self.contents.members[name] for name in names)

    @cached_property
    def report(self) -> Report:
        """Cycles, bytes and energy of one inference; they do not depend on its inputs (where the target skips zeros in them: the most it takes)."""
        from runtime.report import make_report
        from runtime.timing import simulate

        return make_report(self.program, simulate(self.program, self.contents.constants))

    def run(self, feed: Mapping[str, Any], *, tensors: bool = False) -> Result:
        """One inference on `{input name: array of the model's shape}`; `tensors` keeps every named tensor. Raises DataError, RuntimeFault."""
        return self.machine.run(check_feed(feed, self.inputs), dump=tensors)

    def run_many(self, feeds: Iterable[Mapping[str, Any]], *, workers: int = 1) -> Iterator[Result]:
        """One Result per feed, in order, as they are asked for. Raises DataError, RuntimeFault.

        With `workers` above 1 (`os.cpu_count()` uses all cores) that many processes compute the same bytes; each loads the package first.
        """
        checked = (check_feed(feed, self.inputs) for feed in feeds)
        return self.machine.run_many(checked, workers=workers)

    def to_onnx(self, *, unsigned: bool | None = None, exact: bool = True) -> onnx.ModelProto:
        """The same quantized model as QDQ ONNX (see `npucc.export.to_onnx`). Raises CompileError when the package has no graph."""
        from npucc.export import to_onnx

        return to_onnx(self.graph, unsigned=unsigned, exact=exact)


def load(path: str | Path) -> Package:
    """The package in a `.npu` file, verified. Raises PackageError."""
    return Package(isa.Package.load(path), str(path))


def _count(body: tuple[Instruction | Loop, ...]) -> int:
    return sum(_count(item.body) if isinstance(item, Loop) else 1 for item in body)


def _own_version() -> str:
    try:
        return version("npucc")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "0.1.0"
