"""Random small networks: after import and after all passes they yield what the model yields in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto

from tests.npucc.onnx_models import assert_agrees, integers, model, node

UNARY = ["Relu", "Sigmoid", "Tanh", "HardSigmoid", "LeakyRelu", "Abs", "Identity", "HardSwish", "Neg", "Clip"]
BINARY = ["Add", "Sub", "Mul", "Max", "Min"]
STEPS = [
    "unary",
    "unary",
    "scalar",
    "scalar",
    "channel",
    "channel",
    "binary",
    "binary",
    "conv",
    "conv",
    "depthwise",
    "norm",
    "pool",
    "pad",
    "move",
    "softmax",
    "layer_norm",
    "line",
    "concat",
]


class RandomNet:
    """A network that grows by random steps; every tensor is [1, C, H, W]. Choices are drawn, weights come from a fixed seed."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.random = np.random.default_rng(0)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"x": (1, 4, 5, 6)}

    def pick(self, choices: list[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def tensor(self) -> str:
        """Mostly a recent tensor."""
        names = list(self.shapes)
        return str(self.pick(names[-3:] if self.draw(st.booleans()) else names))

    def constant(self, *shape: int) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = self.random.normal(0.3, 0.7, shape).astype(np.float32)
        return name

    def add(self, operator: str, inputs: str, shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(node(operator, inputs, name, **attributes))
        if len(shape) == 4 and shape[0] == 1:
            self.shapes[name] = shape
        return name

    def step(self) -> None:
        x = self.tensor()
        getattr(self, self.pick(STEPS))(x, self.shapes[x])

    def unary(self, x: str, shape: tuple[int, ...]) -> None:
        self.add(self.pick(UNARY), x, shape)

    def scalar(self, x: str, shape: tuple[int, ...]) -> None:
        operands = [x, self.constant(*self.pick([(), (1,), (1, 1, 1)]))]
        operator = self.pick(BINARY)
        self.add(operator, " ".join(operands if self.draw(st.booleans()) else operands[::-1]), shape)

    def channel(self, x: str, shape: tuple[int, ...]) -> None:
        self.add(self.pick(BINARY), f"{x} {self.constant(*self.pick([(shape[1], 1, 1), (shape[3],), (1, *shape[1:])]))}", shape)

    def binary(self, x: str, shape: tuple[int, ...]) -> None:
        fitting = [name for name, other in self.shapes.items() if other == shape]
        self.add(self.pick(BINARY), f"{x} {self.pick(fitting)}", shape)

    def conv(self, x: str, shape: tuple[int, ...]) -> None:
        channels, pad = self.pick([2, 4]), self.pick([0, 1])
        kernel = min(self.pick([1, 3]), shape[2] + 2 * pad, shape[3] + 2 * pad)
        weights = self.constant(channels, shape[1], kernel, kernel)
        bias = f" {self.constant(channels)}" if self.draw(st.booleans()) else ""
        size = [part + 2 * pad - kernel + 1 for part in shape[2:]]
        self.add("Conv", f"{x} {weights}{bias}", (1, channels, size[0], size[1]), pads=[pad] * 4)

    def depthwise(self, x: str, shape: tuple[int, ...]) -> None:
        self.add("Conv", f"{x} {self.constant(shape[1], 1, 1, 1)}", shape, group=shape[1])

    def norm(self, x: str, shape: tuple[int, ...]) -> None:
        statistics = [self.constant(shape[1]) for _ in range(4)]
        self.constants[statistics[3]] = np.abs(self.constants[statistics[3]]) + np.float32(0.1)
        self.add("BatchNormalization", " ".join([x, *statistics]), shape)

    def pool(self, x: str, shape: tuple[int, ...]) -> None:
        kernel = [min(2, size) for size in shape[2:]]
        size = [part - 1 if part > 1 else 1 for part in shape[2:]]
        self.add(self.pick(["MaxPool", "AveragePool"]), x, (1, shape[1], size[0], size[1]), kernel_shape=kernel)

    def pad(self, x: str, shape: tuple[int, ...]) -> None:
        pads = self.constant(8)
        self.constants[pads] = integers([0, 0, 1, 0, 0, 0, 0, 1])
        value = self.constant()
        self.constants[value] = np.float32(self.pick([0.0, -np.inf]))
        padded = self.add("Pad", f"{x} {pads} {value}", (0,))
        operator = "MaxPool" if np.isneginf(self.constants[value]) else self.pick(["MaxPool", "AveragePool"])
        self.add(operator, padded, shape, kernel_shape=[2, 2])

    def move(self, x: str, shape: tuple[int, ...]) -> None:
        order = self.pick([[0, 2, 3, 1], [0, 3, 1, 2], [0, 1, 3, 2], [0, 2, 1, 3]])
        self.add("Transpose", x, tuple(shape[axis] for axis in order), perm=order)

    def softmax(self, x: str, shape: tuple[int, ...]) -> None:
        """Written out."""
        axis = self.pick([1, 3])
        largest = self.add("ReduceMax", x, (0,), axes=[axis])
        exponential = self.add("Exp", self.add("Sub", f"{x} {largest}", (0,)), (0,))
        total = self.constant(1)
        self.constants[total] = integers([axis])
        self.add("Div", f"{exponential} {self.add('ReduceSum', f'{exponential} {total}', (0,))}", shape)

    def layer_norm(self, x: str, shape: tuple[int, ...]) -> None:
        """Written out, over one axis or the last two."""
        axes = self.pick([[1], [3], [2, 3]])
        epsilon, two = self.constant(), self.constant()
        self.constants |= {epsilon: np.float32(0.1), two: np.float32(2)}
        mean = self.add("ReduceMean", x, (0,), axes=axes)
        centered = self.add("Sub", f"{x} {mean}", (0,))
        variance = self.add("ReduceMean", self.add("Pow", f"{centered} {two}", (0,)), (0,), axes=axes)
        deviation = self.add("Sqrt", self.add("Add", f"{variance} {epsilon}", (0,)), (0,))
        scaled = self.add("Div", f"{centered} {deviation}", shape)
        if self.draw(st.booleans()):
            scaled = self.add("Mul", f"{scaled} {self.constant(shape[3])}", shape)
            self.add("Add", f"{scaled} {self.constant(shape[3])}", shape)

    def line(self, x: str, shape: tuple[int, ...]) -> None:
        """A 1-D convolution over the flattened image."""
        flat = self.constant(3)
        self.constants[flat] = integers([1, shape[1], shape[2] * shape[3]])
        back = self.constant(4)
        self.constants[back] = integers(shape)
        hidden = self.add("Reshape", f"{x} {flat}", (0,))
        hidden = self.add("Conv", f"{hidden} {self.constant(shape[1], shape[1], 3)}", (0,), pads=[1, 1])
        hidden = self.add("Relu", self.add("Add", f"{hidden} {self.constant(shape[1], 1)}", (0,)), (0,))
        self.add("Reshape", f"{hidden} {back}", shape)

    def concat(self, x: str, shape: tuple[int, ...]) -> None:
        self.add("Relu", self.add("Concat", f"{x} {x}", (0,), axis=1), (1, 2 * shape[1], *shape[2:]))

    def finish(self) -> ModelProto:
        """The last tensor is an output, and perhaps another one."""
        last = next(reversed(self.shapes))
        if last == "x":
            last = self.add("Relu", "x", self.shapes["x"])
        computed = [name for name in self.shapes if name != "x"]
        outputs = list(dict.fromkeys([last, self.pick(computed)]))
        return model(self.nodes, {"x": self.shapes["x"]}, outputs, self.constants, opset=14)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_networks_keep_their_values(data: st.DataObject) -> None:
    net = RandomNet(data)
    for _ in range(data.draw(st.integers(2, 12))):
        net.step()
    assert_agrees(net.finish(), tolerance=2e-4)
