"""The metamorphic test: targets, scratchpad sizes, fusion and interleaving change the program, never a byte of the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from isa.program import unroll
from isa.target import Target, load_target
from npucc import reference
from npucc.errors import CompileError
from npucc.graph import Graph
from npucc.lowering import lower
from runtime import Machine

from .integer_graphs import GRAPHS, Net

EDGE = load_target("edge")
TARGETS = {
    "edge": EDGE,
    "cube": load_target("cube"),
    "tiny": load_target("tiny"),
    "7x5": replace(EDGE, name="7x5", rows=7, cols=5, spm_bytes=12001, acc_bytes=1000),
    **{mode: replace(EDGE, name=mode, requantize=mode) for mode in ("q31.rne", "q31.tosa", "q31.tfl")},
    "starved": replace(EDGE, name="starved", rows=3, cols=2, spm_bytes=2048, acc_bytes=256, dataflow="os", shadow_weights=False),
}


def inputs_for(graph: Graph) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {name: random.normal(0, 2, graph.tensors[name].shape).astype(np.float32) for name in graph.inputs}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("name", GRAPHS)
def test_the_machine_equals_the_integer_reference(name: str, target: Target) -> None:
    graph = GRAPHS[name](Net(3))
    if name in ("sixteen_bits", "widths_in_turn") and target.name == "starved":
        with pytest.raises(CompileError, match=r"does not fit|fits in 2048 bytes"):  # an int16 table alone takes 2,050 bytes
            lower(graph, target)
        return
    feeds = inputs_for(graph)
    expected = reference.run(graph, feeds, requantize=target.requantize)
    for share in (0.0, 0.6):
        lowered = lower(graph, target, shares=(share,))
        result = Machine(lowered.program, lowered.constants).run(feeds, dump=True)
        for tensor, stored in {**result.tensors, **result.raw}.items():
            np.testing.assert_array_equal(stored, expected[tensor], err_msg=f"{tensor} with {share} of the scratchpad for tensors")


@pytest.mark.parametrize("name", GRAPHS)
def test_fusion_and_order_change_no_byte(name: str) -> None:
    graph = GRAPHS[name](Net(4))
    feeds = inputs_for(graph)
    plain = lower(graph, TARGETS["tiny"], fuse=False, shares=(0.0,))
    expected = Machine(plain.program, plain.constants).run(feeds).raw
    fused = lower(graph, TARGETS["tiny"], shares=(0.5,))
    machine = Machine(fused.program, fused.constants)
    for seed in range(3):
        result = machine.run(feeds, order="random", seed=seed).raw
        for tensor, stored in expected.items():
            np.testing.assert_array_equal(result[tensor], stored, err_msg=f"{tensor}, order {seed}")


def test_phases_of_a_transposed_convolution_that_see_the_same_inputs_pass_the_array_together() -> None:
    """Kernel and step 2×2: four results per input, 28 output channels of one product, then one requantization for each of the four."""
    graph = GRAPHS["transposed"](Net(3))
    layer = next(layer for layer in lower(graph, EDGE, shares=(0.0,)).program.layers if layer.macs == 5 * 7 * 4 * 4 * 6)
    names = [line.name for line, _ in unroll(layer.body)]
    assert (names.count("conv"), names.count("requant")) == (1, 4)
