"""On arrays like SCALE-Sim's, the instruction stream of a compiled network takes SCALE-Sim's cycles, layer by layer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import npucc
from isa import load_target
from tests.benchmarks.scalesim import Compared, Measured, Reference, Shape, compare, measure, summary, table

#: name, kernel, stride, padding, input channels, output channels
LAYERS = (("wide", 3, 1, 1, 3, 40), ("strided", 3, 2, 1, 40, 70), ("deep", 1, 1, 0, 70, 200), ("seven", 7, 2, 3, 200, 33))
SIZE, CLASSES = 24, 130


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """Convolutions of odd sizes one after the other, and a fully connected layer."""
    choose = np.random.default_rng(0)
    nodes, weights, tensor, size = [], [], "x", SIZE
    for name, kernel, stride, padding, channels, outputs in LAYERS:
        values = choose.normal(size=(outputs, channels, kernel, kernel)).astype(np.float32) / kernel
        weights.append(numpy_helper.from_array(values, f"{name}.w"))
        pads, sides = [padding] * 4, [stride] * 2
        nodes.append(helper.make_node("Conv", [tensor, f"{name}.w"], [f"{name}.y"], name=name, kernel_shape=[kernel] * 2, strides=sides, pads=pads))
        tensor, size = f"{name}.y", (size + 2 * padding - kernel) // stride + 1
    features = LAYERS[-1][-1] * size * size
    weights.append(numpy_helper.from_array(choose.normal(size=(features, CLASSES)).astype(np.float32), "fc.w"))
    nodes.append(helper.make_node("Flatten", [tensor], ["flat"], name="flatten"))
    nodes.append(helper.make_node("MatMul", ["flat", "fc.w"], ["y"], name="fc"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, LAYERS[0][4], SIZE, SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CLASSES])
    graph = helper.make_graph(nodes, "layers", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shapes() -> list[tuple[str, Shape]]:
    """Output pixels, products per output and outputs of each layer, by hand."""
    found, size = [], SIZE
    for name, kernel, stride, padding, channels, outputs in LAYERS:
        size = (size + 2 * padding - kernel) // stride + 1
        found.append((name, (size * size, kernel * kernel * channels, outputs)))
    return [*found, ("fc", (1, LAYERS[-1][-1] * size * size, CLASSES))]


def up(amount: int, unit: int) -> int:
    return -(-amount // unit)


def expected_cycles(name: str, shape: Shape) -> int:
    """SCALE-Sim's own formulas, which number the last cycle counting from 0."""
    target, (pixels, depth, outputs) = load_target(name), shape
    rows, columns = target.rows, target.cols
    if target.dataflow == "ws":
        return up(depth, rows) * up(outputs, columns) * (2 * rows + columns + pixels - 2) - 1
    return up(pixels, rows) * up(outputs, columns) * (depth + rows + columns - 2) - 1


@pytest.mark.parametrize("target", ["scalesim-32x32-ws", "scalesim-32x32-os", "scalesim-128x128-ws"])
def test_every_layer_takes_scalesims_cycles(target: str, model: onnx.ModelProto) -> None:
    package = npucc.compile(model, target)
    compared = list(compare(measure(package), [Reference(name, shape, expected_cycles(target, shape)) for name, shape in shapes()]))
    assert [each.measured.layer for each in compared if each.measured] == [name for name, _ in shapes()]
    assert [each.difference for each in compared] == [""] * len(shapes()), table(compared)
    assert summary(compared).startswith("5 of 5 layers equal")


def test_differences_are_told() -> None:
    shape = (10, 20, 30)
    layers = [Measured("a", shape, 2, 120), Measured("b", (1, 1, 1), 1, 5)]
    compared = list(compare(layers, [Reference("first", shape, 99), Reference("second", shape, 99)]))
    assert [each.difference for each in compared] == [
        "+20 cycles: cut into 2 tiles, each of which fills and drains the array",
        "the reference has no such layer",
        "the program has no such layer",
    ]
    assert compared[-1] == Compared(None, Reference("second", shape, 99))
    assert len(table(compared).splitlines()) == 4
