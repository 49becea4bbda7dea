"""The machine as a whole: memories that cannot be left, boundaries, orders, named tensors, several samples at once."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isa.program import Event, Instruction, Layer, Loop, Program, TensorRecord, Tile, dense_strides
from isa.target import Target
from runtime import Machine, RuntimeFault
from runtime.binder import Writers
from runtime.memory import Memory
from runtime.stream import program_order, random_order, unrolled
from tests.runtime.harness import INSTALLED, instruction, integers, layer, program

TARGET = Target("test", rows=4, cols=4, spm_bytes=1 << 16, acc_bytes=1 << 14, dram_bytes=1 << 20)


def after(item: Instruction, *, waits: tuple[Event, ...] = (), signals: tuple[Event, ...] = ()) -> Instruction:
    return replace(item, waits=waits, signals=signals)


def nhwc(address: int, channels: int, height: int, width: int, *, space: str = "dram", dtype: str = "s8") -> Tile:
    """A [1, C, H, W] tensor whose channels lie side by side."""
    return Tile(space, address, dtype, (1, channels, height, width), (height * width * channels, 1, width * channels, channels))


def conv_program(*, rows: int = 8, tiles: int = 4) -> tuple[Program, bytes, np.ndarray[Any, Any]]:
    """A 3x3 convolution of 8 channels over row tiles, ping and pong, then a ReLU layer that reads what it stored; the weights."""
    rng = np.random.default_rng(2)
    weights, bias = integers(rng, (3, 3, 8, 8)), rng.integers(-9000, 9000, 8).astype(np.int32)
    scales = (rng.random(8) * 0.001).astype(np.float32)
    constants = weights.tobytes() + bias.tobytes() + scales.tobytes()
    height = rows * tiles
    line = 10 * 8
    ld, mm, vec, st = (Event(queue) for queue in ("ld", "mm", "vec", "st"))
    loads = (
        after(instruction("ld", Tile.dense("spm", 0x8000, "s8", (3, 3, 8, 8)), Tile.dense("dram", 0x40000, "s8", (3, 3, 8, 8)))),
        after(instruction("ld", Tile.dense("spm", 0x9000, "s32", (8,)), Tile.dense("dram", 0x40240, "s32", (8,)))),
        after(instruction("ld", Tile.dense("spm", 0x9100, "f32", (8,)), Tile.dense("dram", 0x40260, "f32", (8,))), signals=(vec,)),
    )

    def tile_of_rows(index: int) -> list[Instruction]:
        top, bottom = int(index == 0), int(index == tiles - 1)
        first, count = index * rows - 1 + top, rows + 2 - top - bottom
        slot = 0x1000 * (index % 2)
        source = Tile.dense("dram", first * line, "s8", (count, 10, 8))
        x, y = Tile.dense("spm", slot, "s8", (count, 10, 8)), Tile.dense("acc", slot, "s32", (rows, 10, 8))
        result = Tile.dense("spm", 0x4000 + slot, "s8", (rows, 10, 8))
        stored = Tile.dense("dram", 0x10000 + index * rows * line, "s8", (rows, 10, 8))
        w, b = Tile.dense("spm", 0x8000, "s8", (3, 3, 8, 8)), Tile.dense("spm", 0x9000, "s32", (8,))
        s = Tile.dense("spm", 0x9100, "f32", (8,))
        once, again, more = (ld,) * (index == 0), index >= 2, index < tiles - 2
        conv = instruction("conv", y, x, w, b, pad=(top, 1, bottom, 1), zero=-3)
        return [
            after(instruction("ld", x, source), waits=(mm,) * again, signals=(mm,)),
            after(conv, waits=(ld, *(vec,) * again), signals=(*(ld,) * more, vec)),
            after(instruction("requant", result, y, s, zero=4), waits=(mm, *once, *(st,) * again), signals=(*(mm,) * more, st)),
            after(instruction("st", stored, result), waits=(vec,), signals=(vec,) if more else (ld,) * (index == tiles - 1)),
        ]

    whole = Tile.dense("spm", 0xA000, "s8", (height, 10, 8))
    second = (
        after(instruction("ld", whole, Tile.dense("dram", 0x10000, "s8", whole.shape)), waits=(st,), signals=(vec,)),
        after(instruction("max", whole, whole, qa=(0.1, 4), qy=(0.1, 4), imm=0.0), waits=(ld,), signals=(st,)),
        after(instruction("st", Tile.dense("dram", 0x20000, "s8", whole.shape), whole), waits=(vec,)),
    )
    first = loads + tuple(itertools.chain(*(tile_of_rows(index) for index in range(tiles))))
    built = program(
        Layer("conv", "conv", ("Conv_0",), 0, first),
        Layer("relu", "max", ("Relu_1",), 0, second),
        target=TARGET,
        inputs=(TensorRecord("image", nhwc(0, 8, height, 10), 0.05, -3),),
        outputs=(TensorRecord("out", nhwc(0x20000, 8, height, 10), 0.1, 4),),
        tensors=(
            TensorRecord("image_again", nhwc(0, 8, height, 10), 0.05, -3),
            TensorRecord("middle", nhwc(0x10000, 8, height, 10), 0.1, 4, layer="conv"),
        ),
        constants=(0x40000, len(constants)),
        dram_bytes=0x41000,
    )
    return built, constants, weights


def reference(weights: Any, constants: bytes, image: Any) -> tuple[Any, Any]:
    """(conv, relu) as stored, in [C, H, W]."""
    stored = np.clip(np.rint(image[0] / np.float32(0.05)) - 3, -128, 127).astype(np.int64)
    bias, scales = np.frombuffer(constants[576:608], np.int32), np.frombuffer(constants[608:640], np.float32)
    height, width = stored.shape[1:]
    padded = np.full((8, height + 2, width + 2), -3, np.int64)
    padded[:, 1:-1, 1:-1] = stored
    total = np.zeros((8, height, width), np.int64) + bias[:, None, None]
    for k, m in np.ndindex(3, 3):
        total += np.einsum("cn,chw->nhw", weights[k, m].astype(np.int64), padded[:, k : k + height, m : m + width])
    middle = np.clip(np.rint(total.astype(np.float32) * scales[:, None, None]) + 4, -128, 127)
    return middle, np.maximum(middle, 4)


@pytest.fixture(scope="module")
def image() -> Any:
    return np.random.default_rng(0).normal(size=(1, 8, 32, 10)).astype(np.float32) * 2


def test_a_tiled_convolution_end_to_end(image: Any) -> None:
    built, constants, weights = conv_program()
    middle, result = reference(weights, constants, image)
    machine = Machine(built, constants)
    for _ in range(2):  # a machine carries nothing from one run to the next
        run = machine.run({"image": image}, dump=True)
        np.testing.assert_array_equal(run.raw["out"][0], result)
        np.testing.assert_array_equal(run.outputs["out"], (run.raw["out"].astype(np.float32) - 4) * np.float32(0.1))
        np.testing.assert_array_equal(run.tensors["middle"][0], middle)
        np.testing.assert_array_equal(run.tensors["image_again"][0], np.clip(np.rint(image[0] / np.float32(0.05)) - 3, -128, 127))
    assert machine.run({"image": image}, dump={"middle"}).tensors.keys() == {"middle"}
    seen: list[str] = []
    machine.run({"image": image}, dump=lambda record, _: seen.append(record.name))
    assert seen == ["image_again", "middle"]
    with pytest.raises(RuntimeFault, match="no tensor 'nowhere'"):
        machine.run({"image": image}, dump={"nowhere"})


def test_random_orders_give_the_same_bytes(image: Any) -> None:
    built, constants, _ = conv_program()
    machine = Machine(built, constants)
    expected = machine.run({"image": image}).raw["out"]
    steps = unrolled(built)
    assert len({tuple(random_order(steps, seed)) for seed in range(20)}) > 10
    for seed in range(20):
        np.testing.assert_array_equal(machine.run({"image": image}, order="random", seed=seed).raw["out"], expected)


def test_a_missing_event_is_found_by_random_order(image: Any) -> None:
    """Without the events between store and the next layer's load, some order reads too early."""
    built, constants, _ = conv_program()
    expected = Machine(built, constants).run({"image": image}).raw["out"]

    def loosen(item: Instruction | Loop) -> Instruction | Loop:
        assert isinstance(item, Instruction)
        return replace(
            item,
            waits=tuple(event for event in item.waits if event.queue != "st"),
            signals=tuple(event for event in item.signals if event.queue != "ld" or item.name != "st"),
        )

    layers = tuple(replace(each, body=tuple(loosen(item) for item in each.body)) for each in built.layers)
    broken = Machine(replace(built, layers=layers), constants)
    assert any(not np.array_equal(broken.run({"image": image}, order="random", seed=seed).raw["out"], expected) for seed in range(30))


