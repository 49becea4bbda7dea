"""Selection by position: gathers and scatters with constant indices, largest elements, running sums and products.

The one big idea: whatever constant indices pick or overwrite, numpy does it once to the positions themselves; what remains is one look-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from npucc import ops
from npucc.frontend.node import Importer, NodeImport
from npucc.frontend.operators.integers import remainder

Array = np.ndarray
MOST_ROUNDS = 64  # of a loop that is written out
LARGEST_TRIANGLE = 2048  # steps of a running sum
INTEGER = "int64"


def _positions(shape: Sequence[int]) -> Array:
    """The position of each element of a tensor."""
    return np.arange(math.prod(shape)).reshape(shape)


def pick(node: NodeImport, x: str, positions: Array) -> str:
    """The elements of a tensor at constant positions, in the shape of those; whole rows at once where they stay together."""
    shape = node.shape_of(x)
    if positions.size == math.prod(shape) and np.array_equal(positions.reshape(-1), np.arange(positions.size)):
        return node.reshape(x, positions.shape)
    width = _row(positions.reshape(-1))
    while math.prod(shape) % width or positions.size % width or (positions.reshape(-1, width)[:, 0] % width).any():
        width -= 1
    rows = node.reshape(x, (math.prod(shape) // width, width))
    indices = node.new_constant(positions.reshape(-1, width)[:, 0] // width, "indices")
    return node.reshape(node.emit("gather", (rows, indices), ops.Gather(0)), positions.shape)


def _row(flat: Array) -> int:
    """The length of the shortest run of consecutive positions."""
    breaks = np.flatnonzero(np.diff(flat) != 1) + 1
    return int(np.diff([0, *breaks, flat.size]).min())


def gather_elements(node: NodeImport) -> str:
    """result[…, i, …] = x[…, indices[…, i, …], …] along an axis."""
    axis, shape = node.axis(node.integer("axis", 0), node.rank()), node.shape(0)
    if not node.is_constant(1):
        return _gathered(node, axis)
    indices = np.asarray(node.constant(1, "indices")) % shape[axis]
    cut = _positions(shape)[tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(indices.shape))]
    return pick(node, node.input(0), np.take_along_axis(cut, indices, axis))


def _gathered(node: NodeImport, axis: int) -> str:
    """Elements at computed indices along an axis, one source after the other."""
    rows = _rows(node, axis, node.shape(0)[axis])
    result = node.slice(node.input(0), axis, 0, 1)
    for row in range(1, rows):
        here = _either(node, node.input(1), np.full((1,) * node.rank(), row), rows)
        result = select(node, here, node.slice(node.input(0), axis, row, 1), result, _kind(node))
    return result if rows > 1 else node.emit("expand", (result,), ops.Expand(node.shape(1)))


def gather_nd(node: NodeImport) -> str:
    """Slices of x, picked by the index tuples in the last dimension."""
    batch, positions = node.integer("batch_dims", 0), _positions(node.shape(0))
    indices = np.asarray(node.constant(1, "indices"))
    shared = tuple(np.ogrid[tuple(slice(size) for size in indices.shape[:batch])]) if batch else ()
    padded = tuple(grid.reshape(grid.shape + (1,) * (indices.ndim - 1 - batch)) for grid in shared)
    place = (*padded, *np.moveaxis(indices, -1, 0))
    return pick(node, node.input(0), positions[place])


def compress(node: NodeImport) -> str:
    """The slices, or elements, that a constant condition keeps."""
    condition, positions = np.asarray(node.constant(1, "condition")).astype(bool), _positions(node.shape(0))
    axis = node.attribute("axis", None)
    return pick(node, node.input(0), np.compress(condition, positions, None if axis is None else node.axis(int(axis), node.rank())))


def reverse_sequence(node: NodeImport) -> str:
    """Each batch entry's first steps in reverse order."""
    positions, lengths = _positions(node.shape(0)), node.integers_input(1, "sequence_lens")
    batch, time = node.integer("batch_axis", 1), node.integer("time_axis", 0)
    moved = np.moveaxis(positions, (batch, time), (0, 1)).copy()
    for entry, length in zip(moved, lengths, strict=True):
        entry[:length] = entry[:length][::-1].copy()
    return pick(node, node.input(0), np.moveaxis(moved, (0, 1), (batch, time)))


