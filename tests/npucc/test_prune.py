"""Pruning: what is zero goes without a trace, what goes takes all that hangs on it along, and the rest is mended."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import ModelProto

import npucc
from isa.target import load_target
from npucc import demo, ops
from npucc.compiler import bind_shapes, float_graph
from npucc.export import to_onnx
from npucc.feeds import Port, open_dataset
from npucc.graph import Graph
from npucc.prune import PruneOptions, prune
from npucc.prune.arrange import arrange, reordered
from npucc.prune.families import find_families
from npucc.prune.measure import OutputMeter
from npucc.prune.patterns import BlockPattern, NeighbourPattern
from npucc.prune.repair import joined_to
from npucc.prune.shrink import shrink
from npucc.prune.slots import FIXED
from npucc.prune.solve import damped, eliminate, refit, thin_out
from npucc.prune.ties import find_slots
from npucc.prune.zeros import remove_zero_channels
from npucc.quantize.calibrate import tensor_runner
from npucc.sites import find_sites
from tests.npucc.float_graphs import FloatNet
from tests.npucc.onnx_models import model, node

Array = np.ndarray
TINY = load_target("tiny")


def run(graph: Graph, feed: dict[str, Array]) -> list[Array]:
    values = tensor_runner(graph, graph.outputs)(feed)
    return [values[name] for name in graph.outputs]


def net(seed: int, *, whole: bool = False) -> tuple[FloatNet, Graph]:
    """Residual sum, concatenation, depthwise, grouped and transposed convolution, gate, pools, slice, flattening, two dense layers.

    `whole`: small integers everywhere, so that float sums are exact in any order.
    """
    n = FloatNet(seed)

    def weights(name: str, *shape: int) -> str:
        if whole:
            return n.constant(name, n.random.integers(-2, 3, shape).astype(np.float32))
        return n.weights(name, *shape)

    conv = ops.Conv(pads=(1, 1, 1, 1), clamp=(0.0, float("inf")))
    n.input("x", 1, 3, 8, 8)
    n.op("conv", ["x", weights("w_stem", 8, 3, 3, 3), weights("b_stem", 8)], "stem", conv)
    n.op("conv", ["stem", weights("w_inner", 12, 8, 3, 3), weights("b_inner", 12)], "inner", conv)
    n.op("conv", ["inner", weights("w_back", 8, 12, 3, 3), weights("b_back", 8)], "back", ops.Conv(pads=(1, 1, 1, 1)))
    n.op("add", ["stem", "back"], "sum", ops.Binary((0.0, float("inf"))))
    n.op("conv", ["sum", weights("w_depth", 8, 1, 3, 3), weights("b_depth", 8)], "depth", ops.Conv(pads=(1, 1, 1, 1), groups=8))
    n.op("conv", ["sum", weights("w_group", 8, 4, 1, 1)], "group", ops.Conv(groups=2))
    n.op("concat", ["depth", "group"], "joined", ops.Concat(1))
    n.op("slice", ["joined"], "part", ops.Slice((0, 2, 0, 0), (1, 12, 8, 8), (1, 1, 1, 1)))
    n.op("reduce_max", ["part"], "pooled", ops.Reduce((2, 3)))
    n.op("conv", ["pooled", weights("w_squeeze", 4, 12, 1, 1), weights("b_squeeze", 4)], "squeeze", ops.Conv(clamp=(0.0, float("inf"))))
    n.op("conv", ["squeeze", weights("w_gate", 12, 4, 1, 1), weights("b_gate", 12)], "gate", ops.Conv(clamp=(0.0, 1.0)))
    n.op("mul", ["part", "gate"], "gated")
    n.op("conv_transpose", ["gated", weights("w_up", 12, 6, 2, 2), weights("b_up", 6)], "up", ops.ConvTranspose(strides=(2, 2)))
    n.op("max_pool", ["up"], "small", ops.Pool((4, 4), (4, 4)))
    n.op("reshape", ["small"], "flat", ops.Reshape((1, 96)))
    n.op("matmul", ["flat", weights("w_hidden", 96, 10), weights("b_hidden", 10)], "hidden", ops.MatMul((0.0, float("inf"))))
    n.op("matmul", ["hidden", weights("w_out", 10, 5), weights("b_out", 5)], "logits")
    return n, n.graph("logits")


def whole_feed(seed: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).integers(-2, 3, (1, 3, 8, 8)).astype(np.float32)}


# constants to clear (name → dimension of the channels), the channels, how many labels go
ZEROS: dict[str, tuple[dict[str, int], list[int], int]] = {
    "inner convolution": ({"w_inner": 0, "b_inner": 0}, [5], 1),
    "nobody listens": ({"w_back": 1}, [3], 1),
    # the grouped convolution ties channels 2 and 6, which are at the same place of its two groups
    "both sides of a residual sum": ({"w_stem": 0, "b_stem": 0, "w_back": 0, "b_back": 0, "b_depth": 0}, [2, 6], 1),
    "one side of a residual sum": ({"w_back": 0, "b_back": 0}, [2, 6], 0),
    "hidden unit": ({"w_hidden": 1, "b_hidden": 0}, [7], 1),
    "channel that is flattened": ({"w_up": 1, "b_up": 0}, [4], 1),
    "gate that another layer listens behind": ({"w_gate": 0, "b_gate": 0}, [6], 0),
}


@pytest.mark.parametrize("case", ZEROS)
@pytest.mark.parametrize("seed", [0, 1])
def test_zero_channels_go_without_any_change(case: str, seed: int) -> None:
    """Equality to the bit: all numbers are small integers, so no order of summation can hide a difference."""
    n, _ = net(seed, whole=True)
    cleared, channels, expected = ZEROS[case]
    for name, axis in cleared.items():
        data = n.editor.tensors[name].data
        assert data is not None
        np.moveaxis(data, axis, 0)[channels] = 0
    graph = n.graph("logits")
    smaller, removed = remove_zero_channels(graph)
    assert removed == expected
    sizes = [sum(t.data.size for t in each.tensors.values() if t.data is not None) for each in (smaller, graph)]
    assert (sizes[0] < sizes[1]) == bool(expected)
    for index in range(3):
        for want, have in zip(run(graph, whole_feed(index)), run(smaller, whole_feed(index)), strict=True):
            assert np.array_equal(want, have)


def test_a_network_without_zeros_keeps_its_channels() -> None:
    graph = net(0)[1]
    same, removed = remove_zero_channels(graph)
    assert removed == 0
    assert same is graph


@pytest.mark.parametrize("seed", range(4))
def test_any_set_of_labels_can_be_cut(seed: int) -> None:
    """Cutting is the same as clearing: the cut graph verifies, and equals the graph whose weights on the way out are zero."""
    n, graph = net(seed, whole=True)
    slots = find_slots(graph)
    random = np.random.default_rng(seed)
    removed = np.zeros(slots.count, bool)
    for family in slots.families():
        removed[random.choice(family, random.integers(0, len(family)), replace=False)] = True
    smaller = shrink(graph, slots, removed)
    for name in ("w_inner", "w_back", "w_up", "w_hidden", "w_gate", "w_squeeze", "w_group", "w_out"):
        summed = {"w_up": 0, "w_hidden": 0, "w_out": 0}.get(name, 1)
        data = graph.tensors[name].data
        assert data is not None
        np.moveaxis(data, summed, 0)[removed[slots.labels[name, summed]]] = 0
    for want, have in zip(run(n.graph("logits"), whole_feed(9)), run(smaller, whole_feed(9)), strict=True):
        assert np.array_equal(want, have)
    assert smaller.tensors["logits"].shape == (1, 5)
    assert smaller.tensors["x"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("seed", range(3))
def test_channels_of_a_family_may_change_places(seed: int) -> None:
    """Equality to the bit, as above."""
    _, graph = net(seed, whole=True)
    slots, source, random = find_slots(graph), np.arange(find_slots(graph).count), np.random.default_rng(seed)
    for labels in slots.families():
        source[labels] = random.permutation(labels)
    moved = reordered(graph, slots, source)
    assert sum(np.any(moved.tensors[name].data != each.data) for name, each in graph.tensors.items() if each.data is not None) > 8
    for want, have in zip(run(graph, whole_feed(seed)), run(moved, whole_feed(seed)), strict=True):
        assert np.array_equal(want, have)


def uneven(*, zero_beside: bool) -> FloatNet:
    """Sixteen channels, the first eight of which are loud: 2:4 loses half of them unless they are spread. Two layers read them."""
    n = FloatNet(0)
    n.input("x", 1, 6, 5, 5)
    loud = n.random.normal(size=(16, 6, 1, 1)) * np.repeat([10.0, 0.1], 8)[:, None, None, None]
    n.op("conv", ["x", n.constant("w_make", loud.astype(np.float32)), n.weights("b_make", 16)], "made", ops.Conv(clamp=(0.0, float("inf"))))
    n.op("conv", ["made", n.weights("w_read", 12, 16, 3, 3), n.weights("b_read", 12)], "read", ops.Conv(pads=(1, 1, 1, 1)))
    n.op("conv", ["made", n.weights("w_beside", 12, 16, 1, 1), n.weights("b_beside", 12)], "beside")
    n.op("add", ["read", "beside"], "sum")
    if zero_beside:
        data = n.editor.tensors["w_beside"].data
        assert data is not None
        data[:, ::4] = 0
    return n


def test_loud_channels_are_spread_over_the_neighbours() -> None:
    graph, pattern = uneven(zero_beside=False).graph("sum"), NeighbourPattern(2, 4)
    feeds = [{"x": np.random.default_rng(index).normal(size=(1, 6, 5, 5)).astype(np.float32)} for index in range(4)]
    moved = arrange(graph, {"read_node": pattern}, feeds)
    made = moved.tensors["w_make"].data
    assert made is not None
    loud = np.abs(made).max(axis=(1, 2, 3)) > 1
    assert (loud.reshape(4, 4).sum(axis=1) == 2).all()
    assert np.allclose(run(graph, feeds[0])[0], run(moved, feeds[0])[0], rtol=1e-3, atol=1e-2)
    assert arrange(moved, {"read_node": pattern}, feeds) is moved, "there is no better order"
    held = uneven(zero_beside=True).graph("sum")
    assert arrange(held, {"read_node": pattern}, feeds) is held, "zeros of a layer that gets no pattern keep theirs"


def test_what_is_tied() -> None:
    graph = net(0)[1]
    labels = find_slots(graph).labels
    assert np.array_equal(labels["stem", 1], labels["back", 1])
    assert np.array_equal(labels["sum", 1], labels["w_depth", 0])
    assert np.array_equal(labels["joined", 1][2:14], labels["gate", 1])
    assert np.array_equal(np.repeat(labels["up", 1], 16), labels["w_hidden", 0])
    assert not set(labels["inner", 1]) & set(labels["stem", 1])
    for name in ("x", "logits"):
        assert all((labels[name, axis] == FIXED).all() for axis in range(len(graph.tensors[name].shape)))


def attention() -> tuple[FloatNet, Graph]:
    """Self-attention of four heads, each of two values wide, on six tokens, and two layers behind."""
    n = FloatNet(5)
    n.input("x", 1, 6, 8)
    for part in "qkv":
        n.op("matmul", ["x", n.weights(f"w_{part}", 8, 8), n.bias(f"b_{part}", 8)], part)
        n.op("reshape", [part], f"{part}_split", ops.Reshape((1, 6, 4, 2)))
        n.op("transpose", [f"{part}_split"], f"{part}_heads", ops.Transpose((0, 2, 3, 1) if part == "k" else (0, 2, 1, 3)))
    n.op("matmul", ["q_heads", "k_heads"], "scores")
    n.op("softmax", ["scores"], "shares", ops.Softmax(3))
    n.op("matmul", ["shares", "v_heads"], "mixed")
    n.op("transpose", ["mixed"], "tokens", ops.Transpose((0, 2, 1, 3)))
    n.op("reshape", ["tokens"], "joined", ops.Reshape((1, 6, 8)))
    n.op("matmul", ["joined", n.weights("w_out", 8, 8), n.bias("b_out", 8)], "out")
    n.op("add", ["x", "out"], "sum")
    n.op("matmul", ["sum", n.weights("w_up", 8, 16), n.bias("b_up", 16)], "up", ops.MatMul((0.0, float("inf"))))
    n.op("matmul", ["up", n.weights("w_down", 16, 8)], "down")
    return n, n.graph("down")


def test_a_head_that_nobody_listens_to_goes() -> None:
    n, graph = attention()
    for name, rows in (("w_out", [4, 5]), ("w_down", [3])):
        data = graph.tensors[name].data
        assert data is not None
        data[rows] = 0
    smaller, removed = remove_zero_channels(graph)
    assert removed == 2  # the third head, the fourth hidden unit
    shapes = {name: tensor.shape for name, tensor in smaller.tensors.items()}
    assert [shapes[name] for name in ("w_q", "w_k", "w_v", "w_out")] == [(8, 6), (8, 6), (8, 6), (6, 8)]
    assert [shapes[name] for name in ("scores", "mixed", "joined", "w_up", "x", "down")] == [
        (1, 3, 6, 6), (1, 3, 6, 2), (1, 6, 6), (8, 15), (1, 6, 8), (1, 6, 8),
    ]  # fmt: skip
    feed = {"x": n.random.normal(size=(1, 6, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(smaller, feed)[0], run(graph, feed)[0], rtol=0, atol=1e-6)  # sums of fewer terms are rounded elsewhere


def test_heads_and_hidden_units_are_families() -> None:
    n, graph = attention()
    families = find_families(graph, find_slots(graph), PruneOptions.parse("channels=30%"))
    assert [(len(family.labels), family.readers) for family in families] == [(4, ("out_node",)), (16, ("down_node",))]
    feeds = [{"x": n.random.normal(size=(1, 6, 8)).astype(np.float32)} for _ in range(12)]
    report = prune(graph, feeds, target=TINY, options=PruneOptions.parse("channels=30%")).report
    assert report.stopped == "channels"


def recurrent(*, silent: int | None = None) -> Graph:
    """An LSTM of eight units over five steps, and a layer behind; nobody listens to the unit `silent`."""
    random = np.random.default_rng(3)
    shapes = {"w": (1, 32, 3), "r": (1, 32, 8), "b": (1, 64), "m": (8, 4)}
    values = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    if silent is not None:
        values["r"][:, :, silent] = 0
        values["m"][silent] = 0
    nodes = [node("LSTM", "x w r b", "y", name="cell", hidden_size=8), node("MatMul", "y m", "out", name="dense")]
    return float_graph(model(nodes, {"x": (5, 2, 3)}, ["out"], values), {})


def test_a_recurrent_unit_goes_in_every_step() -> None:
    graph = recurrent(silent=6)
    smaller, removed = remove_zero_channels(graph)
    assert removed == 1
    shapes = {tensor.shape for tensor in smaller.tensors.values() if tensor.is_constant}
    assert {(3, 28), (7, 28), (7, 4)} <= shapes
    feed = {"x": np.random.default_rng(4).normal(size=(5, 2, 3)).astype(np.float32)}
    np.testing.assert_allclose(run(smaller, feed)[0], run(graph, feed)[0], rtol=0, atol=1e-6)


def test_steps_of_a_recurrent_layer_keep_their_weights_in_common() -> None:
    random = np.random.default_rng(4)
    feeds = [{"x": random.normal(size=(5, 2, 3)).astype(np.float32)} for _ in range(12)]
    graph = prune(recurrent(), feeds, target=TINY, options=PruneOptions.parse("channels=25%,2:4")).graph
    recurrences = {each.inputs[1] for each in graph if each.op == "matmul" and graph.tensors[each.inputs[1]].shape[0] < 8 and "cell" in each.name}
    units = graph.tensors[next(each.inputs[0] for each in graph if each.name.startswith("dense"))].shape[-1]
    assert units < 8
    assert len({name for name in recurrences if graph.tensors[name].shape == (units, 4 * units)}) == 1


def test_elimination_prefers_what_the_rest_can_say() -> None:
    """Channel 2 is the sum of 0 and 1, with large weights: it goes first and costs nothing."""
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 4))
    x[:, 2] = x[:, 0] + x[:, 1]
    x = np.concatenate([x, np.ones((500, 1))], axis=1)
    matrix = np.array([[1.0, 0.2], [0.5, 1.0], [3.0, -4.0], [0.3, 0.3], [0.1, 0.1]])
    gram = x.T @ x
    done = eliminate([gram], [matrix], [np.arange(4)[:, None]], [1.0])
    assert done.order[0] in (0, 1, 2)
    assert done.costs[0] < 0.03 * done.costs[1]
    kept = np.setdiff1d(np.arange(5), done.order[:1])
    fitted = np.zeros_like(matrix)
    fitted[kept] = np.linalg.solve(damped(gram)[np.ix_(kept, kept)], damped(gram)[kept] @ matrix)
    assert ((x @ fitted - x @ matrix) ** 2).sum() < 1e-3 * ((x @ matrix) ** 2).sum()


def test_the_pattern_is_near_the_best_there_is() -> None:
    """2:4 of eight correlated inputs: beside all 36 ways to choose for each output, each refitted, and beside the choice by magnitude."""
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(size=(400, 8)) @ (np.eye(8) + random.normal(size=(8, 8)) / 2), np.ones((400, 1))], axis=1)
    matrix, gram, pattern = random.normal(size=(9, 40)), x.T @ x, NeighbourPattern(2, 4)

    def errors(mask: Array) -> Array:
        fitted = refit(gram, gram @ matrix, matrix * mask, mask=mask)
        assert not fitted[~mask].any()
        return np.asarray(((x @ fitted - x @ matrix) ** 2).sum(axis=0))

    mask, _ = thin_out(gram, matrix, pattern, np.ones(matrix.shape, bool))
    assert (mask[:8].reshape(2, 4, -1).sum(axis=1) == 2).all()
    assert mask[8].all()
    pairs = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
    every = [np.repeat([*first, *second, True], 40).reshape(9, 40) for first in pairs for second in pairs]
    best = np.min([errors(each) for each in every], axis=0).sum()
    largest = np.concatenate([pattern.choose(matrix[:8] ** 2), np.ones((1, 40), bool)])
    assert errors(mask).sum() < 1.3 * best < 0.7 * errors(largest).sum(), (errors(mask).sum() / best, errors(largest).sum() / best)


@pytest.mark.parametrize("name", ["stem", "depth", "group", "hidden"])
def test_a_site_is_its_operator(name: str) -> None:
    """Columns times matrix are the operator's answers at the same places, before the clamp; and the constants come back."""
    graph = net(3)[1]
    site = find_sites(graph)[f"{name}_node"]
    feed = {"x": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    values = tensor_runner(graph, [site.input, name])(feed)
    found, wanted = site.columns(values[site.input], 20, 0) @ site.matrix(graph), site.answers(values[name], 20, 0)
    clamp = getattr(site.node.attributes, "clamp", None)
    np.testing.assert_allclose(np.clip(found, *clamp) if clamp else found, wanted, atol=1e-4)
    weights, _ = site.constants(graph, site.matrix(graph))
    np.testing.assert_array_equal(weights, graph.tensors[site.weights].data)


def little() -> ModelProto:
    """Three convolutions, the last one within a residual connection, and a dense layer behind the mean."""
    random = np.random.default_rng(2)
    sizes = {"a": (16, 4, 3, 3), "b": (24, 16, 3, 3), "c": (16, 24, 3, 3), "d": (16, 5)}
    values = {name: random.normal(0, np.prod(size[1:]) ** -0.5, size).astype(np.float32) for name, size in sizes.items()}
    values["d"] -= values["d"].mean(axis=0)  # so that no class wins by what all samples have in common
    inputs = {"a": "x", "b": "a_relu", "c": "b_relu"}
    convs = [node("Conv", f"{source} {name}", f"{name}_out", name=name, pads=[1, 1, 1, 1]) for name, source in inputs.items()]
    relus = [node("Relu", f"{name}_out", f"{name}_relu") for name in "ab"]
    rest = [node("Add", "a_relu c_out", "sum"), node("Relu", "sum", "s"), node("GlobalAveragePool", "s", "mean"), node("Flatten", "mean", "flat")]
    nodes = [convs[0], relus[0], convs[1], relus[1], convs[2], *rest, node("MatMul", "flat d", "logits", name="d")]
    return model(nodes, {"x": (1, 4, 8, 8)}, ["logits"], values)


def little_feeds(count: int) -> list[dict[str, Array]]:
    """Smooth images, so that neighbours and channels tell of each other."""
    random = np.random.default_rng(6)
    waves = [np.sin(np.add.outer(np.arange(8) * fast, np.arange(8) * slow)) for fast, slow in ((0.3, 0.5), (0.9, 0.2), (0.1, 1.1))]
    return [{"x": np.einsum("cw,wij->cij", random.normal(size=(4, 3)), waves)[None].astype(np.float32)} for _ in range(count)]


def test_channels_go_and_the_rest_is_mended() -> None:
    """A quarter of the MACs go; the mended network is far closer to the dense one than plain cutting by magnitude."""
    graph, feeds = float_graph(little(), {}), little_feeds(32)
    good, again = (prune(graph, feeds, target=TINY, options=PruneOptions.parse("channels=25%,rows=1024")) for _ in range(2))
    plain = prune(graph, feeds, target=TINY, options=PruneOptions.parse("channels=25%,criterion=magnitude,repair=no"))
    for report in (good.report, plain.report):
        assert report.macs_kept <= 0.75 * report.macs
        assert report.stopped == "channels"
    assert good.report.output_error < 0.5 * plain.report.output_error
    assert sum(row.macs_kept for row in good.report.layers) == good.report.macs_kept
    assert sum(row.macs for row in good.report.layers) == good.report.macs
    errors = [(row.error_before or 0.0, row.error_after or 0.0) for row in good.report.layers if row.error_before is not None]
    assert sum(after for _, after in errors) < 0.7 * sum(before for before, _ in errors)
    assert again.report == good.report
    assert again.graph.text() == good.graph.text()


def test_a_residual_sum_takes_back_the_error_of_its_other_side() -> None:
    """Only the stem is pruned; the layer on the other branch mends what the stem does to the sum of both."""
    graph, feeds = net(0)[1], normal_feeds(32)
    assert [joined_to(graph, graph.nodes[f"{name}_node"]) for name in ("back", "inner", "stem")] == ["stem", "", ""]
    pruned = prune(graph, feeds[:24], target=TINY, options=PruneOptions.parse("stem*@unstructured=40%,rows=1024")).graph
    names, errors = ["stem", "sum"], np.zeros(2)
    for feed in feeds[24:]:
        dense, now = (tensor_runner(each, names)(feed) for each in (graph, pruned))
        errors += [float(((now[name] - dense[name]) ** 2).sum()) for name in names]
    assert errors[1] < 0.85 * errors[0]


def summing_matrix(graph: Graph, name: str) -> Array:
    """[K, N]: a layer's weights in the order in which the array sums."""
    site = find_sites(graph)[name]
    return site.matrix(graph)[0, site.summing_order]


def normal_feeds(count: int) -> list[dict[str, Array]]:
    random = np.random.default_rng(1)
    return [{"x": random.normal(0, 4, (1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("spec", ["2:4", "block=50%", "unstructured=60%"])
def test_patterns(spec: str) -> None:
    """The pattern holds where it was asked for; the refitted network is far closer to the dense one than plain magnitude, on other samples."""
    graph, feeds = net(0)[1], normal_feeds(48)
    layers = f"{spec},skip=stem*,onnx/logits@1:4,skip=*hidden*"
    pruned = prune(graph, feeds[:32], target=TINY, options=PruneOptions.parse(f"{layers},rows=1024"))
    names = {row.name: row.pattern for row in pruned.report.layers if row.pattern}
    assert names == {"inner_node": spec, "back_node": spec, "squeeze_node": spec, "gate_node": names["gate_node"], "logits_node": "1:4"}
    for name, pattern in names.items():
        there = summing_matrix(pruned.graph, name) != 0
        if ":" in pattern:
            assert max(there[start : start + 4].sum(axis=0).max() for start in range(0, len(there), 4)) == int(pattern[0])
        elif pattern.startswith("block"):
            blocks = [there[i : i + 4, j : j + 4].any() for i in range(0, len(there), 4) for j in range(0, there.shape[1], 4)]
            assert sum(blocks) == len(blocks) - round(0.5 * len(blocks))
        else:
            assert there.sum() == there.size - round(0.6 * there.size)
    plain = prune(graph, feeds[:1], target=TINY, options=PruneOptions.parse(f"{layers},criterion=magnitude,repair=no"))
    meter = OutputMeter(graph, feeds[32:])
    assert meter.error(pruned.graph) < 0.8 * meter.error(plain.graph)


def test_repair_beats_magnitude_on_a_trained_network() -> None:
    """2:4 on every layer of the bundled network: repaired it errs little more than the dense one, by magnitude alone it is lost."""
    feeds, shapes = bind_shapes(demo.MODEL, demo.CALIBRATION, {})
    assert feeds is not None
    graph = float_graph(demo.MODEL, shapes)
    ports = [Port(name, graph.tensors[name].shape, graph.tensors[name].dtype) for name in graph.inputs]
    samples = list(open_dataset(demo.SAMPLES, ports, limit=200).samples())

    def accuracy(pruned: Graph) -> float:
        infer = tensor_runner(pruned, pruned.outputs)
        return float(np.mean([infer(sample.feed)[pruned.outputs[0]].argmax() == np.asarray(sample.labels).item() for sample in samples]))

    specs = ("2:4,samples=24,rows=2048", "2:4,samples=2,criterion=magnitude,repair=no,arrange=no")
    repaired, plain = (accuracy(prune(graph, feeds, target=TINY, options=PruneOptions.parse(spec)).graph) for spec in specs)
    assert accuracy(graph) > 0.9
    assert repaired > accuracy(graph) - 0.02, repaired
    assert plain < accuracy(graph) - 0.2, plain


@pytest.mark.parametrize("spec", ["channels=10%", "unstructured=30%"])
def test_zeros_that_are_there_stay(spec: str) -> None:
    """An already sparse layer is refitted on its own pattern, and its zeros count as pruned."""
    graph = net(0)[1]
    data = graph.tensors["w_inner"].data
    assert data is not None
    data[:, ::3] = 0
    pruned = prune(graph, normal_feeds(16), target=TINY, options=PruneOptions.parse(f"{spec},rows=512"))
    row = next(row for row in pruned.report.layers if row.name == "inner_node")
    assert row.kept <= row.weights == np.count_nonzero(data) < data.size
    if not row.pattern:
        return
    now = pruned.graph.tensors[pruned.graph.nodes["inner_node"].inputs[1]].data
    assert now is not None
    assert not now[:, ::3].any()
    assert row.kept == row.weights  # a third of the weights is zero: 30 % need no more


def test_a_cycle_budget_is_met_by_the_package() -> None:
    """By the program that leaves the compiler with default options, 16 bits and all, against that of the dense model."""
    model = to_onnx(net(0)[1])
    whole, pruned = (npucc.compile(model, TINY, calibration=normal_feeds(16), prune=spec) for spec in (None, "cycles=0.7,rows=256"))
    report = pruned.pruned
    assert report is not None
    assert (report["stopped"], report["compiled"]) == ("cycles", True)
    assert (report["cycles"], report["cycles_kept"]) == (whole.report.cycles, pruned.report.cycles)
    assert pruned.report.cycles <= 0.7 * whole.report.cycles
    assert any(row["remedy"].startswith("16 bits by measurement") for row in (whole.quantized or {})["tensors"])


def test_a_cycle_budget_out_of_reach() -> None:
    report = prune(float_graph(little(), {}), little_feeds(8), target=TINY, options=PruneOptions.parse("cycles=0.01,rows=256")).report
    assert report.stopped == "every family is as small as allowed"
    assert 0.01 * report.cycles < report.cycles_kept < report.cycles


def test_a_drop_budget_holds_on_the_samples() -> None:
    graph, feeds = float_graph(little(), {}), little_feeds(16)
    none, some, all_of_it = (
        prune(graph, feeds, target=TINY, options=PruneOptions.parse(f"cycles=0.4,drop={drop},rows=256")).report for drop in (0, 0.15, 20)
    )
    assert [report.stopped for report in (none, some, all_of_it)] == ["drop", "drop", "cycles"]
    assert none.loss == 0 < (some.loss or 0) <= 0.15 < (all_of_it.loss or 0)
    assert none.cycles_kept > some.cycles_kept > all_of_it.cycles_kept
    assert all_of_it.cycles_kept <= 0.4 * all_of_it.cycles


def test_a_drop_budget_chooses_layers() -> None:
    """Those whose pattern alone harms least for what it saves get it."""
    report = prune(net(0)[1], normal_feeds(16), target=TINY, options=PruneOptions.parse("1:4,drop=1.2,rows=256")).report
    assert report.stopped == "drop"
    assert 0 < (report.loss or 0) <= 1.2
    prices = {row.name: row.error_alone / row.macs for row in report.layers if row.error_alone is not None}
    chosen = [prices[row.name] for row in report.layers if row.pattern]
    others = [prices[row.name] for row in report.layers if not row.pattern and row.name in prices]
    assert chosen
    assert np.median(chosen) < np.median(others)


def test_a_layer_told_to_lose_channels_does() -> None:
    report = prune(net(0)[1], normal_feeds(8), target=TINY, options=PruneOptions.parse("inner*@channels=25%,rows=256")).report
    assert [(row.layers, row.channels, row.kept) for row in report.families] == [(("inner_node",), 12, 9)]
    assert report.stopped == "as told"


def test_compile_prunes() -> None:
    """The whole street: a smaller program, and the report in the package."""
    feeds = little_feeds(8)
    whole, pruned = (npucc.compile(little(), calibration=iter(feeds), prune=spec) for spec in (None, "channels=30%,rows=256"))
    assert pruned.report.macs < 0.71 * whole.report.macs
    assert pruned.report.cycles < whole.report.cycles
    assert whole.pruned is None
    assert pruned.pruned is not None
    assert pruned.pruned["macs_kept"] == pruned.report.macs
    assert pruned.run(feeds[0]).outputs["logits"].shape == (1, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is no pruning option"),
        ("channels=many", "channels='many' is no number"),
        ("channels=130%", "channels is 1.3"),
        ("4:2", "the pattern is 4:2"),
        ("channels=30%,channels=40%", "the option 'channels' is given twice"),
        ("skip=a", "there is nothing to prune"),
        ("channels=30%,cycles=0.5", "both channels and cycles are given"),
        ("channels=30%,drop=1", "drop is 1"),
        ("cycles=0.7,2:4,drop=1", "drop is given for both"),
        ("block=100%", "the pattern is block=100%"),
        ("2:4,block=50%", "the option 'pattern' is given twice"),
        ("a*@cycles=0.5", "'a[*]@cycles=0.5' is no pruning option"),
        ("a*@channels=2", "channels is 2"),
        ("2:4,skip=", "'skip=' is no pruning option"),
        ("2:4,criterion=luck", "there is no criterion 'luck'"),
        ("2:4,repair=maybe", "repair='maybe' is neither yes nor no"),
        ("2:4,samples=0", "samples is 0"),
    ],
)
def test_faulty_specs(spec: str, message: str) -> None:
    with pytest.raises(npucc.PruneError, match=message):
        PruneOptions.parse(spec)


def test_parse() -> None:
    assert PruneOptions.parse("channels=30%, 2:4, skip=a*, skip=b") == PruneOptions(channels=0.3, pattern=NeighbourPattern(2, 4), skip=("a*", "b"))
    own = (("a/b:0", BlockPattern(0.5)), ("c*", 0.25), ("*", BlockPattern(0.6, 1, 1)))
    assert PruneOptions.parse("a/b:0@block=50%,c*@channels=25%,*@unstructured=0.6").layers == own
    assert PruneOptions.parse("cycles=0.7,drop=0.5") == PruneOptions(cycles=0.7, drop=0.5)
