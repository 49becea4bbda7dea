"""The exported models: float ones mean the same, QDQ ones are integer for integer what the reference computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from npucc import ops, reference
from npucc.export import stored_name, to_onnx
from npucc.graph import Editor, Graph, Quant
from npucc.quantize import QuantizeOptions, quantize

from .float_graphs import FloatNet, classifier, classifier_feeds, exact_session, run_session
from .integer_graphs import GRAPHS, Net


def feeds_on_the_grid(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """Inputs that use every stored value."""
    random = np.random.default_rng(seed)
    feeds = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        feeds[name] = reference.to_real(tensor, random.integers(-128, 128, tensor.shape).astype(np.int8))
    return feeds


def with_softmax_of_256ths(graph: Graph) -> Graph:
    """The quantizer gives every softmax a scale of 1/n, as onnxruntime's kernel assumes."""
    editor = Editor(graph)
    for node in graph:
        if node.op == "softmax":
            tensor = graph.tensors[node.outputs[0]]
            editor.tensors[tensor.name] = replace(tensor, quant=Quant("s8", np.asarray(1 / 256, np.float32), -128))
    return editor.freeze()


def stored(graph: Graph, name: str, value: np.ndarray) -> np.ndarray:
    """Real values of an output as the integers they come from."""
    tensor = graph.tensors[name]
    if tensor.quant is None or value.dtype == bool:
        return value.astype(np.int64)
    return np.rint(value.astype(np.float64) / float(tensor.quant.scale)).astype(np.int64) + tensor.quant.zero


def mismatches(graph: Graph, model: onnx.ModelProto, option: str = "session.x64quantprecision") -> tuple[int, int, int]:
    """(differing, all, largest difference) over outputs and a few inputs."""
    session, differing, total, largest = exact_session(model, option=option), 0, 0, 0
    for seed in range(3):
        feeds = feeds_on_the_grid(graph, seed)
        expected = reference.run(graph, feeds)
        for name, value in run_session(session, feeds).items():
            difference = np.abs(stored(graph, name, value) - expected[name].astype(np.int64))
            differing, total = differing + int((difference > 0).sum()), total + difference.size
            largest = max(largest, int(difference.max()))
    return differing, total, largest


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "elementwise"])  # that one divides by zero
def test_onnxruntime_agrees_with_the_reference(name: str, seed: int) -> None:
    graph = with_softmax_of_256ths(GRAPHS[name](Net(seed)))
    assert mismatches(graph, to_onnx(graph))[0] == 0
    if name == "widths_in_turn":
        return  # one step of 8 bits, which float may differ by, is hundreds of 16
    differing, total, largest = mismatches(graph, to_onnx(graph, exact=False))  # operators as ONNX has them: some run in float
    assert largest <= 1
    assert differing <= 0.003 * total


@pytest.mark.parametrize("zero", [-128, -3, 127])
@pytest.mark.parametrize("shape", [(2, 8, 9, 5), (1, 8, 1, 1), (5,)])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "max", "min"])
@pytest.mark.parametrize("scale", [0.05, 0.0625, 0.1], ids=["other scale", "power of two", "same scale"])
def test_elementwise_is_exact_ties_included(op: str, shape: tuple[int, ...], scale: float, zero: int) -> None:
    net = Net(1)
    x, y = net.input(2, 8, 9, 5, quant=net.quant(0.1, zero)), net.input(*shape, quant=net.quant(scale, 7))
    outcome = 0.1 if op != "mul" else 0.1 * scale * 64
    results = [net.op(op, [x, y], ops.Binary(clamp), quant=net.quant(outcome, 5)) for clamp in (None, (0.0, 3.3))]
    results.append(net.op(op, [x, net.constant(shape, net.quant(scale, -9))], ops.Binary(), quant=net.quant(outcome, 5)))
    graph = net.graph(*results)
    assert mismatches(graph, to_onnx(graph))[0] == 0


