"""Make the example network that is bundled with npucc, and its data.

The script needs nothing but numpy, PyTorch, onnx and onnxruntime.  (npucc itself
does not need PyTorch; only this script does.)  Everything is made from a seed:

1. a synthetic data set: small colour images of ten kinds of shapes, drawn with
   numpy, with random place, size, tilt, colour, blur, occlusion, clutter and noise;
2. a small network of the building blocks that edge networks are made of:
   convolutions with batch normalisation and ReLU6, inverted residuals, a
   squeeze-and-excite, hard swish, a two-branch Concat, pooling, a Gemm head;
3. the trained network as ONNX, with its batch normalisations left as they are
   (folding them is the compiler's work), checked against PyTorch;
4. labelled test samples and unlabelled calibration samples.

Run it from the repository with

    python examples/train_demo.py

It writes three files into ``npucc/demo``:

* ``shapes.onnx``             the network: input ``image``, output ``logits``
* ``shapes.npz``              test samples: ``image`` and ``labels``
* ``shapes_calibration.npz``  calibration samples: ``image``

A run is repeatable to the byte on one kind of machine with one set of versions.
Elsewhere the images are the same but for the rounding of a few pixels, and the
trained weights are others of about the same accuracy, because floating-point sums
are ordered differently.
"""

from __future__ import annotations

import argparse
import io
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

SIZE = 32  # height and width of an image, in pixels
CHANNELS = 3
TRAIN_SAMPLES = 16_000  # drawn anew for every epoch
TEST_SAMPLES = 400
CALIBRATION_SAMPLES = 64
BATCH = 32

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "npucc" / "demo"


# --------------------------------------------------------------------------- #
# 1. The data set
# --------------------------------------------------------------------------- #
#
# A shape is a function of two coordinates.  It returns roughly the distance to the
# outline, negative inside.  The shapes fill about the unit circle.


def disc(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.hypot(u, v) - 0.85


def ring(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.abs(np.hypot(u, v) - 0.70) - 0.20


def square(u: FloatArray, v: FloatArray) -> FloatArray:
    return bar(u, v, 0.75, 0.75)


def frame(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.62) - 0.18


def triangle(u: FloatArray, v: FloatArray) -> FloatArray:
    slope = np.float32(np.sqrt(3.0) / 2.0)
    return np.asarray(np.maximum(slope * np.abs(u) - 0.5 * v, v) - 0.5)


def cross(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.asarray(np.minimum(bar(u, v, 0.95, 0.27), bar(u, v, 0.27, 0.95)))


def star(u: FloatArray, v: FloatArray) -> FloatArray:
    """Five points: fold the plane into one half point, then one straight edge."""
    sector = 2.0 * np.pi / 5.0
    angle = np.abs(np.mod(np.arctan2(v, u), sector) - 0.5 * sector)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    inner = 0.42
    edge = np.array([inner * np.cos(0.5 * sector) - 1.0, inner * np.sin(0.5 * sector)])
    edge /= np.hypot(edge[0], edge[1])
    return np.asarray((along - 1.0) * edge[1] - across * edge[0])


def crescent(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.45, v)))


def stripes(u: FloatArray, v: FloatArray) -> FloatArray:
    two = np.minimum(bar(u - 0.62, v, 0.17, 0.85), bar(u + 0.62, v, 0.17, 0.85))
    return np.asarray(np.minimum(two, bar(u, v, 0.17, 0.85)))


def angle_iron(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.asarray(np.minimum(bar(u + 0.52, v, 0.23, 0.80), bar(u, v - 0.57, 0.75, 0.23)))


def bar(u: FloatArray, v: FloatArray, half_width: float, half_height: float) -> FloatArray:
    """An upright rectangle; a part of several shapes."""
    return np.asarray(np.maximum(np.abs(u) - half_width, np.abs(v) - half_height))


SHAPES: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "disc": disc,
    "ring": ring,
    "square": square,
    "frame": frame,
    "triangle": triangle,
    "cross": cross,
    "star": star,
    "crescent": crescent,
    "stripes": stripes,
    "angle": angle_iron,
}


class Conditions(NamedTuple):
    """How hard the images are to read."""

    contrast: tuple[float, float]  # least and greatest distance from the background
    occluded: float  # part of the images that have a bar across the shape
    bar: tuple[float, float]  # least and greatest half width of that bar, in pixels


# The network is trained in good conditions and used, as networks are, in poorer ones:
# the test and calibration images are fainter and more often occluded.  USE was chosen,
# with the trained network at hand, so that about one image in twenty is read wrong: a
# network that is always right hides what int8 costs.
TRAINING = Conditions(contrast=(0.3, 0.9), occluded=0.4, bar=(0.6, 1.8))
USE = Conditions(contrast=(0.22, 0.65), occluded=0.6, bar=(0.7, 2.0))


def draw_samples(count: int, seed: Sequence[int], conditions: Conditions) -> tuple[FloatArray, IntArray]:
    """Draw ``count`` images [count, 3, 32, 32] and their classes, from a seed."""
    rng = np.random.default_rng(list(seed))
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(SHAPES))

    image = draw_background(rng, count)
    for _ in range(3):
        image = draw_clutter(rng, image)
    image = draw_shape(rng, image, labels, conditions)
    image = draw_occluder(rng, image, conditions)
    image = np.asarray(image + draw_noise(rng, count), dtype=np.float32)
    return to_levels(image), labels


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> FloatArray:
    """Uniform float32 numbers of a shape."""
    return rng.uniform(low, high, shape).astype(np.float32)


