"""Models that are quantized already: imported with their own scales and integers, equal to onnxruntime to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import npucc
from npucc import compiler, segments
from npucc.errors import ImportModelError, PruneError
from npucc.export import to_onnx
from npucc.frontend import import_model
from npucc.quantize import quantize
from tests.npucc.onnx_models import assert_agrees, model, node, reals

ZERO = np.uint8(120)
TYPES = {"s8": QuantType.QInt8, "u8": QuantType.QUInt8, "s16": QuantType.QInt16, "u16": QuantType.QUInt16}
SAMPLES = [{"x": np.random.default_rng(seed).normal(size=(1, 3, 12, 12)).astype(np.float32)} for seed in range(6)]


def float_model() -> onnx.ModelProto:
    """Every operator that onnxruntime's quantizer writes for an image network, with a residual sum, a branch and a product of activations."""
    random = np.random.default_rng(0)
    constants = {
        "w1": random.normal(size=(8, 3, 3, 3)) / 5, "b1": random.normal(size=8), "w2": random.normal(size=(8, 1, 3, 3)) / 3,
        "b2": random.normal(size=8), "w3": random.normal(size=(8, 8, 1, 1)) / 3, "c": random.normal(size=(1, 8, 1, 1)),
        "w4": random.normal(size=(5, 16)) / 4, "b4": random.normal(size=5),
    }  # fmt: skip
    stored = {name: value.astype(np.float32) for name, value in constants.items()} | {"rows": np.array([1, 8, 36])}
    nodes = [
        node("Conv", "x w1 b1", "a1", pads=[1, 1, 1, 1]), node("Relu", "a1", "a"),
        node("Conv", "a w2 b2", "d", pads=[1, 1, 1, 1], group=8, strides=[2, 2]), node("Sigmoid", "d", "s"), node("Mul", "d s", "swish"),
        node("Conv", "swish w3", "e"), node("Add", "e swish", "sum"), node("Mul", "sum c", "scaled"), node("LeakyRelu", "scaled", "leaky"),
        node("MaxPool", "a", "pool", kernel_shape=[2, 2], strides=[2, 2]), node("Concat", "pool leaky", "both", axis=1),
        node("Reshape", "leaky rows", "tokens"), node("Transpose", "tokens", "turned", perm=[0, 2, 1]), node("MatMul", "tokens turned", "product"),
        node("GlobalAveragePool", "both", "mean"), node("Flatten", "mean", "flat"), node("Gemm", "flat w4 b4", "y", transB=1),
        node("AveragePool", "both", "windows", kernel_shape=[3, 3], strides=[1, 1]), node("Softmax", "y", "p", axis=-1),
    ]  # fmt: skip
    return model(nodes, {"x": [1, 3, 12, 12]}, ["y", "p", "product", "windows"], stored)


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.feeds: Iterator[dict[str, np.ndarray]] = iter(SAMPLES)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantized(folder: Path, form: str, activations: str, weights: str, *, per_channel: bool = False) -> onnx.ModelProto:
    """The model above, quantized by onnxruntime."""
    onnx.save(onnx.shape_inference.infer_shapes(float_model()), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "quantized.onnx", _Samples(), quant_format=QuantFormat.QDQ if form == "QDQ" else QuantFormat.QOperator,
        per_channel=per_channel, activation_type=TYPES[activations], weight_type=TYPES[weights],
    )  # fmt: skip
    return onnx.load(folder / "quantized.onnx")


def onnxruntime_results(proto: onnx.ModelProto, feed: Mapping[str, Any], option: str = "session.x64quantprecision") -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(option, "1")
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, dict(feed)), strict=True))


def steps_apart(package: npucc.Package, wanted: Mapping[str, np.ndarray], feed: Mapping[str, Any]) -> int:
    """The largest difference of any output, in steps of its scale."""
    found, worst = package.run(feed).outputs, 0
    for name, value in wanted.items():
        scale = package.graph.quant(name).scale
        worst = max(worst, int(np.rint(np.abs(value.astype(np.float64) - found[name]) / scale).max()))
    return worst