def test_many_samples_on_several_machines(image: Any) -> None:
    built, constants, _ = conv_program()
    samples = [{"image": image * factor} for factor in (0.5, 1, 1.5, 2, 2.5, 3, -1)]
    machine = Machine(built, constants)
    alone = [run.raw["out"] for run in machine.run_many(samples)]
    together = list(machine.run_many(samples, workers=2, dump={"middle"}))
    assert all(np.array_equal(run.raw["out"], other) for run, other in zip(together, alone, strict=True))
    assert together[0].report == machine.report
    assert together[0].tensors.keys() == {"middle"}
    with pytest.raises(RuntimeFault, match="missing: 'image'"):
        list(machine.run_many([{}], workers=2))
    with pytest.raises(RuntimeFault, match="can't call one function"):
        machine.run_many(samples, workers=2, dump=lambda *_: None)


# ---- boundaries --------------------------------------------------------------------------------------------------------


def copy_program(record: TensorRecord, output: TensorRecord) -> Program:
    """A program that moves its input to its output."""
    flat = Tile.dense("spm", 0, record.tile.dtype, record.tile.shape)
    return program(
        layer("copy", instruction("ld", flat, record.tile), instruction("st", output.tile, flat)),
        target=TARGET,
        inputs=(record,),
        outputs=(output,),
        dram_bytes=4096,
    )


