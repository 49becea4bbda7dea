"""Small language models as exporters write them: a decoder with its cache as inputs and outputs, and torch.export's functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import npucc
from npucc import reference
from tests.npucc.onnx_models import integers, model, node, run

Array = np.ndarray[Any, np.dtype[Any]]
Feed = dict[str, Array]
WORDS, WIDTH, HEADS, WINDOW = 40, 32, 4, 12
SIZE = WIDTH // HEADS


def sqnr(want: Array, have: Array) -> float:
    return float(10 * np.log10((want**2).sum() / ((want - have) ** 2).sum()))


# ---- a decoder with a cache


def decoder() -> ModelProto:
    """One step: a token, its position and the last keys and values in; scores and the caches moved on by one out."""
    random = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "embedding": random.normal(size=(WORDS, WIDTH)), "positions": random.normal(0, 0.3, (64, WIDTH)), "g": random.normal(1, 0.1, WIDTH),
        "b": random.normal(0, 0.1, WIDTH), "root": np.array(SIZE**-0.5), "head": random.normal(0, WIDTH**-0.5, (WIDTH, WORDS)),
        **{f"w{name}": random.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)) for name in "qkvo"},
        "up": random.normal(0, WIDTH**-0.5, (WIDTH, 2 * WIDTH)), "down": random.normal(0, WIDTH**-0.5, (2 * WIDTH, WIDTH)),
    }  # fmt: skip
    lists = {
        "split": integers([1, 1, HEADS, SIZE]), "joined": integers([1, 1, WIDTH]), "one": integers([1]), "all": integers([WINDOW + 1]),
        "time": integers([2]),
    }  # fmt: skip
    nodes = [
        node("Gather", "embedding token", "e"), node("Gather", "positions position", "p"), node("Add", "e p", "h0"),
        node("LayerNormalization", "h0 g b", "n", axis=-1),
    ]  # fmt: skip
    for name in "qkv":
        nodes += [node("MatMul", f"n w{name}", f"{name}1"), node("Reshape", f"{name}1 split", f"{name}2")]
        nodes.append(node("Transpose", f"{name}2", f"{name}3", perm=[0, 2, 1, 3]))
    for name in "kv":
        nodes += [node("Concat", f"past_{name} {name}3", f"{name}4", axis=2), node("Slice", f"{name}4 one all time", f"present_{name}")]
    nodes += [
        node("Transpose", "present_k", "kt", perm=[0, 1, 3, 2]), node("MatMul", "q3 kt", "s0"), node("Mul", "s0 root", "s1"),
        node("Add", "s1 mask", "s2"), node("Softmax", "s2", "a", axis=-1), node("MatMul", "a present_v", "c0"),
        node("Transpose", "c0", "c1", perm=[0, 2, 1, 3]), node("Reshape", "c1 joined", "c2"), node("MatMul", "c2 wo", "o"), node("Add", "h0 o", "h1"),
        node("LayerNormalization", "h1 g b", "n1", axis=-1), node("MatMul", "n1 up", "u"), node("Gelu", "u", "u1"), node("MatMul", "u1 down", "d"),
        node("Add", "h1 d", "h2"), node("LayerNormalization", "h2 g b", "n2", axis=-1), node("MatMul", "n2 head", "logits"),
    ]  # fmt: skip
    cache, long = (1, HEADS, WINDOW, SIZE), TensorProto.INT64
    inputs = [helper.make_tensor_value_info(name, long, (1, 1)) for name in ("token", "position")]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in ("past_k", "past_v")]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, (1, 1, 1, WINDOW)))
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 1, WORDS))]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in ("present_k", "present_v")]
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    stored += [numpy_helper.from_array(value, name) for name, value in lists.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def sentence(proto: ModelProto, seed: int, length: int = 10) -> Iterator[tuple[Feed, list[Array]]]:
    """What the float model is given and gives, step by step; places of the cache that hold nothing yet are masked by −10,000."""
    past = [np.zeros((1, HEADS, WINDOW, SIZE), np.float32)] * 2
    for step, word in enumerate(np.random.default_rng(seed).integers(0, WORDS, length)):
        mask = np.where(np.arange(WINDOW) < WINDOW - 1 - step, -10_000, 0).astype(np.float32).reshape(1, 1, 1, WINDOW)
        feed = {"token": np.array([[word]]), "position": np.array([[step]]), "past_k": past[0], "past_v": past[1], "mask": mask}
        results = run(proto, feed)
        yield feed, results
        past = results[1:]


def test_a_decoder_keeps_its_own_cache() -> None:
    """The caches that one step gives are handed to the next as they come out of the NPU."""
    proto = decoder()
    package = npucc.compile(proto, calibration=[feed for seed in range(4) for feed, _ in sentence(proto, seed)])
    assert package.host_nodes == ()
    wanted, found = [], []
    cache: Feed = {}
    for feed, results in sentence(proto, 99):
        result = package.run(feed | cache)
        for name, stored in reference.run(package.graph, feed | cache, keep=package.graph.outputs).items():
            np.testing.assert_array_equal(result.raw[name], stored)
        cache = {f"past_{name}": result.outputs[f"present_{name}"] for name in "kv"}
        wanted.append(results[0].ravel())
        found.append(result.outputs["logits"].ravel())
    assert sqnr(np.array(wanted), np.array(found)) > 22
    assert np.mean(np.argmax(wanted, axis=-1) == np.argmax(found, axis=-1)) >= 0.8


def grouped_decoder() -> ModelProto:
    """One step of grouped-query attention over a cache of fixed size, of which seqlens_k says how much is filled."""
    random = np.random.default_rng(0)
    angles = np.arange(WINDOW)[:, None] * 0.5 ** np.arange(8)
    constants = {
        "wqkv": random.normal(0, WIDTH**-0.5, (WIDTH, 128)), "wo": random.normal(0, 0.125, (64, WIDTH)), "cos": np.cos(angles), "sin": np.sin(angles)
    }  # fmt: skip
    nodes = [
        node("MatMul", "x wqkv", "qkv"),
        node("GroupQueryAttention", "qkv - - past_k past_v length total cos sin", "a present_k present_v", domain="com.microsoft",
             num_heads=4, kv_num_heads=2, do_rotary=1),
        node("MatMul", "a wo", "o"), node("Add", "x o", "y"),
    ]  # fmt: skip
    stored = {name: value.astype(np.float32) for name, value in constants.items()} | {"total": np.array([WINDOW], np.int32)}
    cache = dict.fromkeys(("past_k", "past_v"), (1, 2, WINDOW, 16))
    return model(nodes, {"x": (1, 1, WIDTH), "length": (1,), **cache}, ["y", "present_k", "present_v"], stored, dtypes={"length": "int32"})


def grouped_steps(proto: ModelProto, seed: int) -> Iterator[tuple[Feed, list[Array]]]:
    """What the float model is given and gives, until the cache is full."""
    past, random = [np.zeros((1, 2, WINDOW, 16), np.float32)] * 2, np.random.default_rng(seed)
    for step in range(WINDOW):
        word = random.normal(size=(1, 1, WIDTH)).astype(np.float32)
        feed = {"x": word, "length": np.array([step], np.int32), "past_k": past[0], "past_v": past[1]}
        results = run(proto, feed)
        yield feed, results
        past = results[1:]


def test_queries_share_a_cache_whose_length_is_computed() -> None:
    proto = grouped_decoder()
    package = npucc.compile(proto, calibration=[feed for seed in range(4) for feed, _ in grouped_steps(proto, seed)], host=False)
    cache: Feed = {}
    for feed, results in grouped_steps(proto, 99):
        found = package.run(feed | cache).outputs
        cache = {f"past_{name}": found[f"present_{name}"] for name in "kv"}
        assert sqnr(results[0], found["y"]) > 25


# ---- torch.export

TORCH = "pkg.onnxscript.torch_lib"


def functions() -> list[FunctionProto]:
    """What the exporter calls for layers and for scaled dot product attention."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(TORCH, 1)]
    linear = [node("Transpose", "weight", "flipped", perm=[1, 0]), node("MatMul", "input flipped", "product"), node("Add", "product bias", "result")]
    norm = [NodeProto(op_type="LayerNormalization", input=["input", "weight", "bias"], output=["result"])]
    for name, kind in (("axis", AttributeProto.INT), ("epsilon", AttributeProto.FLOAT)):
        norm[0].attribute.append(AttributeProto(name=name, ref_attr_name=name, type=kind))
    attention = [
        node("Shape", "query", "shape"), node("Constant", "", "last", value_ints=[-1]), node("Gather", "shape last", "size0"),
        node("CastLike", "size0 query", "size"), node("Sqrt", "size", "root0"), node("Reciprocal", "root0", "scale"), node("Sqrt", "scale", "root"),
        node("Transpose", "key", "turned", perm=[0, 1, 3, 2]), node("Mul", "query root", "q"), node("Mul", "turned root", "k"),
        node("MatMul", "q k", "scores"), node("Softmax", "scores", "weights", axis=-1), node("MatMul", "weights value", "result"),
    ]  # fmt: skip
    return [
        helper.make_function(TORCH, "aten_linear_bias", ["input", "weight", "bias"], ["result"], linear, opsets),
        helper.make_function(TORCH, "aten_layer_norm", ["input", "weight", "bias"], ["result"], norm, opsets, ["axis", "epsilon"]),
        helper.make_function(TORCH, "aten_scaled_dot_product_attention", ["query", "key", "value"], ["result"], attention, opsets),
    ]