@pytest.mark.parametrize(
    ("form", "activations", "weights", "per_channel"),
    [
        ("QDQ", "u8", "s8", True), ("QDQ", "u8", "u8", True), ("QDQ", "s8", "s8", True),
        ("QOperator", "u8", "s8", True), ("QOperator", "u8", "u8", False),
    ],
)  # fmt: skip
def test_onnxruntime_agrees_to_the_bit(tmp_path: Path, form: str, activations: str, weights: str, per_channel: bool) -> None:
    """Without calibration: the model brings all scales. Unsigned weights less their zero point have 9 bits and are split in two."""
    proto = quantized(tmp_path, form, activations, weights, per_channel=per_channel)
    package = npucc.compile(proto, host=False)
    assert package.calibration == "model"
    for feed in SAMPLES[:2]:
        option = "session.qdqisint8allowed" if activations == "s8" else "session.x64quantprecision"
        assert steps_apart(package, onnxruntime_results(proto, feed, option), feed) == 0


def test_a_model_that_npucc_exports_comes_back_with_the_same_bytes_and_cycles(demo_package: npucc.Package) -> None:
    first = demo_package
    feed = {"image": np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)}
    wanted = first.run(feed)
    for unsigned, exact in ((True, True), (True, False), (False, False)):
        again = npucc.compile(to_onnx(first.graph, unsigned=unsigned, exact=exact))
        found = again.run(feed)
        assert again.calibration == "model"
        assert found.cycles == wanted.cycles
        for name, raw in wanted.raw.items():
            assert np.array_equal(found.raw[name], raw)


def test_what_is_spelled_out_in_integers_comes_back_as_the_operator_that_it_is() -> None:
    """Tables, Softmax, LayerNorm, 16 and 32 bits, integers as outputs."""
    constants = {"w": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), "g": np.ones(8, np.float32), "two": np.float32(2)}
    nodes = [
        node("Cast", "ids", "i", to=TensorProto.FLOAT), node("Add", "x i", "a"), node("MatMul", "a w", "b"), node("Pow", "b two", "c"),
        node("ReduceMean", "c", "d", axes=[-1]), node("Sqrt", "d", "e"), node("Mul", "b e", "f"), node("LayerNormalization", "f g", "h"),
        node("Softmax", "h", "p"), node("Tanh", "h", "t"), node("MatMul", "p t", "y"), node("Cast", "ids", "same", to=TensorProto.INT64),
    ]  # fmt: skip
    proto = model(nodes, {"x": [8, 8], "ids": [8, 8]}, ["y", "same"], constants, dtypes={"ids": "int64", "same": "int64"})
    random = np.random.default_rng(1)
    feeds = [{"x": random.normal(size=(8, 8)).astype(np.float32), "ids": random.integers(0, 9, (8, 8))} for _ in range(8)]
    first = npucc.compile(proto, calibration=feeds, quant="int16")
    exported = first.to_onnx()
    assert not any(each.op_type in ("Softmax", "LayerNormalization", "Tanh") for each in exported.graph.node)
    again = npucc.compile(exported)
    assert again.calibration == "model"
    assert not segments.host_nodes(again.graph)
    for feed in feeds[:2]:
        found, wanted = again.run(feed), first.run(feed)
        for name, raw in wanted.raw.items():
            assert np.array_equal(found.raw[name], raw)
    last = next(each for each in exported.graph.node if each.metadata_props)
    last.metadata_props[0].value = "no base64"
    with pytest.raises(ImportModelError, match="is not an ONNX graph in base64"):
        npucc.compile(exported)


# ---- by hand: one operator between pairs


def pair(name: str, scale: float, zero: Any, *, into: str = "") -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """`name` → QuantizeLinear → DequantizeLinear → `into`, with their constants."""
    into = into or f"{name}_real"
    nodes = [node("QuantizeLinear", f"{name} {name}_scale {name}_zero", f"{name}_steps")]
    nodes += [node("DequantizeLinear", f"{name}_steps {name}_scale {name}_zero", into)]
    return nodes, {f"{name}_scale": np.float32(scale), f"{name}_zero": np.asarray(zero)}