# ---- scatters


def scatter_elements(node: NodeImport) -> str:
    """x with elements replaced by updates along an axis, or combined with them."""
    axis, shape = node.axis(node.integer("axis", 0), node.rank()), node.shape(0)
    if not node.is_constant(1):
        return _scattered(node, axis)
    indices = np.asarray(node.constant(1, "indices")) % shape[axis]
    grid = (indices if i == axis else places for i, places in enumerate(np.indices(indices.shape)))
    return _scatter(node, _positions(shape)[tuple(grid)])


def scatter_nd(node: NodeImport) -> str:
    """x with slices replaced by updates at the index tuples, or combined with them."""
    if not node.is_constant(1):
        return _scattered_slices(node)
    indices = np.asarray(node.constant(1, "indices"))
    return _scatter(node, _positions(node.shape(0))[tuple(np.moveaxis(indices, -1, 0))])


def _scattered(node: NodeImport, axis: int) -> str:
    """x with updates at computed indices along an axis, one after the other."""
    x, shape = node.input(0), node.shape(0)
    places = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    for row in range(_rows(node, axis, node.shape(1)[axis])):
        index, update = (node.slice(node.input(i), axis, row, 1) for i in (1, 2))
        x = _written(node, x, update, None if shape[axis] == 1 else _either(node, index, places, shape[axis]))
    return x


def _rows(node: NodeImport, axis: int, rows: int) -> int:
    """How many there are along an axis. Refuses more than can be taken one by one, and indices that are for a part of x only."""
    shape, indices = (tuple(size for i, size in enumerate(node.shape(index)) if i != axis) for index in (0, 1))
    if shape != indices or rows > MOST_ROUNDS:
        found = f"{rows} along axis {axis}, with indices of shape {list(node.shape(1))} for {list(node.shape(0))}"
        raise node.refuse(f"its indices are computed: {found}; supported are up to {MOST_ROUNDS}, for all of the input")
    return rows


def _scattered_slices(node: NodeImport) -> str:
    """x with slices replaced by updates at computed index tuples, one after the other."""
    x, shape, (*many, depth) = node.input(0), node.shape(0), node.shape(1)
    count = math.prod(many)
    if count > MOST_ROUNDS:
        raise node.refuse(f"its {count} index tuples are computed; supported are up to {MOST_ROUNDS}")
    indices = node.reshape(node.input(1), (count, depth))
    updates = node.reshape(node.input(2), (count, *(1 for _ in range(depth)), *shape[depth:]))
    for row in range(count):
        here = None
        for axis in range(depth):
            index = node.reshape(node.slice(node.slice(indices, 0, row, 1), 1, axis, 1), (1,) * len(shape))
            hit = _either(node, index, np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape[axis])
            here = hit if here is None else select(node, here, hit, here)
        x = _written(node, x, node.reshape(node.slice(updates, 0, row, 1), node.shape_of(updates)[1:]), here)
    return x


def _written(node: NodeImport, x: str, update: str, here: str | None) -> str:
    """x with an update, or combined with it; `here`: only there."""
    reduction = node.word("reduction", "none")
    update = update if reduction == "none" else node.binary(_COMBINE[reduction][0], x, update)
    return update if here is None else select(node, here, update, x, _kind(node))


def _either(node: NodeImport, indices: str, places: Array, size: int) -> str:
    """Where an index is that of a place, counted from the start or, if negative, from the end."""
    hits = [equal(node, indices, node.new_constant(each, "positions")) for each in (places, places - size)]
    return select(node, hits[0], hits[0], hits[1])


def _kind(node: NodeImport) -> str:
    """The type of what lies between: whole numbers of whole numbers."""
    return INTEGER if node.is_integer(0) else ""