def exported() -> ModelProto:
    """A transformer block: the batch and the length stay open, weights have dotted names, and each node says where it comes from."""
    random, stored, nodes = np.random.default_rng(1), [], []

    def call(function: str, inputs: list[str], result: str, **attributes: Any) -> str:
        domain = TORCH if function.startswith("aten") else ""
        nodes.append(helper.make_node(function, inputs, [result], f"node_{result}", domain=domain, **attributes))
        nodes[-1].metadata_props.add(key="pkg.torch.onnx.fx_node", value=f"%{result} : [num_users=1] = call_function[target=torch.ops.aten]")
        return result

    def weight(name: str, *shape: int) -> str:
        stored.append(numpy_helper.from_array(random.normal(0 if len(shape) > 1 else 0.5, shape[-1] ** -0.5, shape).astype(np.float32), name))
        return name

    def linear(x: str, name: str, outputs: int, inputs: int, result: str) -> str:
        return call("aten_linear_bias", [x, weight(f"{name}.weight", outputs, inputs), weight(f"{name}.bias", outputs)], result)

    def norm(x: str, name: str, result: str) -> str:
        return call("aten_layer_norm", [x, weight(f"{name}.weight", WIDTH), weight(f"{name}.bias", WIDTH)], result, axis=-1, epsilon=1e-5)

    for name, values in (("val_heads", [0, 0, HEADS, SIZE]), ("val_flat", [0, 0, WIDTH])):
        stored.append(numpy_helper.from_array(integers(values), name))
    hidden = norm("x", "blocks.0.norm1", "layer_norm")
    heads = []
    for name in "qkv":
        projected = linear(hidden, f"blocks.0.attn.{name}", WIDTH, WIDTH, f"linear_{name}")
        heads.append(call("Transpose", [call("Reshape", [projected, "val_heads"], f"view_{name}")], f"transpose_{name}", perm=[0, 2, 1, 3]))
    context = call("aten_scaled_dot_product_attention", heads, "scaled_dot_product_attention")
    context = call("Reshape", [call("Transpose", [context], "transpose_o", perm=[0, 2, 1, 3]), "val_flat"], "view_o")
    hidden = call("Add", ["x", linear(context, "blocks.0.attn.out", WIDTH, WIDTH, "linear_o")], "add_1")
    wide = linear(norm(hidden, "blocks.0.norm2", "layer_norm_1"), "blocks.0.mlp.0", 2 * WIDTH, WIDTH, "linear_4")
    scaled = call("Div", [wide, "val_root"], "val_div")
    stored.append(numpy_helper.from_array(np.array(2**0.5, np.float32), "val_root"))
    stored += [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("val_one", 1.0), ("val_half", 0.5))]
    cdf = call("Mul", ["val_half", call("Add", [call("Erf", [scaled], "val_erf"), "val_one"], "val_sum")], "val_cdf")
    call("Add", [hidden, linear(call("Mul", [wide, cdf], "gelu"), "blocks.0.mlp.2", WIDTH, 2 * WIDTH, "linear_5")], "add_2")
    before, after = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ("s77", "s27", WIDTH))] for name in ("x", "add_2"))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(TORCH, 1)]
    graph = helper.make_graph(nodes, "main_graph", before, after, stored)
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions())