def coordinates(centre: FloatArray, angle: FloatArray, radius: FloatArray, aspect: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Pixel coordinates [N, 32, 32] as seen by a moved, turned and scaled shape.

    ``centre`` is [N, 2] in pixels from the middle; the others are [N].
    """
    axis = np.arange(SIZE, dtype=np.float32) - 0.5 * (SIZE - 1)
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    stretch = np.sqrt(aspect)[:, None, None]
    u = (cos * x + sin * y) / radius[:, None, None] * stretch
    v = (cos * y - sin * x) / radius[:, None, None] / stretch
    return u, v


def paint(image: FloatArray, cover: FloatArray, colour: FloatArray) -> FloatArray:
    """Lay a colour [N, 3] over the images where ``cover`` [N, 32, 32] is 1."""
    alpha = cover[:, None]
    return np.asarray(image * (1.0 - alpha) + colour[:, :, None, None] * alpha, dtype=np.float32)


def draw_background(rng: np.random.Generator, count: int) -> FloatArray:
    """A plain colour, lit from one side."""
    colour = uniform(rng, 0.2, 0.8, count, CHANNELS)
    zero, one = np.zeros((count, 2), np.float32), np.ones(count, np.float32)
    u, _ = coordinates(zero, uniform(rng, 0.0, 2.0 * np.pi, count), one * SIZE, one)
    light = u * uniform(rng, 0.0, 0.4, count)[:, None, None]
    return np.asarray(colour[:, :, None, None] + light[:, None], dtype=np.float32)


def draw_clutter(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    """A small blob or a short stroke somewhere, behind the shape."""
    count = len(image)
    centre = uniform(rng, -16.0, 16.0, count, 2)
    angle = uniform(rng, 0.0, np.pi, count)
    aspect = np.exp(uniform(rng, 0.0, 2.5, count))
    u, v = coordinates(centre, angle, uniform(rng, 1.5, 3.0, count), aspect)
    cover = np.clip(1.5 - np.hypot(u, v), 0.0, 1.0)
    return paint(image, cover, uniform(rng, 0.0, 1.0, count, CHANNELS))


def draw_shape(rng: np.random.Generator, image: FloatArray, labels: IntArray, conditions: Conditions) -> FloatArray:
    """The shape itself: moved, scaled, tilted; sharp or blurred; bright or faint."""
    count = len(image)
    radius = uniform(rng, 6.0, 12.0, count)
    free = np.maximum(0.5 * SIZE - radius, 0.0)  # so that little of it is cut off
    centre = uniform(rng, -1.0, 1.0, count, 2) * free[:, None]
    angle = uniform(rng, -0.5, 0.5, count)
    aspect = np.exp(uniform(rng, -0.2, 0.2, count))
    u, v = coordinates(centre, angle, radius, aspect)

    distance = np.empty_like(u)
    for index, shape in enumerate(SHAPES.values()):
        own = labels == index
        distance[own] = shape(u[own], v[own])
    blur = uniform(rng, 1.0, 3.0, count)
    cover = np.clip(0.5 - distance * (radius / blur)[:, None, None], 0.0, 1.0)

    # The colour lies at a chosen distance from the mean colour of the background.
    direction = rng.normal(size=(count, CHANNELS)).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    contrast = uniform(rng, *conditions.contrast, count)[:, None]
    return paint(image, cover, image.mean(axis=(2, 3)) + contrast * direction)


def draw_occluder(rng: np.random.Generator, image: FloatArray, conditions: Conditions) -> FloatArray:
    """In a part of the images, a bar across everything."""
    count = len(image)
    one = np.ones(count, np.float32)
    centre = uniform(rng, -10.0, 10.0, count, 2)
    u, _ = coordinates(centre, uniform(rng, 0.0, np.pi, count), one, one)
    half_width = uniform(rng, *conditions.bar, count)[:, None, None]
    cover = np.clip(half_width - np.abs(u) + 0.5, 0.0, 1.0)
    cover *= (rng.random(count) < conditions.occluded)[:, None, None]
    return paint(image, cover, uniform(rng, 0.0, 1.0, count, CHANNELS))


def draw_noise(rng: np.random.Generator, count: int) -> FloatArray:
    """Sensor noise, from nearly none to strong."""
    noise = rng.normal(size=(count, CHANNELS, SIZE, SIZE)).astype(np.float32)
    return noise * uniform(rng, 0.01, 0.09, count)[:, None, None, None]


def to_levels(image: FloatArray) -> FloatArray:
    """Brightness 0..1 to multiples of 1/16 in [-2, 2].

    These are exact in float16, so a sample is the same number wherever it is kept,
    and having few levels they compress well.
    """
    return np.asarray(np.round((np.clip(image, 0.0, 1.0) - 0.5) * 64.0) / 16.0, dtype=np.float32)


# --------------------------------------------------------------------------- #
# 2. The network
# --------------------------------------------------------------------------- #
#
# Each layer says twice what it does: ``forward`` for PyTorch and ``emit`` for ONNX.
# Writing the ONNX nodes by hand keeps the file small and its names readable.


class GraphWriter:
    """Collects the nodes and the weights of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: Tensor) -> str:
        array = value.detach().cpu().numpy().astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = f"{name}_out"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output


