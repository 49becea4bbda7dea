"""Networks on sequences: tokens, masks, recurrent cells, attention with a cache. From ONNX to the machine, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto

import npucc
from npucc import reference
from npucc.frontend import import_model
from runtime import RuntimeFault

from .onnx_models import assert_agrees, model, node, normal, run

CELLS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "lstm": ("LSTM", 4, {}),
    "lstm reversed": ("LSTM", 4, {"direction": "reverse"}),
    "lstm both ways": ("LSTM", 4, {"direction": "bidirectional"}),
    "lstm coupled": ("LSTM", 4, {"input_forget": 1}),
    "lstm clipped": ("LSTM", 4, {"clip": 0.7}),
    "lstm activations": ("LSTM", 4, {"activations": ["HardSigmoid", "Relu", "Softsign"], "activation_alpha": [0.3], "activation_beta": [0.4]}),
    "gru": ("GRU", 3, {}),
    "gru reset last": ("GRU", 3, {"linear_before_reset": 1}),
    "gru both ways": ("GRU", 3, {"direction": "bidirectional", "linear_before_reset": 1}),
    "rnn": ("RNN", 1, {"direction": "bidirectional"}),
}


def recurrent_model(name: str, *, state: bool, steps: int = 4, batch: int = 2) -> ModelProto:
    operator, gates, attributes = CELLS[name]
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    constants = {
        "w": normal(directions, gates * 5, 3, seed=1) * 0.5,
        "r": normal(directions, gates * 5, 5, seed=2) * 0.5,
        "b": normal(directions, 2 * gates * 5, seed=3) * 0.3,
    }
    inputs: dict[str, Any] = {"x": (steps, batch, 3)}
    reads, results = "x w r b", ["y", "h"]
    if state:
        inputs["h0"] = (directions, batch, 5)
        reads += " - h0"
    if operator == "LSTM":
        results.append("c")
        if state:
            inputs["c0"] = (directions, batch, 5)
            reads += " c0"
    return model([node(operator, reads, " ".join(results), name="cell", hidden_size=5, **attributes)], inputs, results, constants)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells_are_written_out(name: str, state: bool) -> None:
    assert_agrees(recurrent_model(name, state=state))


def test_a_recurrence_keeps_its_state_in_16_bits() -> None:
    proto = recurrent_model("lstm", state=True, steps=6)
    shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in proto.graph.input}
    feeds = [{name: normal(*shape, seed=seed) for name, shape in shapes.items()} for seed in range(8)]
    package = npucc.compile(proto, target="tiny", calibration=feeds, quant="int8")
    quant = package.graph.quant
    assert {quant(name).dtype for name in ("c0", "c", "h", "y")} == {"s16"}
    assert all(quant(n.inputs[0]).dtype == "s8" for n in package.graph if n.op == "matmul"), "products are of 8 bits"
    assert decibels(package.run(feeds[0]).outputs, run(proto, feeds[0])) > 25


def unrolled_cell(steps: int) -> ModelProto:
    """A recurrence as an exporter writes it out: each step transposes its own copy of the weights and picks its own input; a mask holds states."""
    constants: dict[str, np.ndarray] = {"bias": normal(5, seed=1)}
    nodes, state = [], "h"
    for step in range(steps):
        constants |= {f"w{step}": normal(5, 5, seed=2) * 0.4, f"i{step}": np.array(step)}
        nodes += [
            node("Gather", f"x i{step}", f"x{step}", axis=0), node("Gemm", f"{state} w{step} bias", f"p{step}", transB=1),
            node("Add", f"x{step} p{step}", f"s{step}"), node("Tanh", f"s{step}", f"t{step}"), node("Gather", f"mask i{step}", f"m{step}", axis=0),
            node("Where", f"m{step} t{step} {state}", f"h{step}"),
        ]  # fmt: skip
        state = f"h{step}"
    nodes.append(node("Identity", state, "y"))
    return model(nodes, {"x": (steps, 1, 5), "h": (1, 5), "mask": (steps, 1, 1)}, ["y"], constants, dtypes={"mask": "bool"})


def test_all_steps_of_a_recurrence_have_one_scale() -> None:
    proto = unrolled_cell(24)
    masks = [np.arange(24).reshape(24, 1, 1) < 10 + seed for seed in range(8)]
    feeds = [{"x": normal(24, 1, 5, seed=seed), "h": normal(1, 5, seed=seed + 9), "mask": mask} for seed, mask in enumerate(masks)]
    package = npucc.compile(proto, target="tiny", calibration=feeds)
    products = [n for n in package.graph if n.op == "matmul"]
    assert len({n.inputs[1] for n in products}) == 1, "one copy of the weights"
    for stem, first in (("p", 0), ("s", 0), ("t", 0), ("h", 6)):  # what the first states are made of differs
        assert len({package.graph.quant(f"{stem}{step}").key for step in range(first, 23)}) == 1
    assert decibels(package.run(feeds[0]).outputs, run(proto, feeds[0])) > 30
    apart = npucc.compile(unrolled_cell(8), target="tiny", calibration=[{**feed, "x": feed["x"][:8], "mask": feed["mask"][:8]} for feed in feeds])
    assert len({apart.graph.quant(f"p{step}").key for step in range(8)}) > 1, "layers that share weights keep their own ranges"


def decibels(found: Any, wanted: list[np.ndarray]) -> float:
    """The worst output's signal over its error."""
    pairs = zip(found.values(), wanted, strict=True)
    return min(float(10 * np.log10((want**2).sum() / max(((have - want) ** 2).sum(), 1e-30))) for have, want in pairs)