def between_pairs(
    middle: list[onnx.NodeProto], shape: list[int], constants: Mapping[str, Any], *, zero: Any = ZERO, opset: int = 17
) -> onnx.ModelProto:
    """x → pair → the nodes, which read x_real and make r → pair → y."""
    before, first = pair("x", 0.02, zero)
    after, last = pair("r", 0.05, zero, into="y")
    proto = model([*before, *middle, *after], {"x": shape}, ["y"], {**first, **constants, **last}, opset=opset)
    proto.ir_version = 10 if opset > 20 else 8
    return proto


def kept(graph: npucc.graph.Graph, op: str) -> npucc.graph.Tensor:
    """The weights of the only such operator."""
    (found,) = (each for each in graph if each.op == op)
    return graph.tensors[found.inputs[1]]


def test_a_nearly_dead_channel_leaves_the_others_exact() -> None:
    """onnxruntime's quantizer gives it a bias just below 2^31: a sum that could leave 32 bits, but does not."""
    random = np.random.default_rng(0)
    weights, scales = random.integers(-127, 128, (8, 24, 1, 1)).astype(np.int8), np.array([2.4e-9, *[0.004] * 7], np.float32)
    bias = np.array([2_147_268_819, *random.integers(-20_000, 20_000, 7)], np.int32)
    constants = {"w": weights, "ws": scales, "b": bias, "bs": np.float32(0.02) * scales}
    middle = [
        node("DequantizeLinear", "w ws", "wr", axis=0), node("DequantizeLinear", "b bs", "br", axis=0), node("Conv", "x_real wr br", "r")
    ]  # fmt: skip
    proto = between_pairs(middle, [1, 24, 16, 16], constants)
    package = npucc.compile(proto)
    feed = {"x": random.normal(size=(1, 24, 16, 16)).astype(np.float32) / 4}
    assert steps_apart(package, onnxruntime_results(proto, feed), feed) == 0
    (conv,) = (each for each in package.graph if each.op == "conv")
    stored = package.graph.tensors[conv.inputs[2]].data
    assert stored is not None
    assert stored.tolist() == bias.tolist()
    assert package.graph.quant(conv.inputs[1]).scale.tolist() == scales.tolist()


@pytest.mark.parametrize("zero", [np.int8(-12), np.uint8(116)])
def test_sums_round_ties_as_the_kernel_of_the_model_s_own_type(zero: Any) -> None:
    """x + 3 at scales that are multiples of 1/255: 127.5 steps come out as 0 in signed bytes and as 127 in unsigned ones."""
    lowest = np.asarray(np.iinfo(zero.dtype).min, zero.dtype)
    three = np.asarray(np.iinfo(zero.dtype).max, zero.dtype)
    before, first = pair("x", 0.047855195, zero)
    after, last = pair("r", 6 / 255, lowest, into="y")
    constants = {**first, **last, "c": three, "cs": np.float32(3 / 255), "cz": lowest}
    nodes = [*before, node("DequantizeLinear", "c cs cz", "cr"), node("Add", "x_real cr", "r"), *after]
    proto = model(nodes, {"x": [1, 4, 8, 8]}, ["y"], constants)
    feed = {"x": (np.arange(256).reshape(1, 4, 8, 8) - 128 + 12).astype(np.float32) * first["x_scale"]}
    package = npucc.compile(proto)
    option = "session.qdqisint8allowed" if zero.dtype == np.int8 else "session.x64quantprecision"
    assert steps_apart(package, onnxruntime_results(proto, feed, option), feed) == 0
    assert steps_apart(package, onnxruntime_results(package.to_onnx(), feed, option), feed) == 0


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_weights_of_4_bits_are_kept(kind: int) -> None:
    random = np.random.default_rng(0)
    low = -8 if kind == TensorProto.INT4 else 0
    weights, scales = random.integers(low, low + 16, (6, 4)), random.uniform(0.05, 0.1, 4).astype(np.float32)
    zeros = np.zeros(4, int) if low else np.array([8, 7, 3, 15])
    proto = between_pairs([node("DequantizeLinear", "w ws wz", "wr", axis=1), node("MatMul", "x_real wr", "r")], [5, 6], {"ws": scales}, opset=21)
    proto.graph.initializer.extend([helper.make_tensor("w", kind, (6, 4), weights.reshape(-1)), helper.make_tensor("wz", kind, (4,), zeros)])
    package = npucc.compile(proto)
    stored = kept(package.graph, "matmul")
    assert stored.data is not None
    assert np.array_equal(stored.data, weights - zeros)
    feed = {"x": random.normal(size=(5, 6)).astype(np.float32)}
    assert steps_apart(package, onnxruntime_results(proto, feed), feed) == 0