class Layer(nn.Module):
    """A PyTorch module that can also write itself as ONNX nodes."""

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        raise NotImplementedError


class ConvNorm(Layer):
    """Convolution, batch normalisation and, if asked for, an activation.

    ``activation`` is "relu6", "hardswish" (one ONNX node), "hardswish_parts" (the
    same function as HardSigmoid and Mul, as older exporters write it) or "".
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: str = "relu6",
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.activation == "relu6":
            return functional.relu6(x)
        if self.activation.startswith("hardswish"):
            return functional.hardswish(x)
        return x

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        x = emit_conv(graph, f"{name}/conv", self.conv, x)
        statistics = {
            "scale": self.norm.weight,
            "bias": self.norm.bias,
            "mean": self.norm.get_buffer("running_mean"),
            "var": self.norm.get_buffer("running_var"),
        }
        names = [graph.weight(f"{name}/bn.{key}", value) for key, value in statistics.items()]
        x = graph.node("BatchNormalization", f"{name}/bn", [x, *names], epsilon=self.norm.eps)
        if self.activation == "relu6":
            low = graph.weight(f"{name}/relu6.min", torch.tensor(0.0))
            high = graph.weight(f"{name}/relu6.max", torch.tensor(6.0))
            return graph.node("Clip", f"{name}/relu6", [x, low, high])
        if self.activation == "hardswish":
            return graph.node("HardSwish", f"{name}/hardswish", [x])
        if self.activation == "hardswish_parts":
            gate = graph.node("HardSigmoid", f"{name}/hardsigmoid", [x], alpha=1.0 / 6.0, beta=0.5)
            return graph.node("Mul", f"{name}/mul", [x, gate])
        return x


def emit_conv(graph: GraphWriter, name: str, conv: nn.Conv2d, x: str) -> str:
    """A convolution node with its weights."""
    inputs = [x, graph.weight(f"{name}.weight", conv.weight)]
    if conv.bias is not None:
        inputs.append(graph.weight(f"{name}.bias", conv.bias))
    (pad_h, pad_w) = (int(conv.padding[0]), int(conv.padding[1]))
    return graph.node(
        "Conv",
        name,
        inputs,
        kernel_shape=list(conv.kernel_size),
        strides=list(conv.stride),
        pads=[pad_h, pad_w, pad_h, pad_w],
        dilations=list(conv.dilation),
        group=conv.groups,
    )


class SqueezeExcite(Layer):
    """Weigh the channels by what the whole image looks like."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.relu(self.reduce(functional.adaptive_avg_pool2d(x, 1)))
        return x * functional.hardsigmoid(self.expand(gate))

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        gate = graph.node("GlobalAveragePool", f"{name}/pool", [x])
        gate = emit_conv(graph, f"{name}/reduce", self.reduce, gate)
        gate = graph.node("Relu", f"{name}/relu", [gate])
        gate = emit_conv(graph, f"{name}/expand", self.expand, gate)
        gate = graph.node("HardSigmoid", f"{name}/gate", [gate], alpha=1.0 / 6.0, beta=0.5)
        return graph.node("Mul", f"{name}/scale", [x, gate])