def copied(value: Any, *, dtype: str, outside: str, scale: float = 1.0, zero: int = 0) -> tuple[Any, Any]:
    shape = np.asarray(value).shape
    record = TensorRecord("x", Tile.dense("dram", 64, dtype, shape), scale, zero, dtype=outside)
    run = Machine(copy_program(record, replace(record, name="y", tile=Tile.dense("dram", 2048, dtype, shape)))).run({"x": value})
    return run.raw["y"], run.outputs["y"]


def test_inputs_are_quantized_by_the_stated_formula() -> None:
    value = np.array([0.05, 0.15, -0.15, 1e9, -np.inf, 0.1, 3.0], np.float32)
    raw, real = copied(value, dtype="s8", outside="float32", scale=0.1, zero=-3)
    expected = np.clip(np.rint(value / np.float32(0.1)) + np.float32(-3), -128, 127).astype(np.int8)
    assert raw.tolist() == expected.tolist()
    assert real.dtype == np.float32
    assert real.tolist() == ((expected.astype(np.float32) + 3) * np.float32(0.1)).tolist()


def test_inputs_are_divided_not_multiplied_by_the_reciprocal() -> None:
    """x · (1/s) would differ in some of these."""
    scale = 0.0123
    value = ((np.arange(-127, 127) + 0.5) * scale).astype(np.float32)
    raw, _ = copied(value, dtype="s8", outside="float32", scale=scale)
    assert raw.tolist() == np.rint(value / np.float32(scale)).tolist()
    assert raw.tolist() != np.rint(value * np.float32(1 / scale)).tolist()


def test_integers_and_booleans_keep_their_type() -> None:
    raw, real = copied(np.array([0, 255, 7], np.uint8), dtype="s8", outside="uint8", zero=-128)
    assert raw.tolist() == [-128, 127, -121]
    assert real.dtype == np.uint8
    assert real.tolist() == [0, 255, 7]
    raw, real = copied(np.array([True, False]), dtype="u8", outside="bool")
    assert raw.tolist() == [1, 0]
    assert real.dtype == bool
    raw, real = copied(np.array([2**31 - 1, -5]), dtype="s32", outside="int64")
    assert real.dtype == np.int64
    assert real.tolist() == [2**31 - 1, -5]
    raw, real = copied(np.array([1.5, -0.0, 3e38]), dtype="f32", outside="float32")
    assert real.tolist() == np.array([1.5, -0.0, 3e38], np.float32).tolist()


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "missing: 'image'"),
        ({"image": np.zeros((1, 8, 32, 10)), "mask": 1}, "unknown: 'mask'"),
        ({"image": np.zeros((8, 32, 10))}, r"shape \[8, 32, 10\]"),
        ({"image": np.full((1, 8, 32, 10), np.nan)}, "NaN"),
        ({"image": np.full((1, 8, 32, 10), "x")}, "holds <U1"),
        ({"image": np.zeros((1, 8, 32, 10), complex)}, "holds complex128"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(feed: dict[str, Any], message: str) -> None:
    built, constants, _ = conv_program()
    with pytest.raises(RuntimeFault, match=message):
        Machine(built, constants).run(feed)


def test_integers_outside_the_stored_range_are_refused() -> None:
    with pytest.raises(RuntimeFault, match="values from 0 to 300"):
        copied(np.array([0, 300]), dtype="s8", outside="int64")
    with pytest.raises(RuntimeFault, match="fractions"):
        copied(np.array([0.5]), dtype="s8", outside="int64")


# ---- hostile programs --------------------------------------------------------------------------------------------------


def run_one(*items: Instruction | Loop, **fields: Any) -> None:
    Machine(program(layer("bad", *items), **{"target": TARGET, "dram_bytes": 4096, **fields})).run({})


SPM = TARGET.spm_bytes
GOOD = Tile.dense("spm", 0, "s8", (16,))


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (Tile.dense("dram", 4090, "s8", (16,)), "touches bytes 4090 to 4106"),
        (Tile.dense("dram", -1, "s8", (16,)), "touches bytes -1 to 15"),
        (Tile("dram", 8, "s8", (16,), (-1,)), "touches bytes -7 to 9"),
        (Tile("dram", 0, "s8", (16,), (2**62,)), "touches bytes"),
        (Tile("dram", 2**70, "s8", (16,), (1,)), "touches bytes"),
    ],
)
def test_tiles_cannot_leave_their_memory(tile: Tile, message: str) -> None:
    with pytest.raises(RuntimeFault, match=message):
        run_one(instruction("ld", GOOD, tile))


