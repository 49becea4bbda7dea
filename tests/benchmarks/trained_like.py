"""Networks of the shapes of ResNet-50 and MobileNetV2 with the statistics of trained ones, and images for them.

    python -m tests.benchmarks.trained_like {resnet50,mobilenetv2} OUTPUT.onnx [--size 96]

writes OUTPUT.calibration.npz and OUTPUT.data.npz, too, for `accuracy.py`.

Random weights are too kind to a quantizer: these have heavy tails (Student's t with five degrees of freedom), channels a hundred times louder
than others that matter as much, channels that are dead, and batch normalization by the statistics of the data, as training leaves it.
And they are too unkind, because a deep random network amplifies any noise while a trained one damps it (Arora et al., Stronger Generalization
Bounds for Deep Nets, ICML 2018): gradient steps add inputs to the weights, so here each weight is in part a random sum of inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 8  # that the statistics are taken from
TAIL = 5  # degrees of freedom of the weights
LEARNT, PATCHES = 0.25, 64  # share of the weights' energy that is sums of inputs, and of how many
IMBALANCE = 100.0  # of the loudest channel over the faintest
LOUDEST_6 = 2.0  # deviation before a ReLU6, most of which is not clipped
COMPENSATION = 0.5  # how far the weights behind make up for it, as a power: 1 would make the faintest channel matter as much as the loudest
BRANCH = 0.3  # of a residual branch over the sum it is added to: what one block adds is little
DEAD = 0.05  # share of channels


def images(count: int, size: int, *, seed: int = 0) -> list[dict[str, Array]]:
    """Feeds of smooth random colour fields with edges and some noise."""
    generator = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        coarse = generator.normal(0, 1, (3, 6, 6)).repeat(-(-size // 6), 1).repeat(-(-size // 6), 2)[:, :size, :size]
        waves = np.sin(np.linspace(0, generator.uniform(3, 30), size))[None, :, None] * generator.normal(0, 1, (3, 1, 1))
        feeds.append({"image": (coarse + waves + generator.normal(0, 0.1, coarse.shape))[None].astype(np.float32)})
    return feeds


class Network:
    """An ONNX model in the making; `values` holds every tensor for a batch of samples, so that each layer meets real inputs."""

    def __init__(self, size: int, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.values = {"image": np.concatenate([feed["image"] for feed in images(SAMPLES, size, seed=seed + 1)])}
        self.loudness = {"image": np.ones(3)}  # of each channel: what its readers expect
        self.size = size

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node of one output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        node = helper.make_node(op, inputs, [name], name=name, **attributes)
        self.nodes.append(node)
        known = {key: self.values.get(key, self.constants.get(key)) for key in inputs}
        self.values[name] = run_node(node, {key: value for key, value in known.items() if value is not None})
        return name

    def constant(self, stem: str, value: Array) -> str:
        name = f"{stem}_{len(self.nodes)}"
        self.constants[name] = np.asarray(value, np.float32)
        return name

    def spread(self, channels: int) -> Array:
        """How loud each of so many channels is next to the loudest, down to a hundredth."""
        return np.exp(self.generator.uniform(-1, 0, channels) * np.log(IMBALANCE))

    def convolution(
        self, source: str, channels: int, kernel: int, *, stride: int = 1, groups: int = 1, loudness: Array | None = None, loudest: float = 10.0
    ) -> str:
        """Convolution and batch normalization. `loudest`: among the channels, unless each has its `loudness`."""
        depth = self.values[source].shape[1] // groups
        weights = self.generator.standard_t(TAIL, (channels, depth, kernel, kernel)) / np.sqrt(depth * kernel * kernel)
        learnt = self.learnt(source, channels, kernel, groups)
        learnt *= np.sqrt(np.square(weights).mean() / np.maximum(np.square(learnt).mean(axis=(1, 2, 3), keepdims=True), 1e-30))
        weights = np.sqrt(1 - LEARNT) * weights + np.sqrt(LEARNT) * learnt
        expected = self.loudness[source] ** COMPENSATION
        weights /= expected[:, None, None, None] if groups > 1 else expected[None, :, None, None]
        pads = [kernel // 2] * 4
        inputs = [source, self.constant("weights", weights)]
        result = self.add("Conv", inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=groups)
        value = self.values[result]
        loud = self.spread(channels) * loudest if loudness is None else loudness
        gamma, beta = loud * self.generator.uniform(0.7, 1.4, channels), loud * self.generator.normal(0, 0.4, channels)
        dead = self.generator.random(channels) < DEAD
        gamma[dead], beta[dead] = 1e-6, -1e-3
        statistics = (value.mean(axis=(0, 2, 3)), value.var(axis=(0, 2, 3)) + 1e-9)
        constants = [self.constant(stem, each) for stem, each in zip(("gamma", "beta", "mean", "variance"), (gamma, beta, *statistics), strict=True)]
        normal = self.add("BatchNormalization", [result, *constants])
        self.loudness[normal] = loud
        return normal

    def learnt(self, source: str, channels: int, kernel: int, groups: int) -> Array:
        """[channels, depth, kernel, kernel]: random sums of what the kernel meets in the samples, less its mean, all channels equally loud."""
        around = kernel // 2
        value = self.values[source] / self.loudness[source][:, None, None]
        padded = np.pad(value, ((0, 0), (0, 0), (around, around), (around, around)))
        height, width = (size - kernel + 1 for size in padded.shape[2:])
        places = zip(*(self.generator.integers(0, end, PATCHES) for end in (len(padded), height, width)), strict=True)
        patches = np.stack([padded[sample, :, y : y + kernel, x : x + kernel] for sample, y, x in places])
        patches = (patches - patches.mean(axis=0)).reshape(PATCHES, groups, -1).swapaxes(0, 1)
        sums = self.generator.standard_normal((groups, channels // groups, PATCHES)) @ patches
        return np.asarray(sums.reshape(channels, -1, kernel, kernel))

    def activation(self, source: str, op: str = "Relu") -> str:
        inputs = [source] if op == "Relu" else [source, self.constant("low", np.array(0.0)), self.constant("high", np.array(6.0))]
        result = self.add(op, inputs)
        self.loudness[result] = self.loudness[source]
        return result

    def total(self, first: str, second: str) -> str:
        result = self.add("Add", [first, second])
        self.loudness[result] = self.loudness[first]
        return result

    def classifier(self, source: str, classes: int) -> None:
        mean = self.add("GlobalAveragePool", [source])
        flat = self.add("Flatten", [mean])
        weights = self.generator.standard_t(TAIL, (self.values[flat].shape[1], classes)) / self.loudness[source][:, None] ** COMPENSATION
        self.add("Gemm", [flat, self.constant("weights", weights), self.constant("bias", np.zeros(classes))])

    def model(self) -> onnx.ModelProto:
        last = self.nodes[-1].output[0]
        classes = self.values[last].shape[1]
        ports = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("image", [1, 3, self.size, self.size]), (last, [1, classes]))
        ]
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "trained_like", ports[:1], ports[1:], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def run_node(node: onnx.NodeProto, values: dict[str, Array]) -> Array:
    """One node in onnxruntime."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in values.items()]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([node], "one", inputs, [output]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, values)[0])