class InvertedResidual(Layer):
    """Widen with 1x1, filter each channel with 3x3, narrow with 1x1, add the input."""

    def __init__(
        self,
        inputs: int,
        wide: int,
        outputs: int,
        *,
        stride: int = 1,
        squeezed: int = 0,
        activation: str = "relu6",
    ) -> None:
        super().__init__()
        self.expand = ConvNorm(inputs, wide, activation=activation)
        self.depthwise = ConvNorm(wide, wide, 3, stride=stride, groups=wide, activation=activation)
        self.squeeze = SqueezeExcite(wide, squeezed) if squeezed else None
        self.project = ConvNorm(wide, outputs, activation="")
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.depthwise(self.expand(x))
        if self.squeeze is not None:
            y = self.squeeze(y)
        y = self.project(y)
        return x + y if self.residual else y

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        y = self.expand.emit(graph, f"{name}/expand", x)
        y = self.depthwise.emit(graph, f"{name}/depthwise", y)
        if self.squeeze is not None:
            y = self.squeeze.emit(graph, f"{name}/se", y)
        y = self.project.emit(graph, f"{name}/project", y)
        return graph.node("Add", f"{name}/add", [x, y]) if self.residual else y


class TwoBranches(Layer):
    """A near view (1x1) and a far view (dilated depthwise 3x3, then 1x1), side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.near = ConvNorm(inputs, outputs // 2)
        self.far_depthwise = ConvNorm(inputs, inputs, 3, dilation=2, groups=inputs)
        self.far_pointwise = ConvNorm(inputs, outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        far = self.far_pointwise(self.far_depthwise(x))
        return torch.cat([self.near(x), far], dim=1)

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        near = self.near.emit(graph, f"{name}/near", x)
        far = self.far_depthwise.emit(graph, f"{name}/far_depthwise", x)
        far = self.far_pointwise.emit(graph, f"{name}/far_pointwise", far)
        return graph.node("Concat", f"{name}/concat", [near, far], axis=1)


class MaxPool(Layer):
    """Halve height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 2)

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        return graph.node("MaxPool", name, [x], kernel_shape=[2, 2], strides=[2, 2])


class Classifier(Layer):
    """Average over the image, then one fully connected layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits

    def emit(self, graph: GraphWriter, name: str, x: str) -> str:
        x = graph.node("GlobalAveragePool", f"{name}/pool", [x])
        x = graph.node("Flatten", f"{name}/flatten", [x], axis=1)
        weight = graph.weight(f"{name}/gemm.weight", self.linear.weight)
        bias = graph.weight(f"{name}/gemm.bias", self.linear.bias)
        return graph.node("Gemm", f"{name}/gemm", [x, weight, bias], transB=1)


class ShapesNet(nn.Module):
    """The whole network: a chain of named layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "stem": ConvNorm(CHANNELS, 16, 3),  # 32x32
                "features": ConvNorm(16, 24, 3),
                "maxpool": MaxPool(),  # 16x16
                "block1": InvertedResidual(24, 96, 24),
                "block2": InvertedResidual(24, 128, 48, stride=2, squeezed=16),  # 8x8
                "block3": InvertedResidual(48, 192, 48, activation="hardswish"),
                "block4": InvertedResidual(48, 192, 48),
                "branches": TwoBranches(48, 128),
                "top": ConvNorm(128, 192, activation="hardswish_parts"),
                "head": Classifier(192, len(SHAPES)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x

    def emit(self, graph: GraphWriter, x: str) -> str:
        for name, layer in self.layers.items():
            assert isinstance(layer, Layer)
            x = layer.emit(graph, name, x)
        return x


def count_parameters(model: nn.Module) -> int:
    """Trained numbers, without the running statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and linear layers, for one image."""
    total = 0

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += output.numel() * module.weight[0].numel()

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, CHANNELS, SIZE, SIZE))
    for handle in handles:
        handle.remove()
    return total