def blocked_model(kind: str) -> onnx.ModelProto:
    """A product with weights in blocks of 16 and 18 rows, between pairs."""
    random = np.random.default_rng(0)
    scales = random.uniform(0.05, 0.4, (3, 5)).astype(np.float32)
    if kind == "MatMulNBits":
        packed, zeros = (random.integers(0, 256, shape).astype(np.uint8) for shape in ((5, 3, 8), (5, 2)))
        middle = [node(kind, "x_real w ws wz", "r", domain="com.microsoft", K=40, N=5, bits=4, block_size=16)]
        return between_pairs(middle, [7, 40], {"w": packed, "ws": scales.T.copy(), "wz": zeros}, opset=21)
    middle = [node("DequantizeLinear", "w ws", "wr", axis=0, block_size=16), node("MatMul", "x_real wr", "r")]
    proto = between_pairs(middle, [7, 40], {"ws": scales}, opset=21)
    code = getattr(TensorProto, kind)
    low, high = (-127, 128) if kind == "INT8" else (-8, 8) if kind == "INT4" else (0, 16)
    proto.graph.initializer.append(helper.make_tensor("w", code, (40, 5), random.integers(low, high, 200)))
    return proto


@pytest.mark.parametrize("kind", ["INT8", "INT4", "UINT4", "MatMulNBits"])
def test_weights_with_a_scale_per_block_are_two_products(kind: str) -> None:
    """onnxruntime makes them real; two products of 8 bits have 16 bits of each channel."""
    proto = blocked_model(kind)
    package = npucc.compile(proto, host=False)
    assert [each.op for each in package.graph if each.op in ("matmul", "add")] == ["matmul", "matmul", "add"]
    for seed in range(3):
        feed = {"x": np.random.default_rng(seed).normal(size=(7, 40)).astype(np.float32)}
        wanted = onnxruntime_results(proto, feed, "session.qdqisint8allowed")  # else it gives signed blocks a zero point that it can't read
        assert steps_apart(package, wanted, feed) <= 1


@pytest.mark.parametrize(("bits", "zeros"), [(4, "none"), (4, "packed"), (4, "real"), (8, "none"), (8, "packed")])
def test_weights_in_blocks_of_a_float_model_are_rounded_to_8_bits(bits: int, zeros: str) -> None:
    """A language model's layer and its embeddings; the reason is told."""
    random = np.random.default_rng(0)
    packed = random.integers(0, 256, (24, 3, 2 * bits)).astype(np.uint8)
    constants: dict[str, Any] = {"w": packed, "ws": random.uniform(0.01, 0.03, (24, 3)).astype(np.float32), "b": reals(random.normal(size=24))}
    constants |= {"t": random.integers(0, 256, (9, 4 * bits)).astype(np.uint8), "ts": random.uniform(0.01, 0.03, (9, 2)).astype(np.float32)}
    if zeros != "none":
        middle = 1 << bits - 1
        whole = random.integers(middle - 2, middle + 2, (24, 3))
        constants["wz"] = reals(whole + 0.25) if zeros == "real" else onnx_packed(whole, bits)
    nodes = [
        node("GatherBlockQuantized", "t ids ts", "e", domain="com.microsoft", bits=bits, block_size=16), node("Concat", "e x", "all", axis=1),
        node("MatMulNBits", f"all w ws {'wz' if zeros != 'none' else '-'} - b", "y", domain="com.microsoft", K=40, N=24, bits=bits, block_size=16),
    ]  # fmt: skip
    proto = model(nodes, {"ids": [6], "x": [6, 8]}, ["y"], constants, dtypes={"ids": "int64"})
    feeds = [{"ids": random.integers(0, 9, 6), "x": random.normal(size=(6, 8)).astype(np.float32)} for _ in range(8)]
    package = npucc.compile(proto, calibration=feeds, host=False)
    assert any("quantized anew" in each.reason for each in package.refused) == (zeros != "real")
    found, wanted = package.run(feeds[0]).outputs["y"], onnxruntime_results(proto, feeds[0])["y"]
    assert 20 * np.log10(np.linalg.norm(wanted) / np.linalg.norm(wanted - found)) > 35