def resnet(depths: Sequence[int], width: int, *, size: int, classes: int, seed: int = 0) -> onnx.ModelProto:
    """Bottleneck residual stages; (3, 4, 6, 3) and 64 are ResNet-50's."""
    net = Network(size, seed)
    x = net.add("MaxPool", [stem := net.activation(net.convolution("image", width, 7, stride=2))], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    net.loudness[x] = net.loudness[stem]
    for stage, depth in enumerate(depths):
        inner, outer = width << stage, 4 * width << stage
        loudness = net.spread(outer)
        for block in range(depth):
            stride = 2 if stage and not block else 1
            y = net.activation(net.convolution(x, inner, 1))
            y = net.activation(net.convolution(y, inner, 3, stride=stride))
            y = net.convolution(y, outer, 1, loudness=BRANCH * loudness)
            x = net.activation(net.total(x if block else net.convolution(x, outer, 1, stride=stride, loudness=loudness), y))
    net.classifier(x, classes)
    return net.model()


def mobilenet(stages: Sequence[tuple[int, int, int, int]], *, size: int, classes: int, seed: int = 0) -> onnx.ModelProto:
    """Inverted residuals, (expansion, channels, blocks, stride) each, with ReLU6."""
    net = Network(size, seed)
    x = net.activation(net.convolution("image", 32, 3, stride=2, loudest=LOUDEST_6), "Clip")
    for expansion, channels, blocks, first in stages:
        loudness = net.spread(channels)
        for block in range(blocks):
            inner = net.values[x].shape[1] * expansion
            y = net.activation(net.convolution(x, inner, 1, loudest=LOUDEST_6), "Clip") if expansion > 1 else x
            y = net.activation(net.convolution(y, inner, 3, stride=1 if block else first, groups=inner, loudest=LOUDEST_6), "Clip")
            y = net.convolution(y, channels, 1, loudness=(BRANCH if block else 1) * loudness)
            x = net.total(x, y) if block else y
    x = net.activation(net.convolution(x, 4 * net.values[x].shape[1], 1, loudest=LOUDEST_6), "Clip")
    net.classifier(x, classes)
    return net.model()


MOBILENET_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

FULL_SIZE: Mapping[str, Callable[[int], onnx.ModelProto]] = {
    "resnet50": lambda size: resnet((3, 4, 6, 3), 64, size=size, classes=1000),
    "mobilenetv2": lambda size: mobilenet(MOBILENET_V2, size=size, classes=1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=FULL_SIZE)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=96)
    args = parser.parse_args()
    model = FULL_SIZE[args.network](args.size)
    onnx.save(model, args.output)
    for stem, count, seed in (("calibration", 32, 100), ("data", 24, 200)):
        pictures = [feed["image"] for feed in images(count, args.size, seed=seed)]
        np.savez(args.output.with_suffix(f".{stem}.npz"), image=np.concatenate(pictures))


if __name__ == "__main__":
    main()