# --------------------------------------------------------------------------- #
# 3. Training
# --------------------------------------------------------------------------- #


def train(model: nn.Module, epochs: int, seed: int) -> None:
    """Train on images that are drawn anew for every epoch.

    The channels-last layout is the faster one on a CPU.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=epochs * (TRAIN_SAMPLES // BATCH))
    for epoch in range(epochs):
        start = time.perf_counter()
        images, labels = draw_samples(TRAIN_SAMPLES, (seed, 0, epoch), TRAINING)
        model.train()
        total = 0.0
        for first in range(0, TRAIN_SAMPLES - BATCH + 1, BATCH):
            x = torch.from_numpy(images[first : first + BATCH])
            x = x.to(memory_format=torch.channels_last)
            y = torch.from_numpy(labels[first : first + BATCH])
            loss = functional.cross_entropy(model(x), y, label_smoothing=0.02)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += loss.item()
        mean = total / (TRAIN_SAMPLES // BATCH)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1:2d}/{epochs}: loss {mean:.4f}, {seconds:.1f} s", flush=True)


def predict(model: nn.Module, images: FloatArray) -> FloatArray:
    """The logits of PyTorch."""
    model.eval()
    with torch.no_grad():
        parts = [model(part) for part in torch.tensor_split(torch.from_numpy(images), 8)]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float32)


def accuracy(logits: FloatArray, labels: IntArray) -> float:
    return float(np.mean(logits.argmax(axis=1) == labels))


# --------------------------------------------------------------------------- #
# 4. The files
# --------------------------------------------------------------------------- #


def export(model: ShapesNet) -> onnx.ModelProto:
    """The trained network as ONNX: batch 1, batch normalisations left unfolded."""
    graph = GraphWriter()
    result = model.emit(graph, "image")
    graph.nodes[-1].output[0] = "logits"
    assert result not in {name for node in graph.nodes for name in node.input}

    shape = [1, CHANNELS, SIZE, SIZE]
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "shapes",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, len(SHAPES)])],
            graph.weights,
        ),
        producer_name="npucc examples/train_demo.py",
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(proto, {"classes": ",".join(SHAPES)})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run_onnx(path: Path, images: FloatArray) -> FloatArray:
    """The logits of onnxruntime, one image at a time."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = [session.run(["logits"], {"image": image[None]})[0] for image in images]
    return np.concatenate(rows).astype(np.float32)


def write_npz(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Like ``np.savez_compressed``, but the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write the bundled example network.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")

    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # so that sums are always ordered in the same way
    torch.use_deterministic_algorithms(True)

    model = ShapesNet()
    print(f"{count_parameters(model)} parameters, {count_macs(model) / 1e6:.2f} million MACs")
    start = time.perf_counter()
    train(model, options.epochs, options.seed)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    # Different seeds, so the three sets have no image in common.
    images, labels = draw_samples(TEST_SAMPLES, (options.seed, 1), USE)
    calibration, _ = draw_samples(CALIBRATION_SAMPLES, (options.seed, 2), USE)

    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / f"shapes{end}" for end in (".onnx", ".npz", "_calibration.npz")]
    paths[0].write_bytes(export(model).SerializeToString(deterministic=True))
    write_npz(paths[1], {"image": images.astype(np.float16), "labels": labels})
    write_npz(paths[2], {"image": calibration.astype(np.float16)})

    # Check what was written, not what is in memory.
    with np.load(paths[1]) as data:
        stored, stored_labels = data["image"].astype(np.float32), data["labels"]
    logits = run_onnx(paths[0], stored)
    difference = float(np.abs(logits - predict(model, images)).max())
    print(f"largest difference between PyTorch and onnxruntime: {difference:.2e}")
    if difference > 1e-3:
        raise SystemExit("the exported network differs from the trained one")

    print(f"accuracy on the test samples: {accuracy(logits, stored_labels):.2%}")
    for name, conditions in (("training", TRAINING), ("use", USE)):
        more, more_labels = draw_samples(4000, (options.seed, 3), conditions)
        score = accuracy(predict(model, more), more_labels)
        print(f"accuracy on 4000 other images, conditions of {name}: {score:.2%}")
    for path in paths:
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
