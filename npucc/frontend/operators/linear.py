"""Operators that are linear in their first input when the others are constants: one product with a constant matrix.

The one big idea: onnxruntime is asked for the matrix. It runs the node on unit vectors, so that every mode of it is right without being
written again. Fourier transforms, whose matrix is known, are products along one dimension.
"""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.indexing import along

LARGEST_MATRIX = 1 << 22  # entries
NEWEST = 21  # opset; later versions of these operators add element types only, some of which onnxruntime lacks
Array = np.ndarray


def grid_sample(node: NodeImport) -> str:
    """Samples at the constant places of a grid: one matrix per batch entry over the places of an image."""
    if node.word("mode", "linear") not in ("linear", "bilinear", "nearest", "cubic", "bicubic"):
        raise node.refuse(f"mode {node.word('mode', 'linear')!r} is not known")
    grid = node.floats(1, "grid")
    batch, channels, *size = node.shape(0)
    places, results = math.prod(size), math.prod(grid.shape[1:-1])
    _limit(node, places * results)
    unit = np.eye(places, dtype=np.float32).reshape(1, places, *size)
    parts = []
    for entry in range(batch):
        matrix = _run(node, unit, {1: grid[entry : entry + 1]}).reshape(places, results)
        rows = node.reshape(node.slice(node.input(0), 0, entry, 1), (channels, places))
        parts.append(node.reshape(along(node, rows, 1, matrix), (1, channels, *grid.shape[1:-1])))
    return parts[0] if batch == 1 else node.emit("concat", parts, ops.Concat(0))


def roi_align(node: NodeImport) -> str:
    """Means over parts of the cells of constant regions: a matrix per batch entry over the places of its image."""
    if node.word("mode", "avg") != "avg":
        raise node.refuse("takes the largest sample, which is not linear")
    regions, owners = node.floats(1, "regions"), np.asarray(node.constant(2, "batch indices")).reshape(-1)
    _, channels, height, width = node.shape(0)
    cells = (node.integer("output_height", 1), node.integer("output_width", 1))
    _limit(node, height * width * math.prod(cells))
    unit = np.eye(height * width, dtype=np.float32).reshape(1, -1, height, width)
    parts = []
    for region, owner in zip(regions, owners, strict=True):
        matrix = _run(node, unit, {1: region[None], 2: np.zeros(1, np.int64)}).reshape(height * width, -1)
        rows = node.reshape(node.slice(node.input(0), 0, int(owner), 1), (channels, height * width))
        parts.append(node.reshape(along(node, rows, 1, matrix), (1, channels, *cells)))
    return parts[0] if len(parts) == 1 else node.emit("concat", parts, ops.Concat(0))


def affine_grid(node: NodeImport) -> str:
    """theta [N, 2, 3] or [N, 3, 4] times the (x, y, [z,] 1) of every place of a grid of constant size."""
    sizes = node.integers_input(1, "size")[2:]
    aligned = bool(node.integer("align_corners", 0))
    axes = [np.linspace(-1, 1, size) if aligned else (2 * np.arange(size) + 1) / size - 1 for size in sizes]
    places = np.stack([*reversed(np.meshgrid(*axes, indexing="ij")), np.ones(sizes)], axis=0).reshape(len(sizes) + 1, -1)
    product = along(node, node.input(0), 2, places)
    return node.reshape(node.transpose(product, (0, 2, 1)), (node.shape(0)[0], *sizes, len(sizes)))


def column_to_image(node: NodeImport) -> str:
    """Col2Im: a transposed convolution whose weights put each column entry in its place."""
    image, block = node.integers_input(1, "image_shape"), node.integers_input(2, "block_shape")
    if len(image) != 2:
        raise node.refuse(f"makes {len(image)}-D images; supported are 2-D ones")
    strides, dilations = node.integers("strides") or [1, 1], node.integers("dilations") or [1, 1]
    pads = node.integers("pads") or [0] * 4
    batch, rows, _ = node.shape(0)
    size = [(image[i] + pads[i] + pads[i + 2] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)]
    channels, taps = rows // math.prod(block), math.prod(block)
    weights = np.tile(np.eye(taps).reshape(taps, 1, *block), (channels, 1, 1, 1))
    rest = [image[i] + pads[i] + pads[i + 2] - ((size[i] - 1) * strides[i] + dilations[i] * (block[i] - 1) + 1) for i in (0, 1)]
    attributes = ops.ConvTranspose((strides[0], strides[1]), tuple(pads), (dilations[0], dilations[1]), channels, (rest[0], rest[1]))  # type: ignore[arg-type]
    return node.emit("conv_transpose", (node.reshape(node.input(0), (batch, rows, *size)), node.new_constant(weights, "weights")), attributes)


def _limit(node: NodeImport, entries: int) -> None:
    if entries > LARGEST_MATRIX:
        raise node.refuse(f"its matrix would have {entries} entries; supported are up to {LARGEST_MATRIX}")