TABLES = [
    "x", ("relu", "x"), ("clip", "x", -1.0, 1.0), ("sigmoid", "x"), ("tanh", "x"), ("hard_swish", "x"), ("leaky_relu", "x", 0.1),
    ("exp", "x"), ("mul", "x", ("sigmoid", "x")), ("where", ("lt", "x", 0.5), 2.0, "x"), 1.5,
]  # fmt: skip


@pytest.mark.parametrize("expression", TABLES, ids=str)
def test_tables_agree(expression: object) -> None:
    net = Net(2)
    x = net.input(2, 8, 9, 5, quant=net.quant(0.043, -11))
    graph = net.graph(*(net.op("table", [x], ops.Table(expression), quant=quant) for quant in (net.quant(0.043, -128), net.quant(0.02, 3))))
    assert mismatches(graph, to_onnx(graph))[0] == 0


def test_16_bits_through_products_and_reductions() -> None:
    """Values over the whole range, with zero points: sums beyond 24 bits, and beyond 32, where they wrap around."""
    net = Net(4)
    quant = Quant("s16", np.float32(0.0003), 1234)
    x, loud = (net.op("table", [net.input(1, 6, 9, 8)], ops.Table(("mul", part, 9.0)), quant=quant) for part in ("x", ("abs", "x")))
    w = net.tensor("turned", (6, 4, 3, 2), Quant("s8", np.float32(0.002)), net.random.integers(-127, 128, (6, 4, 3, 2)).astype(np.int8))
    rows = net.op("reshape", [x], ops.Reshape((1, 6, 72)))
    long = net.op("expand", [net.op("reshape", [loud], ops.Reshape((1, 432, 1)))], ops.Expand((3, 432, 4)))
    most = net.tensor("most", (1296, 5), Quant("s8", np.float32(0.002)), np.full((1296, 5), 127, np.int8))
    lines = net.op("reshape", [long], ops.Reshape((4, 1296)))
    results = [
        net.op("conv_transpose", [x, w], ops.ConvTranspose((2, 3), (1, 0, 2, 1), (1, 2), output_padding=(1, 0))),
        net.op("matmul", [lines, most], ops.MatMul(), quant=quant),
        net.op("matmul", [rows, net.op("transpose", [net.input(1, 3, 72)], ops.Transpose((0, 2, 1)))], ops.MatMul()),
        net.op("average_pool", [x], ops.Pool((3, 2), (2, 1), (1, 0, 2, 1), (1, 2))),
        net.op("reduce_sum", [x], ops.Reduce((1, 3)), quant=Quant("s16", np.float32(0.01), -77)),
        net.op("softmax", [x], ops.Softmax(1), quant=Quant("s16", np.float32(1 / 32768), -32768)),
    ]
    graph = net.graph(*results)
    stored_lines = reference.run(graph, feeds_on_the_grid(graph, 0), keep=[lines])[lines]
    assert (stored_lines.astype(np.int64) - 1234).sum(axis=1).max() * 127 > 2**31
    assert mismatches(graph, to_onnx(graph))[0] == 0


def test_scales_of_adjacent_pairs_are_not_merged() -> None:
    net = Net(0)
    x = net.input(1, 300, quant=net.quant(0.1, 0))
    narrow = net.op("table", [x], ops.Table("x"), quant=net.quant(0.03, 10))
    graph = net.graph(net.op("table", [narrow], ops.Table("x"), quant=net.quant(0.07, -5)))
    assert mismatches(graph, to_onnx(graph))[0] == 0


def test_a_tensor_with_many_readers_stays_in_integers() -> None:
    graph = with_softmax_of_256ths(GRAPHS["residual"](Net(5)))
    graph = replace(graph, outputs=(*graph.outputs, *(node.outputs[0] for node in graph)))
    differing, _, largest = mismatches(graph, to_onnx(graph))
    assert (differing, largest) == (0, 0)


def test_weights_that_two_convolutions_share() -> None:
    net = Net(3)
    weights, a, b = net.weights((8, 6, 3, 3), 0), net.input(1, 6, 9, 9), net.input(1, 6, 7, 5)
    graph = net.graph(net.op("conv", [a, weights], ops.Conv()), net.op("conv", [b, weights], ops.Conv()))
    assert mismatches(graph, to_onnx(graph))[0] == mismatches(graph, to_onnx(graph, exact=False))[0] == 0