def test_results_may_interleave() -> None:
    """Strides that cross without a common byte, which the checker lets pass too."""
    run_one(instruction("ld", Tile("spm", 0, "s8", (4, 4), (5, 4)), Tile.dense("dram", 0, "s8", (4, 4))))


def test_every_iteration_of_a_loop_is_checked() -> None:
    walking = Tile("dram", 0, "s8", (16,), (1,), (1024,))
    run_one(Loop(4, (instruction("ld", GOOD, walking),)))
    with pytest.raises(RuntimeFault, match="touches bytes 4096 to 4112"):
        run_one(Loop(5, (instruction("ld", GOOD, walking),)))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((instruction("ld", Tile.dense("spm", 2, "s32", (4,)), Tile.dense("dram", 0, "s32", (4,))),), "is not aligned"),
        ((instruction("ld", Tile.dense("spm", 0, "s32", (4,)), Tile("dram", 0, "s32", (4,), (6,))),), "is not aligned"),
        ((instruction("ld", Tile("spm", 0, "s8", (4, 4), (2, 1)), Tile.dense("dram", 0, "s8", (4, 4))),), "elements of the result share bytes"),
        ((instruction("ld", Tile.dense("spm", 0, "s8", (0,)), Tile.dense("dram", 0, "s8", (0,))),), "can't be read or written"),
        ((instruction("ld", GOOD),), "ld has 1 operand, expected 2"),
        ((instruction("ld", GOOD, Tile.dense("spm", 64, "s8", (16,))),), "operand x of ld is in spm"),
        ((instruction("ld", GOOD, Tile.dense("dram", 64, "u8", (16,))),), "operand y holds s8, but operand x holds u8"),
        ((instruction("ld", GOOD, Tile.dense("dram", 64, "s8", (4, 4))),), r"operand x has shape \[4,4\], but operand y has \[16\]"),
        ((instruction("leap", GOOD),), "unknown instruction 'leap'"),
        ((Loop(10**12, (instruction("fill", GOOD),)),), "executes 1000000000000 instructions"),
        ((Loop(0, (instruction("fill", GOOD),)),), "a loop of 0 times"),
        ((instruction("fill", GOOD, value=10**30),), "fill: value is 1000"),
        ((instruction("reduce", Tile.dense("spm", 0, "s32", (1, 1)), Tile("spm", 0, "s8", (2**20, 2**20), (0, 0))),), "can't be read or written"),
    ],
)
def test_hostile_programs_are_refused(items: tuple[Instruction | Loop, ...], message: str) -> None:
    with pytest.raises(RuntimeFault, match=message):
        run_one(*items)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dram_bytes": 2**46, "target": replace(TARGET, dram_bytes=2**47)}, "the dram memory has"),
        ({"dram_bytes": 2**30}, "uses 1073741824 bytes of dram"),
        ({"constants": (4000, 0)}, ""),
        ({"constants": (5000, 0)}, "the constants lie at 5000 to 5000"),
        ({"constants": (0, 10)}, "the constants have 0 bytes"),
        ({"tensors": (TensorRecord("t", GOOD, 1.0, 0, layer="nowhere"),)}, "layer 'nowhere', which does not exist"),
    ],
)
def test_impossible_memories_are_refused(fields: dict[str, Any], message: str) -> None:
    if not message:
        run_one(instruction("fill", GOOD), **fields)
        return
    with pytest.raises(RuntimeFault, match=message):
        run_one(instruction("fill", GOOD), **fields)


def test_deadlocks_are_named() -> None:
    with pytest.raises(RuntimeFault, match=r"deadlock: vec at line 7 \(fill\) waits for ld\.3"):
        run_one(replace(after(instruction("fill", GOOD), waits=(Event("ld", 3),)), line=7))


def test_a_wait_before_its_signal_in_the_text_holds_its_queue_back() -> None:
    vec, ld = Event("vec"), Event("ld")
    source = Tile.dense("dram", 0, "s8", (16,))
    built = program(
        layer(
            "late",
            after(instruction("fill", GOOD, value=5.0), waits=(ld,)),
            instruction("fill", replace(GOOD, address=16), value=6.0),
            after(instruction("ld", GOOD, source), signals=(vec,)),
        ),
        target=TARGET,
        dram_bytes=4096,
    )
    assert program_order(unrolled(built)) == [2, 0, 1]