def embedding(entries: int = 40, width: int = 8) -> ModelProto:
    nodes = [node("Gather", "table ids", "rows"), node("Add", "rows place", "y")]
    return model(nodes, {"ids": (2, 5)}, ["y"], {"table": normal(entries, width), "place": normal(5, width, seed=1)}, dtypes={"ids": "int64"})


def test_tokens_are_looked_up_in_a_table() -> None:
    proto = embedding()
    tokens = np.array([[0, 39, -1, -40, 7], [3, 3, 20, 21, 5]], np.int64)
    package = npucc.compile(proto, target="tiny", calibration=[{"ids": tokens % 4}])  # most tokens were never seen
    assert package.graph.quant("ids").dtype == "s32"
    assert any(line.strip().startswith("gather") for line in package.text.splitlines())
    result = package.run({"ids": tokens})
    assert decibels(result.outputs, run(proto, {"ids": tokens})) > 30
    np.testing.assert_array_equal(result.raw["y"], reference.run(package.graph, {"ids": tokens})["y"])


def test_an_index_outside_the_table_is_a_fault() -> None:
    package = npucc.compile(embedding(), target="tiny", calibration=[{"ids": np.zeros((2, 5), np.int64)}])
    with pytest.raises(RuntimeFault, match=r"index 40 is outside a table of 40 rows"):
        package.run({"ids": np.full((2, 5), 40)})