def onnx_packed(whole: np.ndarray, bits: int) -> np.ndarray:
    """Rows of integers as bytes, the lowest bits first."""
    spread = np.unpackbits(whole.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(whole), -1)
    return np.packbits(spread, axis=-1, bitorder="little")


def test_16_bits_are_kept_to_a_step() -> None:
    """onnxruntime computes such a convolution in float32."""
    random = np.random.default_rng(0)
    constants = {"w": random.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), "ws": np.float32(1e-4)}
    middle = [node("DequantizeLinear", "w ws", "wr"), node("Conv", "x_real wr", "r")]
    for zero in (np.int16(-300), np.uint16(33000)):
        proto = between_pairs(middle, [1, 3, 8, 8], constants, zero=zero, opset=21)
        package = npucc.compile(proto)
        assert {package.graph.quant(name).dtype for name in (*package.graph.inputs, *package.graph.outputs)} == {"s16"}
        feed = {"x": random.normal(size=(1, 3, 8, 8)).astype(np.float32)}
        assert steps_apart(package, onnxruntime_results(proto, feed), feed) <= 1


@pytest.mark.parametrize(("activations", "weights", "most"), [("u8", "s16", 1), ("s16", "s8", 1), ("u16", "s16", 5)])
def test_a_network_of_16_bits_is_kept_to_steps_of_16_bits(tmp_path: Path, activations: str, weights: str, most: int) -> None:
    """Products with 16-bit weights, and of two 16-bit activations, are two of 8 bits. onnxruntime computes them in float32."""
    proto = quantized(tmp_path, "QDQ", activations, weights, per_channel=activations == "s16")
    package = npucc.compile(proto)
    assert not any("16 to 8 bits" in each.reason or "anew" in each.reason for each in package.refused)
    assert {package.graph.quant(name).dtype for name in package.graph.outputs} == {"s8" if activations == "u8" else "s16"}
    assert steps_apart(package, onnxruntime_results(proto, SAMPLES[0]), SAMPLES[0]) <= most


@pytest.mark.parametrize("depth", [2000, 16_000])
def test_long_sums_of_16_bits_stay_within_32(depth: int) -> None:
    """Weights of 8 bits, all of them 127, times activations of 16: digits of fewer bits."""
    constants = {"w": np.full((depth, 1), 127, np.int8), "ws": np.float32(1e-3 / depth)}
    middle = [node("DequantizeLinear", "w ws", "wr"), node("MatMul", "x_real wr", "r")]
    proto = between_pairs(middle, [1, depth], constants, zero=np.uint16(100), opset=21)
    package = npucc.compile(proto)
    for value in (1e6, 300.0, -1.9):
        feed = {"x": np.full((1, depth), value, np.float32)}
        assert steps_apart(package, onnxruntime_results(proto, feed), feed) <= 1


def test_unsigned_weights_with_a_zero_point_per_channel_are_split(tmp_path: Path) -> None:
    """As dynamic quantization writes them for convolutions."""
    onnx.save(float_model(), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QUInt8)
    proto = onnx.load(tmp_path / "dynamic.onnx")
    found, wanted = npucc.compile(proto, calibration=SAMPLES).run(SAMPLES[0]).outputs["y"], onnxruntime_results(proto, SAMPLES[0])["y"]
    assert 20 * np.log10(np.linalg.norm(wanted) / np.linalg.norm(wanted - found)) > 35


