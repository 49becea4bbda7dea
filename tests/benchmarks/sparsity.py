"""What zeros are worth: cycles, energy and traffic of one network by pattern of its weights and by target.

    python -m tests.benchmarks.sparsity [MODEL.onnx [--calibration DATA]] [--pattern 2:4 --pattern block=70% …] [--target edge --target sparse-2to4 …]

The one big idea: only the time is measured here (what accuracy a pattern costs: `tests.benchmarks.pruning`), so the least weights of the integer
network are zeroed, without any repair. Without a model: six 3×3 convolutions of 256 channels with ReLU on 28×28 pixels, where
multiply-accumulates are nearly all the work. Every line is one inference, of DATA's first sample or of made-up data
(zeros of inputs count only where they are real). "Array used": the products that were done over
those that the array could have done while it worked; "was": the same products on an array that skips nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import npucc
from isa.target import Target, load_target
from npucc.feeds import open_dataset, synthetic_feeds
from npucc.graph import Graph, make_graph
from npucc.lowering import lower
from npucc.prune import PruneOptions
from npucc.sites import find_sites
from runtime import Machine

PATTERNS = ("dense", "2:4", "1:4", "block=70%", "unstructured=70%")
TARGETS = ("edge", "sparse-2to4", "sparse-dynamic")
CHANNELS, LAYERS, PIXELS = 256, 6, 28


def stack() -> onnx.ModelProto:
    """Convolutions with ReLU, random weights."""
    random, nodes, weights, source = np.random.default_rng(0), [], [], "x"
    for index in range(LAYERS):
        values = random.normal(0, np.sqrt(2 / (9 * CHANNELS)), (CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        source = f"r{index}"
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, CHANNELS, PIXELS, PIXELS]) for name in ("x", source)]
    return helper.make_model(helper.make_graph(nodes, "stack", ports[:1], ports[1:], weights), opset_imports=[helper.make_opsetid("", 17)])


def zeroed(graph: Graph, text: str, target: Target) -> Graph:
    """The integer graph without its least weights, in the pattern."""
    pattern = None if text == "dense" else PruneOptions.parse(text).pattern
    if pattern is None:
        return graph
    pattern, tensors = pattern.on(target), dict(graph.tensors)
    for site in find_sites(graph).values():
        weights = tensors[site.weights]
        if weights.data is None or not pattern.fits(site):
            continue
        matrix, order = site.by_column(weights.data).copy(), site.summing_order
        stays = np.zeros(matrix.shape[1:], bool)
        stays[order] = pattern.choose(matrix[0, order].astype(np.float64) ** 2)
        data = site.as_stored(np.where(stays, matrix, 0), weights.shape).astype(weights.data.dtype)
        tensors[site.weights] = replace(weights, data=np.ascontiguousarray(data))
    return make_graph(graph.name, list(graph), tensors, graph.inputs, graph.outputs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--calibration", type=Path, metavar="DATA")
    parser.add_argument("--pattern", action="append", help=f"default: {', '.join(PATTERNS)}")
    parser.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder) / "stack.onnx"
        if arguments.model is None:
            onnx.save(stack(), model)
        package = npucc.compile(model, calibration=arguments.calibration)
    feed = next(iter(open_dataset(arguments.calibration, package.inputs) if arguments.calibration else synthetic_feeds(package.inputs)))
    first: tuple[int, float] | None = None
    print(f"{'weights':18s}{'target':16s}{'cycles':>12s}{'':8s}{'matrix engine':>14s}{'energy':>12s}{'':7s}{'DRAM read':>12s}  array used, was")
    for text in arguments.pattern or PATTERNS:
        for name in arguments.target or TARGETS:
            lowered = lower(zeroed(package.graph, text, load_target("edge")), load_target(name))
            report = Machine(lowered.program, lowered.constants).run(feed).report
            first = first or (report.cycles, report.energy_pj)
            gain, less = first[0] / report.cycles, 1 - report.energy_pj / first[1]
            used = f"{report.array_utilization:.0%}" + (f", {report.array_utilization_unskipped:.0%}" if report.skipped_macs else "")
            print(
                f"{text:18s}{name:16s}{report.cycles:12,}{f'÷{gain:.2f}':>8s}{report.matrix_cycles:14,}{report.energy_pj / 1e6:9.1f} µJ{-less:+7.0%}"
                f"{report.dram_read_bytes:12,}  {used}",
                flush=True,
            )


if __name__ == "__main__":
    main()