@pytest.mark.parametrize("shape", [(1, 6, WIDTH), (2, 9, WIDTH)], ids=str)
def test_a_torch_export_runs_on_the_npu(shape: tuple[int, ...]) -> None:
    proto = exported()
    feeds = [{"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)} for seed in range(8)]
    package = npucc.compile(proto, calibration=feeds[1:], shapes={"x": shape})
    assert package.host_nodes == ()
    assert "scaled_dot_product_attention" in {name for layer in package.program.layers for name in layer.nodes}
    assert sqnr(run(proto, feeds[0])[0], package.run(feeds[0]).outputs["add_2"]) > 28


# ---- tokens written as floats


@pytest.mark.parametrize("quant", ["int8", "auto"])
def test_token_numbers_may_be_floats(quant: str) -> None:
    """Old Keras exports feed tokens as floats and cast them: none is mistaken for its neighbour, not even one that calibration has not seen."""
    random = np.random.default_rng(0)
    turned = node("Transpose", "ids", "turned", perm=[1, 0])
    nodes = [turned, node("Cast", "turned", "index", to=TensorProto.INT32), node("Gather", "words index", "y")]
    proto = model(nodes, {"ids": (1, 20)}, ["y"], {"words": random.normal(size=(3000, 8)).astype(np.float32)})
    calibration = [{"ids": random.integers(0, 900, (1, 20)).astype(np.float32)} for _ in range(8)]
    package = npucc.compile(proto, calibration=calibration, quant=quant)
    feed = {"ids": random.integers(0, 3000, (1, 20)).astype(np.float32)}
    assert sqnr(run(proto, feed)[0], package.run(feed).outputs["y"]) > 30