# ---- what is known at load time ----------------------------------------------------------------------------------------


def test_writers_agree_with_a_byte_array() -> None:
    rng = np.random.default_rng(4)
    writers, truth = Writers(), np.full(200, -1)
    for step in range(400):
        low = int(rng.integers(0, 190))
        high = int(rng.integers(low + 1, min(200, low + 40) + 1))
        if rng.random() < 0.5:
            writers.write(low, high, step)
            truth[low:high] = step
        else:
            assert writers.last(low, high) == truth[low:high].max()
            assert writers.only(low, high) == (truth[low] if (truth[low:high] == truth[low]).all() else -1)


def test_results_over_their_own_operands() -> None:
    """s8 results written over the s32 values they are computed from, and shifted over themselves: more than one piece of work."""
    count = 100_000
    values = (np.arange(count, dtype=np.int32) * 7 % 120) - 60
    source, target = Tile.dense("dram", 0, "s32", (1, count)), Tile.dense("dram", 4 * count, "s8", (1, count))
    wide, narrow = Tile.dense("spm", 0, "s32", (1, count)), Tile.dense("spm", 0, "s8", (1, count))
    shifted = Tile.dense("spm", 4, "s8", (1, count))
    body = (
        instruction("ld", wide, source),
        instruction("requant", narrow, wide, scale=2.0),
        instruction("cvt", shifted, narrow),
        instruction("st", target, shifted),
    )
    built = program(
        layer("in place", *body),
        target=replace(TARGET, spm_bytes=1 << 19),
        inputs=(TensorRecord("x", source, 1.0, 0, dtype="int32"),),
        outputs=(TensorRecord("y", target, 1.0, 0),),
        dram_bytes=1 << 19,
    )
    np.testing.assert_array_equal(Machine(built).run({"x": values[None]}).raw["y"], 2 * values[None])


def dot(weights: Tile, result: int, *, conv: tuple[int, ...] = (1, 1, 4, 1)) -> list[Instruction]:
    """The sum of weights times the four bytes at %64, into the s16 at %(128 + result)."""
    y = Tile.dense("acc", result, "s32", (1, 1, 1))
    return [
        instruction("conv", y, Tile.dense("spm", 64, "s8", (1, 1, 4)), replace(weights, shape=conv, strides=dense_strides(conv, "s8"))),
        instruction("requant", Tile.dense("spm", 128 + result, "s16", (1, 1, 1)), y),
    ]


OUT = Tile.dense("dram", 256, "s16", (3,))
STORE = instruction("st", OUT, Tile("spm", 128, "s16", (3,), (4,)))
ONES = instruction("fill", Tile.dense("spm", 64, "s8", (1, 1, 4)), value=1.0)
SLOT = Tile.dense("spm", 0, "s8", (4,))


def three_dots(*body: Instruction, constants: bytes = b"", inputs: tuple[TensorRecord, ...] = ()) -> Machine:
    built = program(
        layer("dots", *body, STORE),
        target=TARGET,
        inputs=inputs,
        outputs=(TensorRecord("y", OUT, 1.0, 0),),
        constants=(0, len(constants)),
        dram_bytes=4096,
    )
    return Machine(built, constants)


def test_different_constants_in_one_place() -> None:
    """Three loads into the same scratchpad bytes: another address, and other strides from the same address."""
    loads = [instruction("ld", SLOT, Tile("dram", address, "s8", (4,), (step,))) for address, step in ((0, 1), (4, 1), (0, 2))]
    machine = three_dots(ONES, loads[0], *dot(SLOT, 0), loads[1], *dot(SLOT, 4), loads[2], *dot(SLOT, 8), constants=bytes(range(8)))
    assert machine.run({}).raw["y"].tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 0 + 2 + 4 + 6]


def test_weights_from_inputs_are_not_constants() -> None:
    record = TensorRecord("w", Tile.dense("dram", 512, "s8", (4,)), 1.0, 0, dtype="int8")
    machine = three_dots(ONES, instruction("ld", SLOT, record.tile), *dot(SLOT, 0), *dot(SLOT, 4), *dot(SLOT, 8), inputs=(record,))
    for values in ((1, 2, 3, 4), (5, 6, 7, 8)):
        assert machine.run({"w": np.array(values, np.int8)}).raw["y"].tolist() == [sum(values)] * 3