def test_rows_are_gathered_exactly() -> None:
    """Nothing but the look-up: onnxruntime gives the same numbers on the exported model."""
    proto = model([node("Gather", "table ids", "y", axis=1)], {"ids": (3, 2)}, ["y"], {"table": normal(4, 9, 6)}, dtypes={"ids": "int32"})
    feed = {"ids": np.array([[0, 8], [-9, 4], [4, -1]], np.int32)}
    package = npucc.compile(proto, target="tiny", calibration=[feed])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(package.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(package.run(feed).outputs["y"], session.run(None, feed)[0])


CAUSAL = np.tri(6, dtype=bool)
SLOPE = np.float32(-0.37) * np.abs(np.arange(6)[:, None] - np.arange(6)).astype(np.float32)
#: ways to write a mask: from the scores s and an integer mask to t
MASKS = {
    "arithmetic": [
        node("Cast", "mask", "f", to=TensorProto.FLOAT), node("Sub", "one f", "off"), node("Mul", "off low", "bias"), node("Add", "s bias", "t"),
    ],
    "selected": [node("Equal", "mask zero", "off"), node("Where", "off low s", "t")],
    "added": [node("Equal", "mask zero", "off"), node("Where", "off low none", "bias"), node("Add", "s bias", "t")],
    "causal": [node("Add", "s triangle", "t")],
    "causal, selected": [node("Where", "below s low", "t")],
    "with slopes": [node("Add", "s sloped", "t")],
    "with slopes, two masks": [
        node("Equal", "mask zero", "off"), node("Where", "off low none", "bias"), node("Add", "bias sloped", "both"), node("Add", "both s", "t"),
    ],
    "scaled after": [node("Equal", "mask zero", "off"), node("Where", "off low none", "bias"), node("Add", "s bias", "u"), node("Div", "u two", "t")],
}  # fmt: skip


@pytest.mark.parametrize("low", [-1e4, -65504.0, -3.4028235e38, -np.inf])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_do_not_take_the_scale_of_scores(kind: str, low: float) -> None:
    if kind == "arithmetic" and np.isinf(low):
        low = -1e9  # 0 times infinity is not a number
    guard = [node("IsNaN", "p", "odd"), node("Where", "odd none p", "w")] if low == -np.inf else [node("Identity", "p", "w")]
    nodes = [node("MatMul", "q k", "s"), *MASKS[kind], node("Softmax", "t", "p", axis=-1), *guard, node("MatMul", "w v", "y")]
    triangle = np.where(CAUSAL, 0, np.float32(low)).astype(np.float32)
    constants = {
        "one": np.float32(1), "zero": np.int64(0), "low": np.float32(low), "none": np.float32(0), "two": np.float32(2), "below": CAUSAL,
        "triangle": triangle, "sloped": np.where(CAUSAL, SLOPE, triangle),
    }  # fmt: skip
    inputs = {"q": (1, 6, 8), "k": (1, 8, 6), "v": (1, 6, 8), "mask": (1, 1, 6)}
    proto = model(nodes, inputs, ["y"], constants, dtypes={"mask": "int64"})
    feeds = []
    for seed in range(4):
        mask = (np.arange(6) < 3 + seed).astype(np.int64).reshape(1, 1, 6)
        feeds.append({"q": normal(1, 6, 8, seed=seed), "k": normal(1, 8, 6, seed=seed + 10), "v": normal(1, 6, 8, seed=seed + 20), "mask": mask})
    package = npucc.compile(proto, target="tiny", calibration=feeds)
    assert not package.host_nodes
    for feed in feeds:
        assert decibels(package.run(feed).outputs, run(proto, feed)) > 30


@pytest.mark.parametrize("form", ["is NaN", "largest", "unguarded"])
def test_rows_that_are_masked_whole_are_zero(form: str) -> None:
    """The float model has NaN in between, or keeps it where nothing guards: there the mean is as good as any."""
    guards = {
        "is NaN": [node("IsNaN", "p", "odd"), node("Where", "odd none p", "w")],
        "largest": [node("ReduceMax", "t", "m", axes=[-1]), node("Equal", "m low", "odd"), node("Where", "odd none p", "w")],
        "unguarded": [node("Identity", "p", "w")],
    }
    masked = [node("MatMul", "q k", "s"), node("Where", "mask s low", "t"), node("Softmax", "t", "p", axis=-1)]
    nodes = [*masked, *guards[form], node("MatMul", "w v", "y")]
    constants = {"low": np.float32(-np.inf), "none": np.float32(0)}
    proto = model(nodes, {"q": (1, 6, 8), "k": (1, 8, 6), "v": (1, 6, 8), "mask": (1, 6, 6)}, ["y"], constants, dtypes={"mask": "bool"})
    feeds = []
    for seed in range(4):
        mask = np.random.default_rng(seed).random((1, 6, 6)) < 0.6
        mask[0, seed] = False
        feeds.append({"q": normal(1, 6, 8, seed=seed), "k": normal(1, 8, 6, seed=seed + 10), "v": normal(1, 6, 8, seed=seed + 20), "mask": mask})
    package = npucc.compile(proto, target="tiny", calibration=feeds)
    assert not package.host_nodes
    for seed, feed in enumerate(feeds):
        (want,) = run(proto, feed)
        have = package.run(feed).outputs["y"]
        rest = np.arange(6) != seed
        assert decibels({"y": have[:, rest]}, [want[:, rest]]) > 30
        assert form == "unguarded" or not have[0, seed].any()


def test_no_row_is_taken_for_masked_where_no_sample_uses_the_mask() -> None:
    """All positions are valid in calibration; later a whole row is not."""
    nodes = [
        node("MatMul", "q k", "s"), node("Where", "mask none low", "bias"), node("Add", "s bias", "t"), node("Softmax", "t", "p", axis=-1),
        node("ReduceMax", "bias", "m", axes=[-1]), node("Equal", "m low", "odd"), node("Where", "odd none p", "w"), node("MatMul", "w v", "y"),
    ]  # fmt: skip
    shapes = {"q": (1, 6, 8), "k": (1, 8, 6), "v": (1, 6, 8)}
    proto = model(nodes, shapes | {"mask": (6, 6)}, ["y"], {"low": np.float32(-np.inf), "none": np.float32(0)}, dtypes={"mask": "bool"})
    feeds = [{name: normal(*shape, seed=seed + len(name)) for name, shape in shapes.items()} | {"mask": np.ones((6, 6), bool)} for seed in range(4)]
    package = npucc.compile(proto, target="tiny", calibration=feeds)
    for rows in (np.ones(6, bool), np.arange(6) > 0):
        feed = feeds[0] | {"mask": np.repeat(rows[:, None], 6, axis=1)}
        (want,) = run(proto, feed)
        assert decibels(package.run(feed).outputs, [np.where(rows[:, None], want, 0).astype(np.float32)]) > 30


def test_integers_are_exact() -> None:
    """Positions that are computed from a length: sums, differences and comparisons in steps of one."""
    nodes = [
        node("Add", "n offsets", "places"), node("Sub", "places three", "shifted"), node("Mul", "shifted shifted", "squares"),
        node("Less", "shifted n", "below"), node("Cast", "below", "ones", to=TensorProto.INT64), node("Add", "squares ones", "y"),
        node("ArgMax", "x", "place", axis=1), node("Add", "place places", "z"),
    ]  # fmt: skip
    constants = {"offsets": np.arange(9)[:, None], "three": np.int64(3)}
    proto = model(nodes, {"n": (1, 1), "x": (1, 300)}, ["y", "z"], constants, dtypes=dict.fromkeys("nyz", "int64"))
    feeds = [{"n": np.array([[seed * 7]]), "x": normal(1, 300, seed=seed) + 9 * np.eye(300, dtype=np.float32)[31 * seed]} for seed in range(5)]
    package = npucc.compile(proto, target="tiny", calibration=feeds)
    for feed in feeds:
        found, (y, z) = package.run(feed).outputs, run(proto, feed)
        np.testing.assert_array_equal(found["y"], y)
        np.testing.assert_array_equal(found["z"], z)


def test_the_range_of_a_count_does_not_depend_on_the_samples() -> None:
    """Mean pooling under a mask: only short sentences are seen, a long one comes."""
    nodes = [
        node("Cast", "mask", "m", to=TensorProto.FLOAT), node("Mul", "x m", "kept"), node("ReduceSum", "kept axes", "total", keepdims=0),
        node("ReduceSum", "m axes", "count", keepdims=0), node("Div", "total count", "y"),
    ]  # fmt: skip
    proto = model(nodes, {"x": (1, 16, 4), "mask": (1, 16, 1)}, ["y"], {"axes": [1]}, dtypes={"mask": "int64"})
    steady = np.ones((1, 16, 4), np.float32) * normal(1, 1, 4)
    short = {"x": steady, "mask": (np.arange(16) < 3).astype(np.int64).reshape(1, 16, 1)}
    package = npucc.compile(proto, target="tiny", calibration=[short])
    assert package.graph.quant("count").scale * 65535 >= 15 or package.graph.quant("count").dtype == "s8"
    found = reference.run(package.graph, {"x": steady, "mask": np.ones((1, 16, 1), np.int64)})
    count = next(tensor for name, tensor in package.graph.tensors.items() if name.startswith("count"))
    assert reference.to_real(count, found[count.name]).max() == pytest.approx(16, rel=0.05)


def decoder(width: int = 16, heads: int = 2, past: int = 8, tokens: int = 30) -> ModelProto:
    """One step of a small GPT: a token and the keys and values of the last `past` steps come in, logits and the shifted cache go out."""
    size = width // heads
    nodes = [node("Gather", "embedding id", "e"), node("LayerNormalization", "e g1 b1", "n1", axis=-1)]
    for part in "qkv":
        nodes += [
            node("MatMul", f"n1 w{part}", f"{part}1"), node("Reshape", f"{part}1 split", f"{part}2"),
            node("Transpose", f"{part}2", part, perm=[0, 2, 1, 3]),
        ]  # fmt: skip
    for part in "kv":
        nodes += [node("Concat", f"past_{part} {part}", f"all_{part}", axis=2), node("Slice", f"all_{part} first last two", f"next_{part}")]
    nodes += [
        node("Transpose", "all_k", "kt", perm=[0, 1, 3, 2]), node("MatMul", "q kt", "s"), node("Mul", "s factor", "s1"),
        node("Softmax", "s1", "p", axis=-1),
        node("MatMul", "p all_v", "o"), node("Transpose", "o", "o1", perm=[0, 2, 1, 3]), node("Reshape", "o1 flat", "o2"),
        node("MatMul", "o2 wo", "o3"),
        node("Add", "e o3", "r"), node("LayerNormalization", "r g1 b1", "n2", axis=-1), node("MatMul", "n2 w1", "f"), node("Relu", "f", "f1"),
        node("MatMul", "f1 w2", "f2"), node("Add", "r f2", "z"), node("MatMul", "z head", "logits"),
    ]  # fmt: skip
    random = np.random.default_rng(5)
    weights = {
        name: random.normal(0, 0.3, size).astype(np.float32)
        for name, size in {
            "embedding": (tokens, width), **{f"w{part}": (width, width) for part in "qkvo"}, "w1": (width, 32), "w2": (32, width),
            "head": (width, tokens),
        }.items()
    }  # fmt: skip
    weights["embedding"] *= 3
    constants = {
        **weights, "g1": np.ones(width, np.float32), "b1": np.zeros(width, np.float32), "split": [1, 1, heads, size], "flat": [1, 1, width],
        "first": [1], "last": [past + 1], "two": [2], "factor": np.float32(size**-0.5),
    }  # fmt: skip
    cache = (1, heads, past, size)
    return model(nodes, {"id": (1, 1), "past_k": cache, "past_v": cache}, ["logits", "next_k", "next_v"], constants, dtypes={"id": "int64"})


def decode(step: Any, tokens: list[int], seen: list[dict[str, np.ndarray]] | None = None) -> np.ndarray:
    """The logits after each token; the caches go round."""
    cache = {"past_k": np.zeros((1, 2, 8, 8), np.float32), "past_v": np.zeros((1, 2, 8, 8), np.float32)}
    logits = []
    for token in tokens:
        feed: dict[str, np.ndarray] = {"id": np.array([[token]], np.int64), **cache}
        if seen is not None:
            seen.append(feed)
        found, cache["past_k"], cache["past_v"] = step(feed)
        logits.append(found.reshape(-1))
    return np.stack(logits)


def test_decoding_with_a_cache() -> None:
    """The cache is a graph input and output: what the machine gives at one step it takes at the next, for many steps."""
    proto = decoder()
    samples: list[dict[str, np.ndarray]] = []
    random = np.random.default_rng(0)
    decode(lambda feed: run(proto, feed), random.integers(0, 30, 40).tolist(), samples)
    package = npucc.compile(proto, target="tiny", calibration=samples)
    tokens = random.integers(0, 30, 24).tolist()
    wanted = decode(lambda feed: run(proto, feed), tokens)
    found = decode(lambda feed: list(package.run(feed).outputs.values()), tokens)
    assert float(10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum())) > 24
    assert float(np.mean(found.argmax(1) == wanted.argmax(1))) > 0.9