def test_signed_activations_agree_where_onnxruntime_is_told_to_keep_them() -> None:
    graph = GRAPHS["convolutions"](Net(2))
    model = to_onnx(graph, unsigned=False)
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT32}
    assert mismatches(graph, model, option="session.qdqisint8allowed")[0] == 0


def test_integers_wider_than_a_byte_are_written() -> None:
    net = Net(0)
    wide = Quant("s16", np.asarray(1.0, np.float32), 0)
    x = net.input(1, 8, 1, quant=wide)
    classes = net.tensor("classes", (300,), wide, np.arange(300, dtype=np.int16))
    graph = net.graph(net.op("compare", [x, classes], ops.Compare("eq"), quant=Quant("u8", np.asarray(1.0, np.float32), 0), shape=(1, 8, 300)))
    feeds = {x: np.array([0, 255, 256, 299, 7, 1, 2, 3], np.float32).reshape(1, 8, 1)}
    expected = reference.run(graph, feeds)[graph.outputs[0]]
    found = run_session(exact_session(to_onnx(graph)), feeds)[graph.outputs[0]]
    assert expected.sum() == 8
    np.testing.assert_array_equal(found.astype(np.int64), expected)


def test_no_float_weight_is_left_in_the_integer_model() -> None:
    quantized = quantize(classifier(), classifier_feeds(4), options=QuantizeOptions.parse("int8")).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in to_onnx(quantized).graph.initializer}
    assert arrays[stored_name("w1")].dtype == np.int8
    floats = [name for name, array in arrays.items() if array.dtype == np.float32 and array.size > 4 and not name.endswith("/scale")]
    assert not floats


def test_the_model_keeps_names_types_and_tensors() -> None:
    graph = classifier()
    for model in (to_onnx(graph), to_onnx(quantize(graph, classifier_feeds(2)).graph)):
        assert [value.name for value in model.graph.input] == ["x"]
        assert [value.name for value in model.graph.output] == ["logits", "probabilities"]
        made = {name for node in model.graph.node for name in node.output}
        assert {node.outputs[0] for node in graph} <= made


def test_float_models_mean_what_the_graph_says() -> None:
    net = FloatNet()
    net.input("x", 1, 2, 3, 4)
    net.op("slice", ["x"], "backwards", ops.Slice((0, 1, 2, 3), (1, 2, 3, 2), (1, -1, -1, -3)))
    net.op("pad", ["x"], "wrapped", ops.Pad((0, 0, 1, 2), (0, 1, 0, 3), mode="wrap"))
    net.op("table", ["x"], "constant", ops.Table(2.5))
    net.op("compare", ["x", net.constant("zero", np.zeros((), np.float32))], "differs", ops.Compare("ne"), dtype="bool")
    net.op("where", ["differs", "x", net.constant("one", np.ones((), np.float32))], "chosen")
    net.op("add", ["differs", "x"], "sum", ops.Binary((0.5, 1.5)))
    x = np.random.default_rng(0).integers(-2, 3, (1, 2, 3, 4)).astype(np.float32)
    found = run_session(exact_session(to_onnx(net.graph("backwards", "wrapped", "constant", "chosen", "sum"))), {"x": x})
    np.testing.assert_array_equal(found["backwards"], x[:, ::-1, ::-1, ::-3])
    np.testing.assert_array_equal(found["wrapped"], np.pad(x, ((0, 0), (0, 1), (1, 0), (2, 3)), mode="wrap"))
    np.testing.assert_array_equal(found["constant"], np.full_like(x, 2.5))
    np.testing.assert_array_equal(found["chosen"], np.where(x != 0, x, 1))
    np.testing.assert_array_equal(found["sum"], np.clip((x != 0) + x, 0.5, 1.5))


def test_export_is_deterministic() -> None:
    quantized = quantize(classifier(), classifier_feeds(2)).graph
    assert to_onnx(quantized).SerializeToString(deterministic=True) == to_onnx(quantized).SerializeToString(deterministic=True)
