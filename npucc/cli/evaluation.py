"""`npucc eval`: what quantization costs in accuracy, and where."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from npucc import tables
from npucc.cli import options, terminal
from npucc.errors import CompileError, DataError, ImportModelError
from npucc.feeds import Dataset, open_dataset
from npucc.package import SYNTHETIC, Package, load

if TYPE_CHECKING:
    from npucc.evaluate import Evaluation, LayerError, Run

EPILOG = """\b
Examples:
  npucc eval model.npu --reference model.onnx --data labelled.npz
  npucc eval model.npu --reference model.onnx --data samples.npz --layers
  npucc eval model.npu --reference model.onnx --data samples.npz --limit 100 --json
\b
SQNR is signal energy over error energy; agreement is how often both have the same largest score.
With `labels` in the data, the accuracies of both are counted. Per layer there are two errors: accumulated
(as it comes out of the quantized network) and single (this layer alone, on exact inputs). --layers shows all
of them with the range of values covered and seen, the share that saturates, and what the quantizer did for each."""

SYNTHETIC_WARNING = "the package was calibrated with made-up inputs (no --calibration at compile): its accuracy means little"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("eval", epilog=EPILOG)(evaluate)


def evaluate(
    package: options.PackageFile,
    reference: Annotated[
        Path,
        typer.Option(
            "--reference",
            "-r",
            metavar="MODEL.onnx",
            help="The float model, run by onnxruntime.",
            exists=True,
            dir_okay=False,
            readable=True,
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", "-d", metavar="DATA", help=f"Samples, best with `labels`: {options.DATA_HELP}.", show_default=False)
    ],
    limit: options.Limit = None,
    layer_samples: Annotated[
        int, typer.Option("--layer-samples", metavar="N", min=0, help="Measure errors per layer on the first N samples; 0 leaves them out.")
    ] = 4,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every layer: errors, range, saturation, what was done for it.", show_default=False)
    ] = False,
    json: options.Json = False,
) -> None:
    """Compare a package with the float model it was made from."""
    options.existing(data, "--data")
    loaded = load(package)
    dataset = open_dataset(data, loaded.inputs, limit=limit)
    with terminal.progress() as progress:
        result = measure(loaded, reference, dataset, layer_samples=layer_samples, progress=progress)
    if loaded.calibration == SYNTHETIC:
        terminal.warn(SYNTHETIC_WARNING)
    if json:
        extra = {} if loaded.quantized is None else {"quantized": loaded.quantized}
        terminal.show_json({"target": loaded.program.target.name, "calibration": loaded.calibration, **result.as_dict(), **extra})
    else:
        terminal.show(*report(result, loaded, every_layer=layers))


def measure(package: Package, reference: Path, dataset: Dataset, *, layer_samples: int, progress: terminal.Report) -> Evaluation:
    """Run both models over the samples, then the layers over the first few. Raises NpuccError."""
    from npucc import evaluate as evaluation

    def count(what: str, done: int, _: int) -> None:
        progress(what, done, len(dataset) if what == "evaluate" else layer_samples)

    result = evaluation.evaluate(lambda feed: package.run(feed).outputs, reference_runner(reference, package), dataset.samples(), progress=count)
    return replace(result, layers=_layers(package, reference, dataset, layer_samples, count)) if layer_samples else result


def _layers(package: Package, reference: Path, dataset: Dataset, samples: int, progress: terminal.Report) -> tuple[LayerError, ...]:
    """Errors per layer; none for a package without a graph."""
    from npucc import evaluate as evaluation
    from npucc.compiler import float_graph

    try:
        graph = package.graph
    except CompileError as error:
        terminal.warn(f"no errors per layer: {error.message}")
        return ()
    if package.pruned is not None:
        terminal.warn("no errors per layer: the network was pruned, so its layers have no counterpart in the reference model")
        return ()
    original = float_graph(reference, {name: graph.tensors[name].shape for name in graph.inputs})
    runner, mode = evaluation.float_runner(original), package.program.target.requantize
    equalized = (package.quantized or {}).get("equalized", ())
    return evaluation.layer_errors(graph, runner, itertools.islice(dataset, samples), requantize=mode, equalized=equalized, progress=progress)


def reference_runner(path: Path, package: Package) -> Run:
    """A function from a feed to the float model's outputs by name. Raises ImportModelError, DataError."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise ImportModelError(f"onnxruntime can't load the reference model: {_first_line(error)}", file=str(path)) from error
    wanted, found = {port.name for port in package.inputs}, {value.name for value in session.get_inputs()}
    if wanted - found:
        raise DataError(
            f"the reference model has no input {sorted(wanted - found)[0]!r}", file=str(path), hint="give the model that the package was made from"
        )
    names = [value.name for value in session.get_outputs()]

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(zip(names, session.run(names, dict(feed)), strict=True))
        except Exception as error:
            raise DataError(f"onnxruntime can't run the reference model: {_first_line(error)}", file=str(path)) from error

    return run


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def report(result: Evaluation, package: Package, *, worst: int = 10, every_layer: bool = False) -> list[RenderableType]:
    """The evaluation as tables; of the layers the worst, or all with what is known of them."""
    parts: list[RenderableType] = []
    if result.float_accuracy is not None and result.npu_accuracy is not None and result.accuracy_drop_points is not None:
        parts += [tables.facts(accuracy(result, package)), ""]
    rows = [(each.name, f"{each.sqnr_db:.1f}", f"{each.cosine:.5f}", f"{each.max_abs:.4g}", _percent(each.top1_agreement)) for each in result.outputs]
    parts.append(tables.grid(f"outputs, {result.samples} samples", ("output", "SQNR dB", "cosine", "largest error", "top-1 agreement"), rows))
    if result.layers and every_layer:
        parts += ["", *diagnosis(result.layers, package)]
    elif result.layers:
        chosen = sorted(result.layers, key=lambda layer: layer.single_db)[:worst]
        lines = [(layer.name, layer.op, f"{layer.accumulated_db:.1f}", f"{layer.single_db:.1f}") for layer in chosen]
        parts += [
            "",
            tables.grid(f"the {len(chosen)} least exact of {len(result.layers)} nodes", ("node", "op", "accumulated dB", "single dB"), lines, left=2),
        ]
    return parts