def test_an_input_that_changes_is_gathered_again() -> None:
    """The same tile is read three times; before the third, one byte of it changes."""
    change = instruction("fill", Tile.dense("spm", 65, "s8", (1,)), value=11.0)
    load = instruction("ld", SLOT, Tile.dense("dram", 0, "s8", (4,)))
    machine = three_dots(ONES, load, *dot(SLOT, 0), *dot(SLOT, 4), change, *dot(SLOT, 8), constants=bytes([1, 2, 3, 4]))
    for _ in range(2):
        assert machine.run({}).raw["y"].tolist() == [10, 10, 1 + 22 + 3 + 4]


def test_one_constant_used_in_several_ways() -> None:
    """The same weights by convolutions of one and of two groups, by depthwise ones of two widths; scales with rows of equal number."""
    rng = np.random.default_rng(8)
    weights, first, second = integers(rng, (3, 3, 2, 4)), (rng.random(4) * 0.01).astype(np.float32), (rng.random(4) * 0.02).astype(np.float32)
    constants = weights.tobytes() + bytes(8) + first.tobytes() + second.tobytes()
    image = integers(rng, (7, 7, 8))
    record = TensorRecord("x", Tile.dense("dram", 512, "s8", image.shape), 1.0, 0, dtype="int8")
    w = Tile.dense("spm", 1024, "s8", weights.shape)
    depthwise = Tile.dense("spm", 1024, "s8", (3, 3, 8))
    body = [
        instruction("ld", Tile.dense("spm", 0, "s8", image.shape), record.tile),
        instruction("ld", w, Tile.dense("dram", 0, "s8", weights.shape)),
        *(instruction("ld", Tile.dense("spm", 1536 + 16 * n, "f32", (4,)), Tile.dense("dram", 80 + 16 * n, "f32", (4,))) for n in (0, 1)),
    ]
    results = []
    for number, (name, channels, width, attributes) in enumerate(
        [("conv", 2, 5, {}), ("conv", 4, 5, {"groups": 2}), ("dwconv", 8, 5, {}), ("dwconv", 8, 3, {})]
    ):
        outputs = 8 if name == "dwconv" else 4
        y = Tile.dense("acc", 0, "s32", (5, width, outputs))
        x = Tile("spm", 0, "s8", (7, width + 2, channels), (56, 8, 1))
        out = Tile.dense("spm", 2048 + 256 * number, "s8", (5, width, outputs))
        scales = () if name == "dwconv" else (Tile.dense("spm", 1536 + 16 * number, "f32", (4,)),)
        body += [instruction(name, y, x, depthwise if name == "dwconv" else w, **attributes), instruction("requant", out, y, *scales, scale=0.01)]
        stored = replace(out, space="dram", address=1024 + 256 * number)
        body.append(instruction("st", stored, out))
        results.append(TensorRecord(f"y{number}", stored, 1.0, 0))
    built = program(layer("all", *body), target=TARGET, inputs=(record,), outputs=tuple(results), constants=(0, len(constants)), dram_bytes=4096)
    raw = Machine(built, constants).run({"x": image}).raw
    stored_image, w64 = image.astype(np.int64), weights.astype(np.int64)
    per_channel = w64.reshape(3, 3, 8)
    for number in range(4):
        width = 3 if number == 3 else 5
        total = np.zeros(results[number].tile.shape, np.int64)
        for k, m in np.ndindex(3, 3):
            pixels = stored_image[k : k + 5, m : m + width]
            if number == 0:
                total += pixels[..., :2] @ w64[k, m]
            elif number == 1:
                total += np.concatenate([pixels[..., :2] @ w64[k, m][:, :2], pixels[..., 2:4] @ w64[k, m][:, 2:]], axis=-1)
            else:
                total += pixels * per_channel[k, m]
        scale = (first, second, np.float32(0.01), np.float32(0.01))[number]
        expected = np.clip(np.rint(total.astype(np.float32) * scale), -128, 127)
        np.testing.assert_array_equal(raw[f"y{number}"], expected, err_msg=f"result {number}")


def test_nothing_is_left_over_from_the_run_before() -> None:
    """A sum that starts with whatever the accumulator holds: zero at the start of every run."""
    body = dot(SLOT, 0)
    adding = replace(body[0], attributes=(("accumulate", 1),))
    load = instruction("ld", SLOT, Tile.dense("dram", 0, "s8", (4,)))
    machine = three_dots(ONES, load, adding, body[1], constants=bytes([1, 2, 3, 4]))
    for _ in range(3):
        assert machine.run({}).raw["y"].tolist() == [10, 0, 0]