def test_integer_inputs_and_outputs_are_themselves() -> None:
    """Integers go in and come out; in between they are only moved, and read again on other steps."""
    constants = {"s": np.float32(0.1), "z": np.uint8(100), "t": np.float32(0.3), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "fill": np.uint8(100)}
    nodes = [
        node("DequantizeLinear", "x s z", "a"), node("Relu", "a", "b"), node("QuantizeLinear", "b s z", "c"), node("Pad", "c pads fill", "d"),
        node("Transpose", "d", "e", perm=[0, 1, 3, 2]), node("DequantizeLinear", "e t z", "f"), node("QuantizeLinear", "f s z", "y"),
    ]  # fmt: skip
    proto = model(nodes, {"x": [1, 2, 3, 3]}, ["y"], constants, dtypes={"x": "uint8", "y": "uint8"})
    package = npucc.compile(proto, host=False)
    feed = {"x": np.random.default_rng(0).integers(0, 256, (1, 2, 3, 3)).astype(np.uint8)}
    assert np.array_equal(package.run(feed).outputs["y"], onnxruntime_results(proto, feed)["y"])


def test_concat_of_different_scales_rescales_each() -> None:
    parts = [pair("x", 0.02, np.uint8(120)), pair("a", 0.01, np.uint8(0)), pair("r", 0.04, np.uint8(128), into="y")]
    nodes = [*parts[0][0], node("Sigmoid", "x_real", "a"), *parts[1][0], node("Concat", "x_real a_real", "r", axis=1), *parts[2][0]]
    proto = model(nodes, {"x": [1, 4, 5]}, ["y"], {name: value for part in parts for name, value in part[1].items()})
    package = npucc.compile(proto)
    feed = {"x": np.random.default_rng(0).normal(size=(1, 4, 5)).astype(np.float32)}
    assert steps_apart(package, onnxruntime_results(proto, feed), feed) == 0


@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("factors", [(2.0, 0.5), (1.7, 0.6)], ids=str)
def test_interpolation_rounds_once_to_its_own_scale(factors: tuple[float, float], coordinates: str) -> None:
    parts = [pair("x", 0.031, np.uint8(113)), pair("r", 0.0277, np.uint8(131), into="y")]
    resize = node("Resize", "x_real - factors", "r", mode="linear", coordinate_transformation_mode=coordinates)
    constants = {name: value for part in parts for name, value in part[1].items()} | {"factors": reals([1, 1, *factors])}
    proto = model([*parts[0][0], resize, *parts[1][0]], {"x": [1, 3, 9, 11]}, ["y"], constants)
    feed = {"x": np.random.default_rng(0).normal(size=(1, 3, 9, 11)).astype(np.float32)}
    assert steps_apart(npucc.compile(proto), onnxruntime_results(proto, feed), feed) == 0


@pytest.mark.parametrize("zero", [np.int8(-28), np.uint8(100)])
@pytest.mark.parametrize("factors", [(2.0, 4.0), (0.5, 0.5)], ids=str)
def test_bytes_between_bytes_are_rounded_towards_zero(factors: tuple[float, float], zero: Any) -> None:
    """As onnxruntime and ONNX have Resize of integers, which the operator form of a quantized model holds."""
    nodes, constants = pair("x", 0.02, zero, into="y")
    nodes[1].input[0] = "larger"
    nodes.insert(1, node("Resize", "x_steps - f", "larger", mode="linear"))
    proto = model(nodes, {"x": [1, 3, 9, 11]}, ["y"], {**constants, "f": reals([1, 1, *factors])})
    feed = {"x": np.random.default_rng(0).normal(size=(1, 3, 9, 11)).astype(np.float32)}
    assert steps_apart(npucc.compile(proto, host=False), onnxruntime_results(proto, feed), feed) == 0