def test_a_spectrum_keeps_its_faint_bins() -> None:
    """sqrt(a² + b²): a square needs twice the bits of its root."""
    nodes = [
        node("Conv", "x w", "c"), node("Slice", "c zero four one", "a"), node("Slice", "c four eight one", "b"), node("Mul", "a a", "a2"),
        node("Mul", "b b", "b2"), node("Add", "a2 b2", "s"), node("Sqrt", "s", "m"), node("Conv", "m v", "y"),
    ]  # fmt: skip
    constants = {"w": normal(8, 1, 5), "v": normal(3, 4, 1, seed=1), "zero": [0], "four": [4], "eight": [8], "one": [1]}
    proto = model(nodes, {"x": (1, 1, 32)}, ["y"], constants)
    loud = [{"x": normal(1, 1, 32, seed=seed) * 10 ** -(seed % 2)} for seed in range(12)]
    package = npucc.compile(proto, target="tiny", calibration=loud)
    quants = [package.graph.quant(n.outputs[0]).dtype for n in package.graph if n.op == "add"]
    assert quants == ["s32"]
    assert decibels(package.run(loud[1]).outputs, run(proto, loud[1])) > 25



def test_all_steps_of_a_recurrence_read_the_same_weights() -> None:
    graphs = [import_model(recurrent_model("lstm", state=True, steps=steps)) for steps in (2, 6)]
    sizes = [sum(tensor.data.nbytes for tensor in graph.tensors.values() if tensor.data is not None) for graph in graphs]
    assert sizes[0] == sizes[1]