def test_a_layer_without_instructions_is_complete_with_the_one_before(image: Any) -> None:
    built, constants, _ = conv_program()
    layers = (built.layers[0], Layer("view", "reshape", ("Reshape_0",), 0, ()), built.layers[1])
    middle = built.tensors[1]
    again = replace(built, layers=layers, tensors=(middle, replace(middle, name="viewed", layer="view")))
    run = Machine(again, constants).run({"image": image}, dump=True)
    np.testing.assert_array_equal(run.tensors["viewed"], run.tensors["middle"])
    assert run.tensors["viewed"].any()


def test_waiting_twice_for_one_event_takes_two_signals() -> None:
    ld, vec = Event("ld"), Event("vec")
    load = after(instruction("ld", GOOD, Tile.dense("dram", 0, "s8", (16,))), signals=(vec,))
    built = program(layer("a", load, after(instruction("fill", GOOD), waits=(ld, ld)), load), target=TARGET, dram_bytes=4096)
    assert program_order(unrolled(built)) == [0, 2, 1]
    assert all(random_order(unrolled(built), seed) == [0, 2, 1] for seed in range(5))


def test_weights_that_are_overwritten_are_not_taken_for_constants() -> None:
    """The second conv reads weights that a fill has changed; the third reads them loaded again, at an offset."""
    weights = np.arange(1, 9, dtype=np.int8)
    load = instruction("ld", Tile.dense("spm", 0, "s8", (8,)), Tile.dense("dram", 0, "s8", (8,)))
    ones = instruction("fill", Tile.dense("spm", 64, "s8", (1, 1, 4)), value=1.0)

    def conv(address: int, result: int) -> list[Instruction]:
        y = Tile.dense("acc", result, "s32", (1, 1, 1))
        return [
            instruction("conv", y, Tile.dense("spm", 64, "s8", (1, 1, 4)), Tile.dense("spm", address, "s8", (1, 1, 4, 1))),
            instruction("requant", Tile.dense("spm", 128 + result, "s16", (1, 1, 1)), y),
        ]

    change = instruction("fill", Tile.dense("spm", 2, "s8", (1,)), value=100.0)
    out = Tile.dense("dram", 256, "s16", (3,))
    built = program(
        layer("convs", load, ones, *conv(0, 0), change, *conv(0, 4), load, *conv(3, 8), instruction("st", out, Tile("spm", 128, "s16", (3,), (4,)))),
        target=TARGET,
        outputs=(TensorRecord("y", out, 1.0, 0),),
        constants=(0, 8),
        dram_bytes=4096,
    )
    assert Machine(built, weights.tobytes()).run({}).raw["y"].tolist() == [1 + 2 + 3 + 4, 1 + 2 + 100 + 4, 4 + 5 + 6 + 7]


def test_constants_that_the_program_stores_over() -> None:
    load = instruction("ld", Tile.dense("spm", 0, "s8", (1, 1, 4, 1)), Tile.dense("dram", 0, "s8", (1, 1, 4, 1)))
    ones = instruction("fill", Tile.dense("spm", 64, "s8", (1, 1, 4)), value=1.0)
    y = Tile.dense("acc", 0, "s32", (1, 1, 1))
    conv = instruction("conv", y, Tile.dense("spm", 64, "s8", (1, 1, 4)), Tile.dense("spm", 0, "s8", (1, 1, 4, 1)))
    result = Tile.dense("spm", 128, "s8", (1, 1, 1))
    store = instruction("st", Tile.dense("dram", 0, "s8", (1, 1, 1)), result)
    built = program(
        layer("twice", load, ones, conv, instruction("requant", result, y), store, load, conv, instruction("requant", result, y), store),
        target=TARGET,
        outputs=(TensorRecord("y", Tile.dense("dram", 0, "s8", (1,)), 1.0, 0),),
        constants=(0, 4),
        dram_bytes=4096,
    )
    machine = Machine(built, bytes([1, 2, 3, 4]))
    for _ in range(2):
        assert machine.run({}).raw["y"].tolist() == [10 + 2 + 3 + 4]