def test_what_is_cut_off_at_zero_keeps_its_steps() -> None:
    """PRelu, which onnxruntime computes in float: each part of its input lies on the input's steps."""
    random = np.random.default_rng(0)
    proto = between_pairs([node("PRelu", "x_real a", "r")], [1, 3, 16, 16], {"a": random.uniform(0, 0.4, (3, 1, 1)).astype(np.float32)})
    feeds = [{"x": random.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]
    package = npucc.compile(proto, calibration=feeds)
    assert steps_apart(package, onnxruntime_results(proto, feeds[0]), feeds[0]) == 0
    assert {package.graph.quant(each.outputs[0]).key for each in package.graph if each.op == "table"} == {package.graph.quant("x").key}


def test_only_what_the_model_leaves_open_is_calibrated() -> None:
    """A result without a pair, and the sum of it: two ranges to find."""
    middle = [node("Sin", "x_real", "s"), node("ReduceMean", "s", "m", axes=[1]), node("Mul", "m x_real", "r")]
    graph = compiler.float_graph(between_pairs(middle, [4, 6], {}), {})
    feeds = [{"x": np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32)} for seed in range(4)]
    found = quantize(graph, feeds)
    assert [row.name for row in found.report.tensors] == ["s", "m"]
    assert not found.synthetic
    assert quantize(graph, None).synthetic


