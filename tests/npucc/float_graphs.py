"""Small float graphs for the tests of quantization and evaluation, and the onnxruntime session that is exact on QDQ models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime

from npucc import ops
from npucc.graph import Editor, Graph, Node, Tensor
from npucc.ops import OPS, Attributes

Array = np.ndarray


class FloatNet:
    """Adds nodes one after another; weights come from a seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.editor = Editor(name="net")

    def input(self, name: str, *shape: int, dtype: str = "float32") -> str:
        self.editor.inputs.append(name)
        return self.editor.add_tensor(Tensor(name, shape, dtype))

    def constant(self, name: str, data: Array) -> str:
        return self.editor.add_tensor(Tensor(name, data.shape, str(data.dtype), data))

    def weights(self, name: str, *shape: int) -> str:
        fan_in = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        return self.constant(name, (self.random.normal(0, 1, shape) / np.sqrt(fan_in)).astype(np.float32))

    def bias(self, name: str, count: int) -> str:
        return self.constant(name, self.random.normal(0, 0.2, count).astype(np.float32))

    def op(self, op: str, inputs: Sequence[str], result: str, attributes: Attributes | None = None, *, dtype: str = "float32") -> str:
        attributes = attributes or OPS[op].attributes()
        shape = OPS[op].shape(attributes, [self.editor.tensors[name].shape for name in inputs])
        assert shape is not None
        self.editor.add_tensor(Tensor(result, tuple(shape), dtype))
        self.editor.add_node(Node(f"{result}_node", op, tuple(inputs), (result,), attributes, (f"onnx/{result}",)))
        return result

    def graph(self, *outputs: str) -> Graph:
        self.editor.outputs = list(outputs)
        return self.editor.freeze()


def classifier(seed: int = 0) -> Graph:
    """Convolution, depthwise convolution, hard-swish, residual, pooling, resize, concat, dense, softmax."""
    net = FloatNet(seed)
    net.input("x", 1, 3, 16, 16)
    net.op("conv", ["x", net.weights("w1", 8, 3, 3, 3), net.bias("b1", 8)], "stem", ops.Conv(pads=(1, 1, 1, 1), clamp=(0.0, 6.0)))
    net.op("conv", ["stem", net.weights("w2", 8, 1, 3, 3)], "depthwise", ops.Conv(pads=(1, 1, 1, 1), groups=8))
    net.op("table", ["depthwise"], "swish", ops.Table(("hard_swish", "x")))
    net.op("add", ["stem", "swish"], "sum")
    net.op("max_pool", ["sum"], "pooled", ops.Pool((2, 2), (2, 2)))
    net.op("interpolate", ["pooled"], "large", ops.Interpolate("half_pixel", (16, 16), (2.0, 2.0)))
    net.op("mul", ["swish", net.constant("five", np.full((1, 1, 1, 1), 5, np.float32))], "loud")
    net.op("concat", ["large", "swish", "loud"], "joined", ops.Concat(1))
    net.op("reduce_mean", ["joined"], "mean", ops.Reduce((2, 3)))
    net.op("reshape", ["mean"], "flat", ops.Reshape((1, 24)))
    net.op("matmul", ["flat", net.weights("w3", 24, 10), net.bias("b3", 10)], "logits")
    net.op("softmax", ["logits"], "probabilities")
    return net.graph("logits", "probabilities")


def classifier_feeds(count: int = 16) -> list[dict[str, Array]]:
    return [{"x": np.random.default_rng(seed).normal(0, 1, (1, 3, 16, 16)).astype(np.float32)} for seed in range(count)]


def exact_session(model: onnx.ModelProto, *, option: str = "session.x64quantprecision") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(option, "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
