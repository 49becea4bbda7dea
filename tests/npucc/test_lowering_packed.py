"""Weights with structure, whoever made it: found by their values, stored packed, skipped where the target can; never another byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import npucc
from isa.check import check
from isa.discipline import suspicions
from isa.program import Program, Tile, unroll
from isa.target import load_target
from npucc import demo, reference
from npucc.graph import Graph, make_graph
from npucc.lowering import lower
from npucc.ops import OPS
from runtime import Machine

EDGE = load_target("edge")
SMALL = replace(EDGE, name="small", rows=8, cols=8, skip="structured")
TARGETS = {
    "edge": EDGE, "small": SMALL, "cube": replace(load_target("cube"), rows=8, cols=8, depth=8, skip="structured"),
    "weights": replace(load_target("sparse-dynamic"), skip="weights"), "both": load_target("sparse-dynamic"),
}  # fmt: skip


def structured(matrix: np.ndarray, kind: str) -> np.ndarray:
    """s8 [K, N] with the structure."""
    if kind == "s4":
        return np.clip(matrix // 16, -7, 7) * 16
    if kind == "mask":
        return np.where(np.abs(matrix) > np.quantile(np.abs(matrix), 0.7), matrix, 0)
    rows, columns = np.indices(matrix.shape)
    if kind == "block":
        return np.where((rows // 8 + columns // 32) % 4 == 0, matrix, 0)
    _, keep, neighbours = kind.split(":")
    return np.where((rows + columns) % int(neighbours) < int(keep), matrix, 0)


def with_structure(graph: Graph, kind: str) -> Graph:
    """The integer graph with other weights."""
    tensors = dict(graph.tensors)
    for node in graph:
        weights = tensors[node.inputs[1]] if OPS[node.op].matrix else None
        if weights is not None and weights.data is not None and getattr(node.attributes, "groups", 1) == 1:
            order = (2, 3, 1, 0) if weights.data.ndim == 4 else (0, 1)
            laid = weights.data.transpose(order)
            values = structured(laid.reshape(-1, laid.shape[-1]).astype(np.int16), kind).reshape(laid.shape)
            tensors[weights.name] = replace(weights, data=values.transpose(np.argsort(order)).astype(weights.data.dtype))
    return make_graph(graph.name, list(graph), tensors, graph.inputs, graph.outputs)


def packed_tiles(program: Program, name: str) -> list[Tile]:
    return [tile for layer in program.layers for line, _ in unroll(layer.body) if line.name == name for tile in line.tiles if tile.packing]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("nm:2:4", ("edge", "small")), ("nm:1:4", ("cube",)), ("nm:4:8", ("both",)),
        ("block", ("small", "cube")), ("mask", ("weights",)), ("s4", ("edge",)),
    ],
)  # fmt: skip
def test_structure_is_found_and_changes_no_byte(demo_package: npucc.Package, kind: str, targets: tuple[str, ...]) -> None:
    graph = with_structure(demo_package.graph, kind)
    with np.load(demo.CALIBRATION) as archive:
        feed = {"image": archive["image"][:1]}
    expected = reference.run(graph, feed)
    for name in targets:
        target = TARGETS[name]
        lowered, dense = (lower(graph, each, shares=(0.5,)) for each in (target, replace(target, weight_formats="", skip="none")))
        check(lowered.program)
        assert not suspicions(lowered.program)
        machine, plain = Machine(lowered.program, lowered.constants), Machine(dense.program, dense.constants)
        run = machine.run(feed, dump=True)
        for tensor, stored in {**run.tensors, **run.raw}.items():
            np.testing.assert_array_equal(stored, expected[tensor], err_msg=f"{tensor} on {name}")
        found = {tile.packing.kind for tile in packed_tiles(lowered.program, "ld") if tile.packing}
        by_chance = {"mask"} if target.skip != "structured" else set()  # takes fewer bytes than nm where there are more zeros than it asks for
        assert found & {kind, *by_chance}
        assert run.report.dram_read_bytes < plain.report.dram_read_bytes
        if target.skip != "none":
            assert packed_tiles(lowered.program, "conv")
            assert run.report.skipped_macs > 0
            assert run.report.matrix_cycles < plain.report.matrix_cycles
            assert run.report.energy_pj < plain.report.energy_pj
            assert run.report.cycles <= machine.report.cycles


def test_a_dense_network_is_stored_as_it_is(demo_package: npucc.Package) -> None:
    assert not packed_tiles(demo_package.program, "ld")


def pruned_model(kind: str, random: np.random.Generator) -> onnx.ModelProto:
    """Two 3×3 convolutions of 32 channels with ReLU that come with zeros: 2:4, whole blocks of 32×32, or anywhere."""
    constants, nodes, source = [], [], "x"
    for index in range(2):
        weights = random.normal(size=(72, 4, 32))
        if kind == "nm":
            np.put_along_axis(weights, np.argsort(np.abs(weights), axis=1)[:, :2], 0, axis=1)
        elif kind == "block":
            weights.reshape(9, 32, 32)[[1, 2, 4, 5, 7, 8]] = 0
        else:
            weights[np.abs(weights) < 1] = 0
        laid = weights.reshape(3, 3, 32, 32).transpose(3, 2, 0, 1).astype(np.float32)
        constants.append(numpy_helper.from_array(np.ascontiguousarray(laid), f"w{index}"))
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        source = f"r{index}"
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32, 12, 12]) for name in ("x", source)]
    return helper.make_model(helper.make_graph(nodes, "pruned", ports[:1], ports[1:], constants), opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("kind", "target", "least"), [("nm", "sparse-2to4", 1.5), ("block", "sparse-2to4", 2.0), ("mask", "sparse-dynamic", 1.5)]
)
def test_zeros_of_an_imported_model_are_found_and_used(kind: str, target: str, least: float) -> None:
    """The quantizer leaves the zeros alone, the target skips them; the same program on a chip that can't gives the same bytes later."""
    random = np.random.default_rng(11)
    model, feeds = pruned_model(kind, random), [{"x": random.normal(size=(1, 32, 12, 12)).astype(np.float32)} for _ in range(8)]
    package = npucc.compile(model, target, calibration=feeds, quant="int8")
    assert {tile.packing.format for tile in packed_tiles(package.program, "conv") if tile.packing} == {kind}
    program, constants = package.program, package.contents.constants
    skipping, plain = (Machine(replace(program, target=replace(program.target, skip=skip)), constants) for skip in (program.target.skip, "none"))
    run, dense = skipping.run(feeds[0]), plain.run(feeds[0])
    assert least * run.report.matrix_cycles < dense.report.matrix_cycles
    assert run.report.dram_read_bytes == dense.report.dram_read_bytes
    expected = reference.run(package.graph, feeds[0])
    for name, stored in run.raw.items():
        np.testing.assert_array_equal(stored, expected[name])
        np.testing.assert_array_equal(stored, dense.raw[name])


def test_a_grouped_convolution_with_zeros() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 4, 3, 3)).astype(np.float32)
    weights[:, :, 0] = weights[:, :, 2] = 0
    x = np.random.default_rng(1).normal(size=(1, 64, 6, 6)).astype(np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], group=16, pads=[1, 1, 1, 1])], "grouped",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
            [numpy_helper.from_array(weights, "w")],
        ), opset_imports=[helper.make_opsetid("", 18)],
    )  # fmt: skip
    package = npucc.compile(model, calibration=[{"x": x}])
    assert packed_tiles(package.program, "ld")
    np.testing.assert_array_equal(package.run({"x": x}).outputs["y"], reference.run_outputs(package.graph, {"x": x})["y"])