def diagnosis(layers: Sequence[LayerError], package: Package) -> list[RenderableType]:
    """Every layer, the one that errs most by itself first; where accumulated error is far below single, the layers before it are to blame."""
    decided = package.quantized or {}
    remedies = {row["name"]: row.get("remedy", "") for row in decided.get("tensors", [])}
    for each in decided.get("equalized", []):
        remedies[each["tensor"]] = ", ".join(filter(None, ("channels equalized", remedies.get(each["tensor"], ""))))
    by_accumulated = sorted(layers, key=lambda layer: math.inf if layer.accumulated_db is None else layer.accumulated_db)
    place = {layer.name: position for position, layer in enumerate(by_accumulated, start=1)}
    rows = [
        (
            layer.name, layer.op, f"{layer.single_db:.1f}", "-" if layer.accumulated_db is None else f"{layer.accumulated_db:.1f}", place[layer.name],
            layer.dtype, _range(layer.covered), _range(layer.seen), f"{layer.saturated:.3%}", remedies.get(layer.tensor, ""),
        )
        for layer in sorted(layers, key=lambda layer: layer.single_db)
    ]  # fmt: skip
    headers = ("node", "op", "single dB", "accumulated dB", "its rank", "type", "covered", "seen", "saturated", "remedy")
    return [tables.grid(f"{len(rows)} nodes, the one that errs most by itself first", headers, [tuple(map(str, row)) for row in rows], left=2)]


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:.4g} … {limits[1]:.4g}"


def accuracy(result: Evaluation, package: Package) -> list[tuple[str, str]]:
    """Accuracy lines; they repeat where the scales come from if that was made up."""
    doubt = " (synthetic calibration: means little)" if package.calibration == SYNTHETIC else ""
    return [
        ("float accuracy", _percent(result.float_accuracy)),
        ("NPU accuracy", _percent(result.npu_accuracy) + doubt),
        ("drop", f"{result.accuracy_drop_points:.2f} points on {result.samples} samples"),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