@pytest.mark.parametrize("engine", INSTALLED)
def test_what_is_made_of_weights_lasts_as_long_as_they_do(engine: str) -> None:
    """Products by A, A, B, A and by weights that come with the inputs, then A: each by its own, in every run."""
    rng = np.random.default_rng(0)
    matrices = rng.integers(-128, 128, (2, 20, 24)).astype(np.int8)
    size, rows = matrices[0].size, 7
    a, w = Tile.dense("spm", 0, "s8", (rows, 20)), Tile.dense("spm", 1024, "s8", (20, 24))
    places = {"a": Tile.dense("dram", 4096, "s8", (rows, 20)), "live": Tile.dense("dram", 8192, "s8", (20, 24))}
    inputs = tuple(TensorRecord(name, tile, 1.0, 0) for name, tile in places.items())
    order, lines, outputs = [0, 0, size, 0, 8192, 0], [instruction("ld", a, places["a"])], []
    for number, address in enumerate(order):
        y = Tile.dense("acc", number * 1024, "s32", (rows, 24))
        lines += [instruction("ld", w, Tile.dense("dram", address, "s8", (20, 24))), instruction("matmul", y, a, w)]
        outputs.append(TensorRecord(f"y{number}", y, 1.0, 0))
    target = Target("test", spm_bytes=4096, acc_bytes=8192, dram_bytes=16384)
    built = program(layer("only", *lines), target=target, inputs=inputs, outputs=tuple(outputs), constants=(0, 2 * size), dram_bytes=16384)
    machine = Machine(built, matrices.tobytes(), engine=engine)
    for _ in range(2):
        left, live = integers(rng, (rows, 20)), integers(rng, (20, 24))
        raw = machine.run({"a": left.astype(np.float32), "live": live.astype(np.float32)}).raw
        for number, address in enumerate(order):
            right = live if address == 8192 else matrices[address // size]
            assert (raw[f"y{number}"] == left.astype(np.int32) @ right).all()


@pytest.mark.parametrize("engine", INSTALLED)
def test_constants_are_kept_once(engine: str) -> None:
    """Sixteen blocks of weights, each used twice: no copy of them all, neither as floats nor packed."""
    blocks, size = 16, 1 << 18
    x, y = Tile.dense("spm", 0, "s8", (4, 512)), Tile.dense("acc", 0, "s32", (4, 512))
    w = Tile.dense("spm", 1 << 16, "s8", (512, 512))
    lines = [
        line
        for number in range(blocks)
        for line in (
            instruction("ld", w, Tile.dense("dram", number * size, "s8", (512, 512))),
            instruction("matmul", y, x, w, accumulate=int(number > 0)),
            instruction("matmul", y, x, w, accumulate=1),
        )
    ]
    target = Target("test", spm_bytes=1 << 19, acc_bytes=1 << 14, dram_bytes=1 << 24)
    built = program(layer("only", *lines), target=target, constants=(0, blocks * size), dram_bytes=blocks * size)
    constants = bytes(blocks * size)
    Machine(built, constants, engine=engine)  # whatever is made once for all programs
    tracemalloc.start()
    try:
        Machine(built, constants, engine=engine).run({})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - target.spm_bytes - target.acc_bytes - built.dram_bytes < 0.5 * len(constants)


def test_constants_that_are_looked_at_are_loaded() -> None:
    """Weights whose place in the scratchpad is a named tensor are there; those that only a product uses need not be."""
    built, constants, weights = conv_program()
    image = np.zeros(built.inputs[0].tile.shape, np.float32)
    look = TensorRecord("weights", Tile.dense("spm", 0x8000, "s8", weights.shape), 1.0, 0, layer="conv")
    machine = Machine(replace(built, tensors=(*built.tensors, look)), constants)
    assert (machine.run({"image": image}, dump={"weights"}).tensors["weights"] == weights).all()
    plain = Machine(built, constants)
    plain.run({"image": image})
    place = slice(0x8000, 0x8000 + weights.size)
    assert not plain.memories["spm"].bytes[place].any()
    assert plain.memories_after({"image": image})["spm"][place].tobytes() == weights.tobytes()
    start = built.constants_address
    assert plain.memories_after({"image": image})["dram"][start : start + len(constants)].tobytes() == constants


def test_a_view_of_constants_and_more() -> None:
    """Fixed bytes are read in place; a view that also reaches other bytes shows both."""
    memory = Memory("dram", 64)
    memory.fix(16, bytes(range(16)))
    inside = memory.view(Tile.dense("dram", 20, "u8", (4,)), 20)
    both = memory.view(Tile.dense("dram", 12, "u8", (24,)), 12)
    both[:4] = 7
    assert inside.tolist() == [4, 5, 6, 7]
    assert both.tolist() == [7] * 4 + list(range(16)) + [0] * 4
    with pytest.raises(ValueError, match="read-only"):
        inside[0] = 1


def test_views_share_the_memory() -> None:
    memory = Memory("spm", 128)
    assert memory.bytes.ctypes.data % 64 == 0
    memory.view(Tile("spm", 10, "s16", (3,), (-4,)), 10)[...] = [1, 2, 3]
    assert memory.bytes[[2, 6, 10]].tolist() == [3, 2, 1]
    assert dense_strides((2, 3), "s16") == (6, 2)


def test_the_runtime_needs_neither_the_compiler_nor_onnx() -> None:
    code = (
        "import sys, runtime; print(sorted({name.partition('.')[0] for name in sys.modules} & {'npucc', 'onnx', 'onnxruntime', 'networkx', 'lark'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=60)
    assert done.stdout.strip() in ("[]", "['lark']")
