"""Elementwise nodes on tiles: alone, or as the epilogue of a convolution or matrix product.

The one big idea: a chain of nodes works in place on one tile; only the operands that come from outside are loaded, and a
broadcast operand is loaded once at its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from isa.program import DTYPES, Tile
from npucc import arithmetic
from npucc.graph import Node, Quant
from npucc.lowering.emitter import SLOT_ALIGNMENT, Emitter, Ring, spm_tile, windows
from npucc.lowering.layers import Group
from npucc.lowering.views import View, merge_dimensions
from npucc.ops import Binary, Clamp, Compare, Table

FEWEST_TILE_BYTES = 8192
WANTED_TILES = 4


@dataclass(frozen=True, slots=True)
class Box:
    """A strided block of a tensor's logical index space, and the order in which its dimensions stand in tiles."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    steps: tuple[int, ...] | None = None

    def of(self, view: View, shape: tuple[int, ...]) -> View:
        """The block of a view that is read or written as an operand of `shape`."""
        return view.broadcast(shape).window(self.starts, self.sizes, self.steps).permute(self.order)

    @property
    def elements(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count


def quant_pair(quant: Quant) -> tuple[float, int]:
    """(scale, zero) as instruction attributes have it."""
    return (float(quant.scale), quant.zero)


@dataclass(slots=True)
class Chain:
    """Elementwise nodes, each of which reads the result of the one before it (if any) and operands from outside."""

    emitter: Emitter
    nodes: Sequence[Node]
    shape: tuple[int, ...]
    incoming: str | None = None  # the tensor that the anchor hands over, if there is an anchor
    tables: dict[str, LoadedTable] = field(default_factory=dict)
    rings: dict[str, Ring] = field(default_factory=dict)
    values: dict[str, arithmetic.LookUp] = field(default_factory=dict)
    added: Ring | None = None  # for what is added to an interpolated table
    spare: Ring | None = None  # where a node works whose result has another width than the tile before it

    @property
    def widths(self) -> set[int]:
        """Bytes per element of every value on the way."""
        names = [node.outputs[0] for node in self.nodes] + ([self.incoming] if self.incoming is not None else [])
        names += [node.inputs[0] for node in self.nodes if isinstance(node.attributes, Table)]  # an int16 table is looked up in int16
        return {DTYPES[self.emitter.graph.quant(name).dtype] for name in names}

    def operands(self) -> list[str]:
        """Tensors from outside, each once."""
        made = {node.outputs[0] for node in self.nodes}
        names = [name for node in self.nodes for name in node.inputs if name not in made and name != self.incoming]
        return list(dict.fromkeys(names))

    def bytes_per_slot(self, box: Box) -> int:
        """Scratchpad bytes that one set of operand tiles takes for a block of these sizes."""
        graph = self.emitter.graph
        spare = box.elements * max(self.widths) if len(self.widths) > 1 else 0
        looked_up = [node for node in self.nodes if isinstance(node.attributes, Table) and not self._direct(node, node.attributes)]
        tables = sum(TABLE_BYTES[graph.quant(node.inputs[0]).dtype] for node in looked_up)
        parts = [part for node in looked_up if (part := self._values(node).missing)]
        tables += sum(2 * len(part.entries) + SLOT_ALIGNMENT for part in parts)
        return spare + tables + (2 * box.elements if parts else 0) + sum(self.operand_bytes(box))

    def operand_bytes(self, box: Box) -> list[int]:
        """Of each operand the bytes that are loaded from DRAM for a block of these sizes."""
        return [self._operand_bytes(name, box) for name in self.operands()]

    def _operand_bytes(self, name: str, box: Box) -> int:
        view = self.view(name)
        if self.emitter.tile(view).space == "spm":
            return 0
        window = box.of(view, self.shape)
        count = DTYPES[view.dtype]
        for size, stride in zip(window.shape, window.strides, strict=True):
            count *= 1 if stride == 0 else size
        return count

    def view(self, name: str) -> View:
        """An operand's view."""
        return operand_view(self.emitter, name)

    def prepare(self, largest: Box, slots: int) -> None:
        """Take scratchpad for operands of at most this block, and load the tables."""
        for name in self.operands():
            if self.emitter.tile(self.view(name)).space != "spm":
                self.rings[name] = self.emitter.ring(self._operand_bytes(name, largest), slots)
        if len(self.widths) > 1:
            self.spare = self.emitter.ring(largest.elements * max(self.widths), slots)
        for node in self.nodes:
            if isinstance(node.attributes, Table) and not self._direct(node, node.attributes):
                self.tables[node.name] = self._load_table(node)
        if any(table.missing for table in self.tables.values()):
            self.added = self.emitter.ring(2 * largest.elements, slots)

    def _direct(self, node: Node, attributes: Table) -> str:
        return arithmetic.without_table(attributes.expression, self.emitter.graph.quant(node.inputs[0]))

    def _values(self, node: Node) -> arithmetic.LookUp:
        assert isinstance(node.attributes, Table)
        if node.name not in self.values:
            source, result = (self.emitter.graph.quant(name) for name in (node.inputs[0], node.outputs[0]))
            self.values[node.name] = arithmetic.table(node.attributes.expression, source, result)
        return self.values[node.name]

    def _load_table(self, node: Node) -> LoadedTable:
        values = self._values(node)
        dtype = "s16" if values.fraction_bits else self.emitter.graph.quant(node.outputs[0]).dtype
        missing = LoadedTable(self._load_entries(values.missing, "s16"), values.missing) if values.missing else None
        return LoadedTable(self._load_entries(values, dtype), values, missing)

    def _load_entries(self, values: arithmetic.LookUp, dtype: str) -> Tile:
        view = self.emitter.constant(values.entries.astype(NUMPY[dtype]), dtype)
        return self.emitter.load(view, self.emitter.ring(view.bytes, 1))

    def apply(self, box: Box, value: Tile | None, work: Ring, result: Tile | None) -> Tile:
        """Run the nodes on one block. `value`: the incoming tile; `work` has a slot to compute in when there is none;
        the last node writes `result` if given. Returns the tile that holds the result."""
        made: dict[str, Tile] = {self.incoming: value} if self.incoming is not None and value is not None else {}
        current = value
        for position, node in enumerate(self.nodes):
            tiles = [made[name] if name in made else self._load(name, box) for name in node.inputs]
            last = position == len(self.nodes) - 1
            target = result if last and result is not None else self._target(node, box, current, work)
            if node.name in self.tables:
                self._emit_table(self.tables[node.name], target, tiles[0])
            else:
                emit_elementwise(self.emitter, node, target, tiles)
            made[node.outputs[0]] = current = target
        assert current is not None
        return current

    def _emit_table(self, table: LoadedTable, target: Tile, source: Tile) -> None:
        """One look-up, and a second one that is added where the first is rough; int16 to int8 takes another step that drops the fraction."""
        added, found = None, target
        if table.missing and self.added:
            added = spm_tile(self.added.next(), "s16", target.shape)
            look_up(self.emitter, added, source, table.missing)
        if table.values.fraction_bits:
            assert self.spare is not None
            found = spm_tile(_other_slot(self.spare, target), "s16", target.shape)
        look_up(self.emitter, found, source, table)
        if added:
            self.emitter.vector("add", found, found, added)
        if found is not target:
            self.emitter.vector("cvt", target, found, qx=(2.0**-table.values.fraction_bits, 0))

    def _target(self, node: Node, box: Box, current: Tile | None, work: Ring) -> Tile:
        """In place where the element width stays the same, else a slot of its own."""
        dtype = self.emitter.graph.quant(node.outputs[0]).dtype
        if current is not None and DTYPES[current.dtype] == DTYPES[dtype]:
            return Tile(current.space, current.address, dtype, current.shape, current.strides)
        address = work.next() if current is None or self.spare is None else _other_slot(self.spare, current)
        return spm_tile(address, dtype, [box.sizes[d] for d in box.order])

    def _load(self, name: str, box: Box) -> Tile:
        window = box.of(self.view(name), self.shape)
        ring = self.rings.get(name) or Ring((0,))
        return self.emitter.load_once(window, ring)


def _other_slot(ring: Ring, used: Tile) -> int:
    """A slot of the ring, which has two or more, that the tile does not lie in."""
    address = ring.next()
    return ring.next() if (used.space, used.address) == ("spm", address) else address


def operand_view(emitter: Emitter, name: str) -> View:
    """Where an operand lies: a computed tensor in its buffer, a constant (integers) among the constants, images channels last."""
    if name in emitter.placement.views:
        return emitter.placement.views[name]
    tensor = emitter.graph.tensors[name]
    assert tensor.data is not None
    dtype = emitter.graph.quant(name).dtype
    order = (0, 2, 3, 1) if len(tensor.shape) == 4 else tuple(range(len(tensor.shape)))
    flat = emitter.constant(tensor.data.astype(NUMPY[dtype]).transpose(order), dtype)
    inverse = [order.index(d) for d in range(len(order))]
    return flat.permute(inverse)


NUMPY = {"s8": "int8", "u8": "uint8", "s16": "int16", "s32": "int32", "s64": "int64", "f32": "float32"}


#: scratchpad bytes of a table, by the element type of its input
TABLE_BYTES = {"s8": 512, "u8": 512, "s16": 2056}


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A table in the scratchpad and how it is read."""

    tile: Tile
    values: arithmetic.LookUp
    missing: LoadedTable | None = None


def emit_elementwise(emitter: Emitter, node: Node, result: Tile, tiles: Sequence[Tile]) -> None:
    """The instruction of one elementwise node that is not looked up."""
    tiles = tuple(tiles)
    graph = emitter.graph
    quants = [graph.quant(name) for name in node.inputs]
    after = graph.quant(node.outputs[0])
    if isinstance(node.attributes, Table):
        name = arithmetic.without_table(node.attributes.expression, quants[0])
        own, operands = quant_pair(quants[0]), tiles * 2 if name == "mul" else tiles
        read = {"qa": own, "qb": own} if name == "mul" else {"qx": own}
        bounds = arithmetic.direct_bounds(node.attributes.expression, after)
        emitter.vector(name, result, *operands, **read, qy=quant_pair(after), clamp=bounds)
        return
    if isinstance(node.attributes, Compare):
        emitter.vector("cmp", result, *tiles, op=node.attributes.kind, qa=quant_pair(quants[0]), qb=quant_pair(quants[1]))
        return
    clamp: Clamp = getattr(node.attributes, "clamp", None)
    bounds = arithmetic.clamp_bounds(clamp, after)
    if len(tiles) == 3:
        emitter.vector("select", result, *tiles, qa=quant_pair(quants[1]), qb=quant_pair(quants[2]), qy=quant_pair(after), clamp=bounds)
        return
    first, second = (1, 0) if swaps_operands(node, [graph.tensors[name].shape for name in node.inputs]) else (0, 1)
    emitter.vector(
        node.op, result, tiles[first], tiles[second],
        qa=quant_pair(quants[first]), qb=quant_pair(quants[second]), qy=quant_pair(after), clamp=bounds,
        **({"offset": node.attributes.offset} if isinstance(node.attributes, Binary) and node.op in ("add", "mul") else {}),
    )  # fmt: skip


def swaps_operands(node: Node, shapes: Sequence[tuple[int, ...]]) -> bool:
    """True where a commutative node's first operand is the smaller, broadcast one: it then comes second, as in onnxruntime."""
    sizes = [_elements(shape) for shape in shapes]
    return node.op in ("add", "mul", "max", "min") and sizes[0] < sizes[1]


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def look_up(emitter: Emitter, result: Tile, source: Tile, table: LoadedTable) -> None:
    """`lut` with its tile dimensions merged."""
    shape, (left, right) = merge_dimensions(result.shape, result.strides, source.strides)
    emitter.issue(
        "lut",
        replace(result, shape=shape, strides=left),
        replace(source, shape=shape, strides=right),
        table.tile,
        base=table.values.base,
        shift=table.values.shift,
    )


def lower_elementwise(emitter: Emitter, group: Group) -> None:
    """A layer of elementwise nodes only: load operands, compute in place, store."""
    graph = emitter.graph
    shape = graph.tensors[group.result].shape
    view = emitter.placement.views[group.result]
    chain = Chain(emitter, group.nodes, shape)
    order = view.order()
    box = largest_box(shape, order, lambda sizes: _fits(emitter, chain, sizes, order))
    chain.prepare(box, 2)
    ring = emitter.ring(box.elements * max(chain.widths), 2)
    for tile in boxes(shape, box):
        window = tile.of(view, shape)
        result = emitter.result_tile(window, None) if emitter.tile(window).space == "spm" else None
        emitter.store(window, chain.apply(tile, None, ring, result))


def _fits(emitter: Emitter, chain: Chain, sizes: tuple[int, ...], order: tuple[int, ...]) -> bool:
    box = Box((0,) * len(sizes), sizes, order)
    slot = chain.bytes_per_slot(box) + box.elements * max(chain.widths) + 64 * (len(chain.operands()) + 2)
    return 2 * slot <= emitter.spm_free


def largest_box(shape: tuple[int, ...], order: tuple[int, ...], fits: Callable[[tuple[int, ...]], bool]) -> Box:
    """A block of whole inner dimensions that fits: large, but several to the tensor so that loads and stores overlap."""
    total = _elements(shape)
    wanted = max(FEWEST_TILE_BYTES, total // WANTED_TILES)
    sizes = [1] * len(shape)
    for dimension in reversed(order):
        sizes[dimension] = _largest_size(sizes, dimension, shape[dimension], wanted, fits)
        if sizes[dimension] < shape[dimension]:
            break
    return Box((0,) * len(shape), tuple(sizes), order)


def _largest_size(sizes: list[int], dimension: int, limit: int, wanted: int, fits: Callable[[tuple[int, ...]], bool]) -> int:
    """The largest size of one dimension (found by halving) within the wanted number of elements."""
    inner = _elements(sizes)
    size = max(1, min(limit, wanted // inner)) if inner < wanted else 1
    while size > 1 and not fits((*sizes[:dimension], size, *sizes[dimension + 1 :])):
        size = -(-size // 2)
    return size


def boxes(shape: tuple[int, ...], box: Box) -> Iterator[Box]:
    """The blocks of this size that cover the shape, the fastest dimension innermost."""
    ranges = [windows(shape[d], box.sizes[d]) for d in box.order]
    for combination in product(*ranges):
        starts, sizes = [0] * len(shape), [0] * len(shape)
        for dimension, (start, size) in zip(box.order, combination, strict=True):
            starts[dimension], sizes[dimension] = start, size
        yield Box(tuple(starts), tuple(sizes), box.order)