def _run(node: NodeImport, x: Array, constants: dict[int, Array]) -> Array:
    """The node's result for these inputs, by onnxruntime."""
    inner = NodeProto()
    inner.CopyFrom(node.proto)
    values = {inner.input[0]: x, **{inner.input[index]: value for index, value in constants.items()}}
    port = helper.make_tensor_value_info(inner.input[0], TensorProto.FLOAT, x.shape)
    stored = [numpy_helper.from_array(value, name) for name, value in values.items() if name != inner.input[0]]
    graph = helper.make_graph([inner], "probe", [port], [ValueInfoProto(name=inner.output[0])], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", min(node.opset, NEWEST))], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {inner.input[0]: x})[0])
    except Exception as error:  # noqa: BLE001  onnxruntime raises many kinds
        raise node.refuse(f"onnxruntime does not run it: {str(error).splitlines()[0]}") from None


# ---- Fourier transforms


def _fourier(length: int, bins: int, *, inverse: bool = False) -> Array:
    """exp(∓2πi·n·k / length), complex [length, bins]; the inverse is divided by the length."""
    angle = 2 * np.pi * np.outer(np.arange(length), np.arange(bins)) / length
    return np.asarray(np.exp(1j * angle) / length if inverse else np.exp(-1j * angle))


def _as_real(matrix: Array, *, complex_input: bool) -> Array:
    """A complex matrix [n, k] as a real one on interleaved (real, imaginary) pairs: [n or 2n, 2k]."""
    n, k = matrix.shape
    real = np.stack([matrix.real, matrix.imag], axis=-1)
    if not complex_input:
        return real.reshape(n, 2 * k)
    turned = np.stack([-matrix.imag, matrix.real], axis=-1)
    return np.stack([real, turned], axis=1).reshape(2 * n, 2 * k)


def discrete_fourier(node: NodeImport) -> str:
    """DFT along an axis of [..., 1 or 2]: a product over (position, part) pairs. Signals are cut or filled with zeros to dft_length."""
    shape = node.shape(0)
    axis = node.axis(node.integers_input(2, "axis")[0] if node.has(2) else node.integer("axis", 1 if node.opset < 20 else -2), len(shape))
    inverse, onesided = bool(node.integer("inverse", 0)), bool(node.integer("onesided", 0))
    length = node.integers_input(1, "dft_length")[0] if node.has(1) else shape[axis]
    if inverse and onesided:
        length = length if node.has(1) else 2 * (shape[axis] - 1)
        matrix = _half_inverse(length)
    else:
        bins = length // 2 + 1 if onesided else length
        matrix = _as_real(_fourier(length, bins, inverse=inverse), complex_input=shape[-1] == 2)
    used = matrix.shape[0] // shape[-1]
    kept = min(used, shape[axis])
    x = node.slice(node.input(0), axis, 0, kept)
    order = [i for i in range(len(shape) - 1) if i != axis] + [axis, len(shape) - 1]
    moved = node.transpose(x, order)
    lead = [shape[i] for i in order[:-2]]
    product = along(node, node.reshape(moved, (math.prod(lead), kept * shape[-1])), 1, matrix[: kept * shape[-1]])
    parts = 1 if inverse and onesided else 2
    return node.transpose(node.reshape(product, (*lead, matrix.shape[1] // parts, parts)), list(np.argsort(order)))


def _half_inverse(length: int) -> Array:
    """From the (real, imaginary) pairs of bins 0 to length/2 to a real signal: [2·bins, length]."""
    bins = length // 2 + 1
    weight = np.array([1.0 if k == 0 or 2 * k == length else 2.0 for k in range(bins)])[:, None] / length
    angle = 2 * np.pi * np.outer(np.arange(bins), np.arange(length)) / length
    return np.stack([weight * np.cos(angle), -weight * np.sin(angle)], axis=1).reshape(2 * bins, length)


def short_time_fourier(node: NodeImport) -> str:
    """STFT of a real signal [batch, length, 1]: a convolution with windowed sines and cosines, one step per frame."""
    batch, length = node.shape(0)[:2]
    if node.rank() == 3 and node.shape(0)[2] != 1:
        raise node.refuse("its signal is complex")
    step = node.integers_input(1, "frame_step")[0]
    window = node.floats(2, "window") if node.has(2) else None
    size = node.integers_input(3, "frame_length")[0] if node.has(3) else window.size if window is not None else 0
    bins = size // 2 + 1 if node.integer("onesided", 1) else size
    matrix = _as_real(_fourier(size, bins), complex_input=False) * (1.0 if window is None else window[:, None])
    weights = node.new_constant(matrix.T.reshape(2 * bins, 1, 1, size), "weights")
    signal = node.reshape(node.input(0), (batch, 1, 1, length))
    frames = node.emit("conv", (signal, weights), ops.Conv((1, step)))
    count = node.shape_of(frames)[3]
    return node.reshape(node.transpose(frames, (0, 3, 1, 2)), (batch, count, bins, 2))


TABLE: tuple[Importer, ...] = (
    Importer("GridSample", grid_sample, "constant grid"),
    Importer("AffineGrid", affine_grid, "constant size"),
    Importer("RoiAlign", roi_align, "constant regions, mode avg"),
    Importer("Col2Im", column_to_image, "2-D, constant shapes"),
    Importer("DFT", discrete_fourier, "constant length and axis"),
    Importer("STFT", short_time_fourier, "real signal, constant window and lengths"),
)