def test_dynamic_quantization_gets_calibrated_scales_and_keeps_its_weights(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    constants = {"w": random.normal(size=(16, 8)).astype(np.float32), "b": random.normal(size=8).astype(np.float32)}
    onnx.save(model([node("MatMul", "x w", "h"), node("Add", "h b", "y")], {"x": [4, 16]}, ["y"], constants), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8)
    proto = onnx.load(tmp_path / "dynamic.onnx")
    feeds = [{"x": random.normal(size=(4, 16)).astype(np.float32)} for _ in range(16)]
    package = npucc.compile(proto, calibration=feeds, host=False)
    stored = next(numpy_helper.to_array(each) for each in proto.graph.initializer if each.data_type == TensorProto.INT8 and each.dims)
    weights = kept(package.graph, "matmul").data
    assert weights is not None
    assert np.array_equal(weights, stored)
    wanted, found = onnxruntime_results(proto, feeds[0])["y"], package.run(feeds[0]).outputs["y"]
    assert 20 * np.log10(np.linalg.norm(wanted) / np.linalg.norm(wanted - found)) > 35


def test_attention_that_onnxruntime_s_quantizer_wrote_runs_on_the_npu(tmp_path: Path) -> None:
    """QEmbedLayerNormalization and QAttention."""
    random = np.random.default_rng(0)
    shapes = {"w": (16, 48), "b": (48,), "words": (30, 16), "places": (12, 16), "parts": (2, 16), "g": (16,), "o": (16,)}
    constants = {name: random.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    domain = {"domain": "com.microsoft"}
    nodes = [
        node("EmbedLayerNormalization", "ids types words places parts g o mask", "e count", **domain),
        node("Attention", "e w b count", "y", **domain, num_heads=2),
    ]  # fmt: skip
    names = ("ids", "types", "mask")
    onnx.save(model(nodes, dict.fromkeys(names, (1, 8)), ["y"], constants, dtypes=dict.fromkeys(names, "int32")), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", op_types_to_quantize=["Attention", "EmbedLayerNormalization"])
    proto = onnx.load(tmp_path / "dynamic.onnx")
    assert [each.op_type for each in proto.graph.node] == ["QEmbedLayerNormalization", "DynamicQuantizeLinear", "QAttention"]
    mask = np.array([[1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    feeds = [{name: random.integers(0, n, (1, 8)).astype(np.int32) for name, n in (("ids", 30), ("types", 2))} | {"mask": mask} for _ in range(8)]
    found, wanted = npucc.compile(proto, calibration=feeds, host=False).run(feeds[0]).outputs["y"], onnxruntime_results(proto, feeds[0])["y"]
    assert 20 * np.log10(np.linalg.norm(wanted) / np.linalg.norm(wanted - found)) > 33


def test_channels_may_come_last(tmp_path: Path) -> None:
    """As onnxruntime saves its optimized model."""
    proto = quantized(tmp_path, "QDQ", "u8", "s8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    saved = onnx.load(tmp_path / "optimized.onnx")
    assert any(attribute.name == "channels_last" for each in saved.graph.node for attribute in each.attribute)
    package = npucc.compile(saved, host=False)
    assert steps_apart(package, onnxruntime_results(proto, SAMPLES[0]), SAMPLES[0]) == 0


def test_what_can_not_be_imported_runs_on_the_host() -> None:
    """A scale per channel of an activation: the pair is left to onnxruntime, its neighbours are not."""
    constants = {"s": np.array([0.1, 0.2], np.float32), "z": np.zeros(2, np.int8)}
    nodes = [node("Relu", "x", "a"), node("QuantizeLinear", "a s z", "q", axis=1), node("DequantizeLinear", "q s z", "y", axis=1)]
    graph = import_model(model(nodes, {"x": [1, 2, 3]}, ["y"], constants), host=True)
    (host,) = (each for each in graph if each.op == "host")
    assert [(operator, reason.partition(": ")[2]) for _, operator, reason in host.attributes.nodes] == [  # type: ignore[attr-defined]
        ("QuantizeLinear", "an activation has more than one scale or zero point"),
        ("DequantizeLinear", "an activation has more than one scale or zero point"),
    ]


def test_pruning_wants_the_float_model(tmp_path: Path) -> None:
    proto = quantized(tmp_path, "QDQ", "u8", "s8")
    with pytest.raises(PruneError, match="the model is quantized already"):
        npucc.compile(proto, calibration=SAMPLES, prune="channels=30%")


@pytest.mark.parametrize("per_column", [False, True])
def test_a_dynamically_quantized_lstm_is_an_lstm_with_the_weights_of_its_integers(per_column: bool) -> None:
    directions, inputs, hidden = 2, 6, 4
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {"b": rng.normal(size=(directions, 8 * hidden)).astype(np.float32) * 0.3}
    for name, rows in (("w", inputs), ("r", hidden)):
        constants[name] = rng.integers(-64, 65, (directions, rows, 4 * hidden)).astype(np.int8)  # larger: onnxruntime saturates pairs on AVX2
        shape = (directions, 4 * hidden) if per_column else (directions,)
        constants[f"{name}s"], constants[f"{name}z"] = rng.uniform(0.004, 0.008, shape).astype(np.float32), np.zeros(shape, np.int8)
    cell = node("DynamicQuantizeLSTM", "x w r b - - - - ws wz rs rz", "y h", domain="com.microsoft", hidden_size=hidden, direction="bidirectional")
    assert_agrees(model([cell], {"x": (5, 1, inputs)}, ["y", "h"], constants), tolerance=0.03)  # onnxruntime rounds activations to 8 bits


def test_an_input_that_is_rounded_to_several_scales_has_16_bits() -> None:
    """Each slice of the input is rounded from floats: by 8 bits twice, a tenth of the values would be a step off."""
    stored = {"z": np.int8(3), "axis": np.array([0]), "s0": np.float32(0.031), "s1": np.float32(0.047), "from0": np.array([0]), "to0": np.array([20])}
    nodes = []
    for part in "01":
        nodes += [node("Slice", f"x from{part} to{part} axis", f"p{part}"), node("QuantizeLinear", f"p{part} s{part} z", f"q{part}"),
                  node("DequantizeLinear", f"q{part} s{part} z", f"y{part}")]  # fmt: skip
    proto = model(nodes, {"x": [40, 50]}, ["y0", "y1"], {**stored, "from1": np.array([20]), "to1": np.array([40])})
    feed = {"x": np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)}
    package = npucc.compile(proto, host=False)
    wanted, found = onnxruntime_results(proto, feed), package.run(feed).outputs
    assert package.graph.quant("x").dtype == "s16"
    assert np.mean(np.concatenate([wanted[name] != found[name] for name in wanted])) < 0.01
