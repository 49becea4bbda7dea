"""How long a model of many nodes takes to compile: the time should grow as the number of nodes does.

    python -m tests.benchmarks.scaling [--nodes 500 1000 2000 5000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto

import npucc
from tests.npucc.onnx_models import integers, model, node


def chain(count: int) -> ModelProto:
    """Blocks of eight nodes in a row: convolution, residual, gate, pool, transpose."""
    random, nodes, constants, x = np.random.default_rng(0), [], {}, "x"
    for i in range(max(1, count // 8)):
        constants[f"w{i}"] = random.normal(0, 0.3, (8, 8, 1, 1)).astype(np.float32)
        nodes += [
            node("Conv", f"{x} w{i}", f"c{i}"), node("Relu", f"c{i}", f"r{i}"), node("Add", f"r{i} {x}", f"a{i}"), node("Sigmoid", f"a{i}", f"s{i}"),
            node("Mul", f"a{i} s{i}", f"m{i}"), node("AveragePool", f"m{i}", f"p{i}", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Transpose", f"p{i}", f"t{i}", perm=[0, 1, 3, 2]), node("Tanh", f"t{i}", f"y{i}"),
        ]  # fmt: skip
        x = f"y{i}"
    return model(nodes, {"x": (1, 8, 6, 6)}, [x], constants)


def branches(count: int) -> ModelProto:
    """Branches of four nodes from one input, every fourth over the host, all joined in one Concat."""
    random, nodes, constants = np.random.default_rng(0), [], {"axes": integers([1, 2])}
    for i in range(max(2, count // 4)):
        constants[f"k{i}"] = random.normal(size=()).astype(np.float32)
        last = node("Det", f"h{i}", f"d{i}") if i % 4 == 0 else node("ReduceMean", f"h{i} axes", f"d{i}", keepdims=0)
        nodes += [node("Mul", f"x k{i}", f"m{i}"), node("Tanh", f"m{i}", f"h{i}"), last, node("Add", f"d{i} k{i}", f"e{i}")]
    nodes.append(node("Concat", " ".join(f"e{i}" for i in range(len(nodes) // 4)), "y", axis=0))
    return model(nodes, {"x": (1, 4, 4)}, ["y"], constants, opset=18)


SHAPES: tuple[Callable[[int], ModelProto], ...] = (chain, branches)


def seconds(proto: ModelProto, **options: Any) -> float:
    """Processor time of one compilation."""
    sizes = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(1).normal(size=sizes).astype(np.float32)}
    begin = time.process_time()
    npucc.compile(proto, calibration=[feed], **options)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[500, 1000, 2000, 5000])
    chosen = parser.parse_args()
    seconds(chain(8))  # what the first compilation loads
    for shape in SHAPES:
        for count in chosen.nodes:
            proto = shape(count)
            nodes, spent = len(proto.graph.node), seconds(proto)
            print(f"{shape.__name__:9} {nodes:6,} nodes {spent:7.2f} s {1e3 * spent / nodes:6.2f} ms per node", flush=True)


if __name__ == "__main__":
    main()