_COMBINE = {"add": ("add", 0.0), "mul": ("mul", 1.0), "max": ("max", -math.inf), "min": ("min", math.inf)}


def _scatter(node: NodeImport, targets: Array) -> str:
    """`targets`: the position in x that each update goes to. Where several go to one, they take turns."""
    x, reduction = node.input(0), node.word("reduction", "none")
    updates, rounds = node.input(2), _rounds(targets.reshape(-1))
    if reduction == "none":
        return _overwritten(node, x, updates, targets.reshape(-1))
    if len(rounds) > MOST_ROUNDS:
        raise node.refuse(f"adds {len(rounds)} updates to one element; supported are up to {MOST_ROUNDS}")
    op, neutral = _COMBINE[reduction]
    for chosen in rounds:
        whole = len(rounds) == 1 and chosen.size == math.prod(node.shape(0)) and np.array_equal(targets.reshape(-1), np.arange(chosen.size))
        part = node.reshape(updates, node.shape(0)) if whole else _turn(node, op, x, updates, targets.reshape(-1), chosen, neutral)
        x = node.binary(op, x, part)
    return x


def _turn(node: NodeImport, op: str, x: str, updates: str, targets: Array, chosen: Array, neutral: float) -> str:
    """The chosen updates in the places that they go to, elsewhere the neutral element (of max and min: x itself)."""
    base = x if op in ("max", "min") else node.new_constant(np.full(node.shape(0), neutral), "neutral")
    picked = pick(node, updates, chosen)
    return _overwritten(node, base, picked, targets[chosen])


def tensor_scatter(node: NodeImport) -> str:
    """A cache with `update` written from the position on that the third input gives for each batch entry."""
    cache, update = node.input(0), node.input(1)
    shape, axis = node.shape(0), node.axis(node.integer("axis", -2), node.rank())
    steps = node.shape(1)[axis]
    if not node.has(2):
        rest = [node.slice(cache, axis, steps, shape[axis] - steps)] if steps < shape[axis] else []
        return node.emit("concat", (update, *rest), ops.Concat(axis)) if rest else update
    if steps > MOST_ROUNDS:
        raise node.refuse(f"writes {steps} steps; supported are up to {MOST_ROUNDS} at computed positions")
    start, circular = node.reshape(node.input(2), (shape[0], *(1 for _ in shape[1:]))), node.word("mode", "linear") == "circular"
    if circular:
        start = remainder(node, start, shape[axis])
    for step in range(steps):
        first = np.arange(shape[axis]) - step  # the position to begin at, for this step to be written here
        wanted = (first % shape[axis] if circular else first).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        cache = select(node, equal(node, start, node.new_constant(wanted, "first")), node.slice(update, axis, step, 1), cache)
    return cache


def _overwritten(node: NodeImport, x: str, updates: str, targets: Array) -> str:
    """x with the updates in its places `targets`; of several the last one wins, as in numpy."""
    shape = node.shape_of(x)
    count = math.prod(shape)
    sources = np.arange(count)
    sources[targets] = count + np.arange(targets.size)
    parts = [node.reshape(x, (count,)), node.reshape(updates, (targets.size,))]
    return pick(node, node.emit("concat", parts, ops.Concat(0)), sources.reshape(shape))


def _rounds(targets: Array) -> list[Array]:
    """The updates in groups in which no target occurs twice."""
    seen: dict[int, int] = {}
    groups: list[list[int]] = []
    for index, target in enumerate(targets.tolist()):
        turn = seen.get(target, 0)
        seen[target] = turn + 1
        if turn == len(groups):
            groups.append([])
        groups[turn].append(index)
    return [np.array(group) for group in groups]


# ---- positions as values


def ruler(node: NodeImport, shape: Sequence[int], axis: int) -> str:
    """0, 1, 2 … along an axis; 1 elsewhere."""
    return node.new_constant(np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]), "positions")


def equal(node: NodeImport, first: str, second: str) -> str:
    """Where two tensors are equal."""
    return node.emit("compare", (first, second), ops.Compare("eq"), dtype="bool")


