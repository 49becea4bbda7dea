"""Operators that only move elements: reshape, transpose, slice, concat, pad and their kin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from npucc import ops
from npucc.frontend.node import Importer, NodeImport

MOST_PIECES = 64  # slices that a Gather may become


def reshape(node: NodeImport) -> str:
    """0 copies a dimension (unless allowzero), −1 is what remains."""
    wanted, shape = node.integers_input(1, "shape"), node.shape(0)
    if not node.integer("allowzero", 0):
        wanted = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(wanted)]
    if -1 in wanted:
        known = math.prod(size for size in wanted if size != -1)
        if wanted.count(-1) > 1 or known <= 0 or math.prod(shape) % known:
            raise node.refuse(f"can't turn shape {list(shape)} into {wanted}", hint="check the input shapes")
        wanted[wanted.index(-1)] = math.prod(shape) // known
    return node.reshape(node.input(0), wanted)


def flatten(node: NodeImport) -> str:
    """Two dimensions: those before `axis`, and the rest."""
    shape = node.shape(0)
    axis = node.integer("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return node.reshape(node.input(0), (math.prod(shape[:axis]), math.prod(shape[axis:])))


def squeeze(node: NodeImport) -> str:
    """Dimensions of 1 dropped: those given, or all."""
    shape = node.shape(0)
    axes = node.integers_of("axes", 1)
    dropped = {node.axis(axis, len(shape)) for axis in axes} if axes else {i for i, size in enumerate(shape) if size == 1}
    if any(shape[axis] != 1 for axis in dropped):
        raise node.refuse(f"axes {sorted(dropped)} of shape {list(shape)} are not all 1", hint="check the input shapes")
    return node.reshape(node.input(0), [size for i, size in enumerate(shape) if i not in dropped])


def unsqueeze(node: NodeImport) -> str:
    """Dimensions of 1 put in; `axes` count in the result."""
    shape = list(node.shape(0))
    axes = node.integers_of("axes", 1) or []
    rank = len(shape) + len(axes)
    for axis in sorted(node.axis(axis, rank) for axis in axes):
        shape.insert(axis, 1)
    return node.reshape(node.input(0), shape)


def transpose(node: NodeImport) -> str:
    """`perm`, or all dimensions reversed."""
    permutation = node.integers("perm") or list(reversed(range(node.rank())))
    if sorted(permutation) != list(range(node.rank())):
        raise node.refuse(f"perm={permutation} does not fit an input of shape {list(node.shape(0))}", hint="the model is damaged; export it again")
    return node.transpose(node.input(0), permutation)


def concat(node: NodeImport) -> str:
    """Parts without elements are left out."""
    used = [index for index in range(len(node.inputs)) if 0 not in node.shape(index)]
    axis = node.axis(node.integer("axis", 0), node.rank(used[0]))
    parts = [node.input(index) for index in used]
    shapes = {tuple(size for i, size in enumerate(node.shape(index)) if i != axis) for index in used}
    if len(shapes) > 1:
        raise node.refuse(f"its inputs have shapes {', '.join(str(list(node.shape(index))) for index in used)}", hint="check the input shapes")
    return parts[0] if len(parts) == 1 else node.emit("concat", parts, ops.Concat(axis))


def split(node: NodeImport) -> list[str]:
    """One slice per part."""
    axis = node.axis(node.integer("axis", 0), node.rank())
    size = node.shape(0)[axis]
    sizes = node.integers_of("split", 1)
    if sizes is None:
        part = -(-size // len(node.outputs))
        sizes = [min(part, size - start) for start in range(0, size, part)]
    if sum(sizes) != size or len(sizes) != len(node.outputs) or min(sizes) < 0:
        raise node.refuse(f"can't split {size} into {sizes} for {len(node.outputs)} outputs", hint="check the input shapes")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_part(node, axis, start, part) if output else "" for start, part, output in zip(starts, sizes, node.outputs, strict=True)]


def _part(node: NodeImport, axis: int, start: int, size: int) -> str:
    """Part of an axis; without elements it is a constant."""
    if size:
        return node.slice(node.input(0), axis, start, size)
    return node.new_constant(np.zeros([0 if i == axis else size for i, size in enumerate(node.shape(0))]), "empty")


def slice_(node: NodeImport) -> str:
    """Numpy's slices; bounds are attributes before opset 10, inputs since."""
    shape = node.shape(0)
    starts, ends = node.integers_of("starts", 1), node.integers_of("ends", 2)
    if starts is None or ends is None:
        raise node.refuse("has no starts or no ends", hint="the model is damaged; export it again")
    axes = node.integers_of("axes", 3) or list(range(len(starts)))
    steps = node.integers_input(4, "steps") if node.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise node.refuse(
            f"has {len(starts)} starts, {len(ends)} ends, {len(axes)} axes and {len(steps)} steps", hint="the model is damaged; export it again"
        )
    picked = [range(size) for size in shape]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        position = node.axis(axis, len(shape))
        picked[position] = range(shape[position])[slice(start, end, step)]
    if all(part == range(size) for part, size in zip(picked, shape, strict=True)):
        return node.input(0)
    attributes = ops.Slice(tuple(part.start for part in picked), tuple(len(part) for part in picked), tuple(part.step for part in picked))
    return node.emit("slice", (node.input(0),), attributes)


def expand(node: NodeImport) -> str:
    """Broadcast with a shape, both ways."""
    shape = np.broadcast_shapes(node.shape(0), tuple(node.integers_input(1, "shape")))
    return _expand(node, node.input(0), shape)


def _expand(node: NodeImport, x: str, shape: Sequence[int]) -> str:
    if node.shape_of(x) == tuple(shape):
        return x
    return node.emit("expand", (x,), ops.Expand(tuple(shape)))


