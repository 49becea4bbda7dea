"""Inputs where there is no calibration data: random ones, if the model tells nothing; else those that its batch normalizations know best.

The one big idea: a batch normalization holds mean and variance of each channel as they were in training. Random images of several spectra,
scales and offsets go through the float model; those whose channels come closest to these statistics stand in for the data. (Cai et al.,
ZeroQ, CVPR 2020, find such inputs by gradients; Nagel et al., Data-Free Quantization, ICCV 2019, take ranges from the statistics themselves,
which says nothing of sums and of what comes after them.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc.feeds import Port, synthetic_feeds
from npucc.graph import Graph, Moments
from npucc.quantize.calibrate import Calibration, tensor_runner
from npucc.signature import ports_of_graph

Array = np.ndarray[Any, np.dtype[Any]]
Feed = dict[str, Array]

SAMPLES = 8
ROOM = 2.0  # of the outputs over what is seen: only what a network knows drives them far
TRIED = 4  # samples of each kind to choose by
STEEPNESSES = (1.5, 0.0, 1.0, 2.0)  # amplitude falls with frequency to this power: 0 is white noise, natural images have 1 to 2
VALUES = ((0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (0.25, 0.5), (64.0, 128.0))  # (deviation, mean)
GREY = 0.9  # of the variance of an image is the same in all its channels
CONTRASTS, LIGHTS = (0.4, 1.6), 0.5  # between samples: range of the deviation's factor, deviation of the mean
STEP = 2.0**-8  # values are rounded to it: the same on every machine
FAINTEST = 1e-6  # of the largest variance: a channel below is dead
FARTHEST = 5.0  # a channel can't count for more


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to make up the float inputs; see STEEPNESSES and VALUES."""

    steepness: float
    deviation: float
    mean: float


def made_up(imported: Graph) -> list[Feed]:
    """Samples for a model. `imported`: its graph before normalizations are folded away."""
    ports = ports_of_graph(imported)
    known = {name: tensor.moments for name, tensor in imported.tensors.items() if tensor.moments is not None}
    if not known:
        return list(synthetic_feeds(ports, count=SAMPLES))
    run = tensor_runner(imported, sorted(known))

    def nearest(kinds: Iterable[Kind]) -> Kind:
        return min(kinds, key=lambda kind: distance(run, known, feeds_of(kind, ports, TRIED)))

    first = nearest(Kind(STEEPNESSES[0], *values) for values in VALUES)
    steepness = nearest(replace(first, steepness=each) for each in STEEPNESSES).steepness
    return feeds_of(nearest(Kind(steepness, *values) for values in VALUES), ports, SAMPLES)


def feeds_of(kind: Kind, ports: Sequence[Port], count: int) -> list[Feed]:
    """Samples of one kind, always the same; integer inputs are those of `synthetic_feeds`."""
    random = np.random.default_rng(0)

    def filled(feed: Feed) -> Iterator[tuple[str, Array]]:
        for port in ports:
            value = feed[port.name]
            if port.array_dtype.kind == "f" and value.ndim > 1:
                field = _field(value.shape, kind.steepness, random)
                field = random.uniform(*CONTRASTS) * field + LIGHTS * random.standard_normal()
                value = (kind.deviation * np.rint(field / STEP) * STEP + kind.mean).astype(port.array_dtype)
            yield port.name, value

    return [dict(filled(feed)) for feed in synthetic_feeds(ports, count=count)]


def _field(shape: Sequence[int], steepness: float, random: np.random.Generator) -> Array:
    """Noise of that spectrum over the last dimension, of images (rank 4, the shortest dimension is colour) over height and width."""
    channel = 1 + int(np.argmin(shape[1:])) if len(shape) == 4 else None
    axes = tuple(axis for axis in range(1, 4) if axis != channel) if channel is not None else (len(shape) - 1,)
    field = _noise(shape, axes, steepness, random)
    if channel is not None:
        grey = _noise([1 if axis == channel else size for axis, size in enumerate(shape)], axes, steepness, random)
        field = np.sqrt(GREY) * grey + np.sqrt(1 - GREY) * field
    return np.asarray(field)


def _noise(shape: Sequence[int], axes: tuple[int, ...], steepness: float, random: np.random.Generator) -> Array:
    """Of deviation one; its amplitude falls with the frequency over the axes to the power of `steepness`."""
    squares = np.zeros([size if axis in axes else 1 for axis, size in enumerate(shape)])
    for axis in axes:
        squares = squares + np.fft.fftfreq(shape[axis]).reshape([-1 if each == axis else 1 for each in range(len(shape))]) ** 2
    lowest = 1 / max(shape[axis] for axis in axes)
    amplitude = np.sqrt(np.maximum(squares, lowest**2)) ** -steepness
    field = np.fft.ifftn(np.fft.fftn(random.standard_normal(shape), axes=axes) * amplitude, axes=axes).real
    return np.asarray(field / max(float(field.std()), FAINTEST))


def distance(run: Callable[[Mapping[str, Array]], dict[str, Array]], known: Mapping[str, Moments], feeds: Sequence[Feed]) -> float:
    """How far the channels' statistics are from the known ones: deviations off in the mean, plus the logarithm of the deviations' ratio, averaged."""
    sums = {name: np.zeros((2, len(moments.mean))) for name, moments in known.items()}
    for feed in feeds:
        for name, value in run(feed).items():
            others = tuple(axis for axis in range(value.ndim) if axis != 1)
            sums[name] += np.stack([value.mean(axis=others, dtype=np.float64), np.square(value).mean(axis=others, dtype=np.float64)]) / len(feeds)
    return float(np.mean([_channel_distance(sums[name][0], sums[name][1], moments) for name, moments in known.items()]))


def _channel_distance(mean: Array, square: Array, moments: Moments) -> float:
    alive = moments.variance > FAINTEST * moments.variance.max(initial=0.0)
    if not alive.any():
        return 0.0
    deviation = np.sqrt(moments.variance[alive])
    ratio = np.sqrt(np.maximum((square - mean**2)[alive], FAINTEST**2)) / deviation
    shift = np.abs(mean[alive] - moments.mean[alive]) / deviation
    far = np.minimum(np.nan_to_num(np.abs(np.log(ratio)), nan=FARTHEST), FARTHEST) + np.minimum(np.nan_to_num(shift, nan=FARTHEST), FARTHEST)
    return float(np.mean(far))


def leave_room(calibration: Calibration, graph: Graph) -> None:
    """Widen the ranges of the graph's outputs."""
    for name in graph.outputs:
        if name in calibration.histograms:
            histogram = calibration.histograms[name]
            histogram.low, histogram.high = ROOM * histogram.low, ROOM * histogram.high