def select(node: NodeImport, condition: str, first: str, second: str, dtype: str = "") -> str:
    """condition ? first : second."""
    return node.emit("where", (condition, first, second), ops.Attributes(), dtype=dtype or node.dtype_of(first))


def _extreme(node: NodeImport, x: str, axis: int, op: str, order: str, *, last: bool = False) -> tuple[str, str]:
    """(the largest or smallest element along an axis, its position in `order`: the first such, or the last)."""
    shape = node.shape_of(x)
    best = node.reduce(op, x, [axis])
    nowhere = node.new_constant(-1.0 if last else float(shape[axis]), "nowhere")
    places = select(node, equal(node, x, best), order, nowhere, INTEGER)
    return best, node.emit("reduce_max" if last else "reduce_min", (places,), ops.Reduce((axis,)), dtype=INTEGER)


def _arg(op: str) -> Callable[[NodeImport], str]:
    def run(node: NodeImport) -> str:
        axis = node.axis(node.integer("axis", 0), node.rank())
        order = ruler(node, node.shape(0), axis)
        _, place = _extreme(node, node.input(0), axis, op, order, last=bool(node.integer("select_last_index", 0)))
        shape = node.shape_of(place)
        return place if node.integer("keepdims", 1) else node.reshape(place, [size for i, size in enumerate(shape) if i != axis])

    return run


def hardmax(node: NodeImport) -> str:
    """1 at the first largest element along an axis (before opset 13: over all dimensions from it on), else 0."""
    x, shape = node.input(0), node.shape(0)
    axis = node.axis(node.integer("axis", -1 if node.opset >= 13 else 1), len(shape))
    if node.opset < 13:
        x, axis = node.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:]))), 1
    order = ruler(node, node.shape_of(x), axis)
    _, place = _extreme(node, x, axis, "reduce_max", order)
    return node.reshape(node.table("x", equal(node, order, place)), shape)


def top_k(node: NodeImport) -> list[str]:
    """The k largest or smallest, one after the other: what was taken is struck out."""
    axis = node.axis(node.integer("axis", -1), node.rank())
    count = node.integers_input(1, "k")[0] if node.has(1) else node.integer("k", 0)  # an attribute before opset 10
    if not 0 < count <= MOST_ROUNDS:
        raise node.refuse(f"k={count} is not from 1 to {MOST_ROUNDS}")
    largest = bool(node.integer("largest", 1))
    op, out = ("reduce_max", -math.inf) if largest else ("reduce_min", math.inf)
    x, order = node.input(0), ruler(node, node.shape(0), axis)
    gone, struck = node.new_constant(float(node.shape(0)[axis]), "gone"), node.new_constant(out, "struck")
    values, places, left = [], [], order
    for turn in range(count):
        value, place = _extreme(node, x, axis, op, left)
        values.append(value)
        places.append(place)
        if turn + 1 < count:
            taken = equal(node, order, place)
            x, left = select(node, taken, struck, x), select(node, taken, gone, left, INTEGER)
    return [node.emit("concat", values, ops.Concat(axis)), node.emit("concat", places, ops.Concat(axis), dtype=INTEGER)]


def one_hot(node: NodeImport) -> str:
    """The second value where a position along the new axis equals the index, else the first."""
    depth = int(np.asarray(node.constant(1, "depth")).reshape(-1)[0])
    axis = node.axis(node.integer("axis", -1), node.rank() + 1)
    shape = list(node.shape(0))
    shape.insert(axis, 1)
    indices = node.reshape(node.input(0), shape)
    rule = np.arange(depth).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    hit = _either(node, indices, rule, depth)
    if node.is_constant(2):
        off, on = node.floats(2, "values").reshape(-1)
        return select(node, hit, node.new_constant(on, "on"), node.new_constant(off, "off"))
    parts = [node.slice(node.input(2), 0, index, 1) for index in (1, 0)]
    return select(node, hit, parts[0], parts[1])