def tile(node: NodeImport) -> str:
    """Each repeated dimension d becomes [repeats, d], is expanded and merged again."""
    repeats, shape = node.integers_input(1, "repeats"), node.shape(0)
    if len(repeats) != len(shape) or min(repeats, default=1) < 1:
        raise node.refuse(f"repeats={repeats} does not fit an input of shape {list(shape)}", hint="check the input shapes")
    split_shape: list[int] = []
    wide: list[int] = []
    for size, count in zip(shape, repeats, strict=True):
        split_shape += [1, size] if count > 1 and size > 1 else [size]
        wide += [count, size] if count > 1 and size > 1 else [size * count]
    result = _expand(node, node.reshape(node.input(0), split_shape), wide)
    return node.reshape(result, [size * count for size, count in zip(shape, repeats, strict=True)])


def pad(node: NodeImport) -> str:
    """Negative pads crop."""
    rank = node.rank()
    pads = node.integers_of("pads", 1) or []
    axes = [node.axis(axis, rank) for axis in (node.integers_input(3, "axes") if node.has(3) else range(rank))]
    if len(pads) != 2 * len(axes):
        raise node.refuse(f"pads={pads} must be {2 * len(axes)} numbers", hint="the model is damaged; export it again")
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    value = float(node.floats(2, "value").reshape(())) if node.has(2) else node.real("value", 0.0)
    attributes = ops.Pad(tuple(max(0, count) for count in before), tuple(max(0, count) for count in after), value, node.word("mode", "constant"))
    x = _crop(node, node.input(0), before, after)
    return node.emit("pad", (x,), attributes) if any(attributes.before + attributes.after) else x


def _crop(node: NodeImport, x: str, before: Sequence[int], after: Sequence[int]) -> str:
    if min(*before, *after) >= 0:
        return x
    starts = [max(0, -count) for count in before]
    sizes = [size - start - max(0, -count) for size, start, count in zip(node.shape_of(x), starts, after, strict=True)]
    return node.emit("slice", (x,), ops.Slice(tuple(starts), tuple(sizes), (1,) * len(sizes)))


def gather(node: NodeImport) -> str:
    """Runs of constant indices with a constant step become slices, joined by a concat; computed indices, or many runs, a look-up."""
    shape = node.shape(0)
    axis = node.axis(node.integer("axis", 0), len(shape))
    if not node.is_constant(1):
        return node.emit("gather", (node.input(0), node.input(1)), ops.Gather(axis))
    return take(node, node.input(0), axis, node.constant(1, "indices"))


def take(node: NodeImport, x: str, axis: int, indices: np.ndarray) -> str:
    """The slices of x at constant positions along an axis."""
    shape = node.shape_of(x)
    flat = [int(index) for index in indices.reshape(-1)]
    if not flat or not -shape[axis] <= min(flat) <= max(flat) < shape[axis]:
        raise node.refuse(f"an index is outside 0 to {shape[axis] - 1}, or there is none", hint="check the input shapes")
    runs = _runs([index % shape[axis] for index in flat])
    if len(runs) > MOST_PIECES:
        return node.emit("gather", (x, node.new_constant(indices, "indices")), ops.Gather(axis))
    parts = [node.slice(x, axis, start, count, step) for start, count, step in runs]
    joined = parts[0] if len(parts) == 1 else node.emit("concat", parts, ops.Concat(axis))
    return node.reshape(joined, (*shape[:axis], *indices.shape, *shape[axis + 1 :]))


def _runs(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, count, step) of maximal runs with a constant step."""
    runs: list[tuple[int, int, int]] = []
    position = 0
    while position < len(indices):
        step = indices[position + 1] - indices[position] if position + 1 < len(indices) else 1
        count = 1
        while step and position + count < len(indices) and indices[position + count] - indices[position + count - 1] == step:
            count += 1
        runs.append((indices[position], count, step if count > 1 else 1))
        position += count
    return runs


def depth_to_space(node: NodeImport) -> str:
    """Channels to blocks of pixels, in either order (DCR, CRD)."""
    n, c, h, w = node.shape(0)
    block = node.integer("blocksize", 1)
    depth = c // (block * block)
    if node.word("mode", "DCR") == "DCR":
        split_shape, order = (n, block, block, depth, h, w), (0, 3, 4, 1, 5, 2)
    else:
        split_shape, order = (n, depth, block, block, h, w), (0, 1, 4, 2, 5, 3)
    return node.reshape(node.transpose(node.reshape(node.input(0), split_shape), order), (n, depth, h * block, w * block))


def space_to_depth(node: NodeImport) -> str:
    """Blocks of pixels to channels, in either order (DCR, CRD)."""
    n, c, h, w = node.shape(0)
    block = node.integer("blocksize", 1)
    parts = node.reshape(node.input(0), (n, c, h // block, block, w // block, block))
    order = (0, 3, 5, 1, 2, 4) if node.word("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return node.reshape(node.transpose(parts, order), (n, c * block * block, h // block, w // block))


TABLE: tuple[Importer, ...] = (
    Importer("Reshape", reshape, "constant shape"),
    Importer("Flatten", flatten),
    Importer("Squeeze", squeeze),
    Importer("Unsqueeze", unsqueeze),
    Importer("ExpandDims", unsqueeze, domain="com.microsoft"),
    Importer("Transpose", transpose),
    Importer("Concat", concat),
    Importer("Split", split),
    Importer("Slice", slice_, "constant bounds"),
    Importer("Expand", expand, "constant shape"),
    Importer("Tile", tile, "constant repeats"),
    Importer("Pad", pad, "constant pads"),
    Importer("Gather", gather),
    Importer("DepthToSpace", depth_to_space),
    Importer("SpaceToDepth", space_to_depth),
)
