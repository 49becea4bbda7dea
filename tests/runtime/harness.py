"""One instruction at work: place its operands in a machine's memories, execute it, and read the result.

Also the plain numpy reading of tiles, so that expected values never go through the kernels under test.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from isa.program import DTYPES, Instruction, Layer, Loop, Program, TensorRecord, Tile, Value, dense_strides
from isa.spec import SPEC
from isa.target import Target
from runtime.binder import Binder
from runtime.kernels import ENGINES, kernels_of
from runtime.memory import NUMPY, Memory
from runtime.stream import Step, make_line

TARGET = Target("test", spm_bytes=1 << 20, acc_bytes=1 << 20, dram_bytes=1 << 22)
DRAM_BYTES = 1 << 21
Array = np.ndarray[Any, Any]
INSTALLED = [engine for engine in ENGINES if engine == "numpy" or find_spec(engine)]


def program(*layers: Layer, target: Target = TARGET, inputs: tuple[TensorRecord, ...] = (), outputs: tuple[TensorRecord, ...] = (),
            tensors: tuple[TensorRecord, ...] = (), constants: tuple[int, int] = (0, 0), dram_bytes: int = DRAM_BYTES) -> Program:  # fmt: skip
    return Program(target, inputs, outputs, tensors, constants[0], constants[1], dram_bytes, layers)


def layer(name: str, *body: Instruction | Loop, op: str = "test") -> Layer:
    return Layer(name, op, (name,), 0, body)


def instruction(name: str, *tiles: Tile, **attributes: Value) -> Instruction:
    return Instruction(name, tiles, tuple(attributes.items()))


def padded_strides(shape: tuple[int, ...], dtype: str, gap: int) -> tuple[int, ...]:
    """Strides of a tile whose rows are `gap` elements longer than they need be."""
    wider = (*shape[:-1], shape[-1] + gap) if shape else ()
    return dense_strides(wider, dtype)


def execute(
    name: str, operands: dict[str, Array], *, result: tuple[tuple[int, ...], str], before: Array | None = None, gap: int = 0,
    constant: tuple[str, ...] = (), broadcast: tuple[str, ...] = (), **attributes: Value,
) -> Array:  # fmt: skip
    """The result of one instruction on operands given in the table's order: the same from every engine that is installed.

    `gap` spreads the rows of every tile; operands in `constant` are loaded from constants by `ld` first; those in `broadcast` have size-1
    dimensions expanded by strides of 0 to the result's shape; `before` is what the result tile held.
    """
    results = [
        _execute(engine, name, operands, result, before=before, gap=gap, constant=constant, broadcast=broadcast, attributes=attributes)
        for engine in INSTALLED
    ]  # fmt: skip
    for other in results[1:]:
        assert other.tobytes() == results[0].tobytes()
    return results[0]


def _execute(
    engine: str, name: str, operands: dict[str, Array], result: tuple[tuple[int, ...], str], *, before: Array | None, gap: int,
    constant: tuple[str, ...], broadcast: tuple[str, ...], attributes: dict[str, Value],
) -> Array:  # fmt: skip
    memories = {"dram": Memory("dram", DRAM_BYTES), "spm": Memory("spm", TARGET.spm_bytes), "acc": Memory("acc", TARGET.acc_bytes)}
    spec = SPEC[name]
    place = dict.fromkeys(memories, 64)
    tiles: list[Tile] = []
    loads: list[Instruction] = []
    contents: list[tuple[Array, Array]] = []
    for operand in spec.operands:
        given = operands.get(operand.name)
        if given is None and operand is not spec.operands[0]:
            continue
        shape, dtype = result if given is None else (given.shape, next(key for key, value in NUMPY.items() if value == given.dtype))
        strides = padded_strides(shape, dtype, gap if operand.name not in constant else 0)
        tile = Tile(operand.spaces[0], place[operand.spaces[0]], dtype, shape, strides)
        place[operand.spaces[0]] = tile.extent()[1] + (-tile.extent()[1] % 16) + 16
        if given is not None and operand.name in constant:
            source = Tile.dense("dram", 1 << 16 | len(tiles) << 18, dtype, shape)
            memories["dram"].view(source, source.address)[...] = given
            loads.append(instruction("ld", tile, source))
        elif given is not None:
            contents.append((memories[tile.space].view(tile, tile.address), given))
        elif before is not None:
            contents.append((memories[tile.space].view(tile, tile.address), before))
        tiles.append(_expanded(tile, result[0]) if operand.name in broadcast else tile)
    steps = [*loads, instruction(name, *tiles, **attributes)]
    binder = Binder(program(layer("only", *steps), constants=(1 << 16, 1 << 20)), memories, {}, known_order=True, kernels=kernels_of(engine))
    closures = [binder.bind(number, Step(make_line(step), (), 0), number) for number, step in enumerate(steps)]
    for view, values in contents:  # after binding: a kernel must not have looked at them before
        view[...] = values
    for closure in closures:
        closure()
    got: Array = memories[tiles[0].space].view(tiles[0], tiles[0].address).copy()
    return got


def _expanded(tile: Tile, shape: tuple[int, ...]) -> Tile:
    strides = tuple(0 if size == 1 else stride for size, stride in zip(tile.shape, tile.strides, strict=True))
    return Tile(tile.space, tile.address, tile.dtype, shape, strides)


def limits(dtype: str) -> tuple[int, int]:
    return -(1 << (8 * DTYPES[dtype] - 1)), (1 << (8 * DTYPES[dtype] - 1)) - 1


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "s8") -> Array:
    """Random stored values, with many at the ends of the range."""
    low, high = (0, 255) if dtype == "u8" else limits(dtype)
    values = rng.integers(low, high, shape, endpoint=True)
    extreme = rng.random(shape) < 0.2
    values[extreme] = rng.choice([low, high, 0, -1 if low else 1], int(extreme.sum()))
    return values.astype(NUMPY[dtype])