def trilu(node: NodeImport) -> str:
    """The upper or lower triangle of matrices; the rest is zero."""
    diagonal = int(node.integers_input(1, "k")[0]) if node.has(1) else 0
    rows, columns = node.shape(0)[-2:]
    kept = (np.triu if node.integer("upper", 1) else np.tril)(np.ones((rows, columns), bool), diagonal)
    zero = node.new_constant(np.array(False) if node.dtype_of(node.input(0)) == "bool" else 0.0, "zero")
    return select(node, node.new_constant(kept, "triangle"), node.input(0), zero, node.dtype_of(node.input(0)))


# ---- running sums and products


def cumulative_sum(node: NodeImport) -> str:
    """A product with a triangle of ones along the axis."""
    axis = node.axis(node.integers_input(1, "axis")[0], node.rank())
    steps = node.shape(0)[axis]
    if steps > LARGEST_TRIANGLE:
        raise node.refuse(f"runs over {steps} elements; supported are up to {LARGEST_TRIANGLE}")
    triangle = np.triu(np.ones((steps, steps)), 1 if node.integer("exclusive", 0) else 0)
    return along(node, node.input(0), axis, triangle.T if node.integer("reverse", 0) else triangle)


def along(node: NodeImport, x: str, axis: int, matrix: Array) -> str:
    """x times a constant matrix [old size, new size] along one axis."""
    shape = node.shape_of(x)
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    moved = node.transpose(x, order)
    rows = node.reshape(moved, (math.prod(shape) // shape[axis], shape[axis]))
    product = node.emit("matmul", (rows, node.new_constant(matrix, "matrix")), ops.MatMul())
    kept = [shape[i] for i in order[:-1]]
    return node.transpose(node.reshape(product, (*kept, matrix.shape[1])), list(np.argsort(order)))


def cumulative_product(node: NodeImport) -> str:
    """One product per step."""
    axis = node.axis(node.integers_input(1, "axis")[0], node.rank())
    steps, x = node.shape(0)[axis], node.input(0)
    if steps > MOST_ROUNDS:
        raise node.refuse(f"runs over {steps} elements; supported are up to {MOST_ROUNDS}")
    order = list(reversed(range(steps))) if node.integer("reverse", 0) else list(range(steps))
    parts = {index: node.slice(x, axis, index, 1) for index in order}
    results, total = {}, ""
    for index in order:
        if node.integer("exclusive", 0):
            results[index] = total or node.new_constant(np.ones(node.shape_of(parts[index])), "one")
        total = node.binary("mul", total, parts[index]) if total else parts[index]
        results.setdefault(index, total)
    return node.emit("concat", [results[index] for index in range(steps)], ops.Concat(axis))


COMPUTED = f"constant indices; computed ones, one by one, up to {MOST_ROUNDS}"
TABLE: tuple[Importer, ...] = (
    Importer("GatherElements", gather_elements, COMPUTED),
    Importer("GatherND", gather_nd, "constant indices"),
    Importer("Compress", compress, "constant condition"),
    Importer("ReverseSequence", reverse_sequence, "constant lengths"),
    Importer("ScatterElements", scatter_elements, COMPUTED),
    Importer("Scatter", scatter_elements, COMPUTED),
    Importer("ScatterND", scatter_nd, COMPUTED),
    Importer("TensorScatter", tensor_scatter, f"up to {MOST_ROUNDS} steps, or all from the first on"),
    Importer("ArgMax", _arg("reduce_max")),
    Importer("ArgMin", _arg("reduce_min")),
    Importer("Hardmax", hardmax),
    Importer("TopK", top_k, f"constant k up to {MOST_ROUNDS}, always sorted"),
    Importer("OneHot", one_hot, "constant depth"),
    Importer("Trilu", trilu, "constant k"),
    Importer("CumSum", cumulative_sum, f"constant axis, up to {LARGEST_TRIANGLE} steps"),
    Importer("CumProd", cumulative_product, f"constant axis, up to {MOST_ROUNDS} steps"),
)
