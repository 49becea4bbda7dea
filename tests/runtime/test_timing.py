"""Cycles against timelines worked out by hand, and against the equations that the module docstrings state."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from isa.program import Event, Instruction, Layer, Loop, Program, Tile
from isa.target import Target
from runtime import Machine, RuntimeFault, simulate
from runtime.costs import Product, Windows, Work, burst_bytes, cost, matrix_cost, moved_bytes
from runtime.energy import energy
from runtime.report import make_report, spm_peak
from runtime.timing import PARTS
from tests.runtime.harness import instruction, layer, program
from tests.runtime.test_machine import conv_program

SYSTOLIC = Target(
    "t",
    rows=4,
    cols=8,
    dram_bytes_per_cycle=4.0,
    dram_latency=10,
    dram_burst_bytes=8,
    vec_lanes=4,
    vec_startup=3,
    spm_bytes=1 << 16,
    acc_bytes=1 << 14,
    dram_bytes=1 << 20,
)
EDGE = replace(SYSTOLIC, rows=32, cols=32)
CUBE = replace(SYSTOLIC, family="mac", rows=4, cols=8, depth=2, pipeline_depth=5)


# ---- one instruction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "product", "cycles", "fill"),
    [
        # 2 x 2 folds of 10 pixels; shadow weights: 4 + 4·10 + 4 + 8 - 2
        (SYSTOLIC, Product(10, 7, 9), 54, 14),
        # fewer pixels than rows: loading the next weights bounds each fold
        (SYSTOLIC, Product(3, 7, 9), 4 + 4 * 4 + 4 + 8 - 2, 14),
        (replace(SYSTOLIC, shadow_weights=False), Product(10, 7, 9), 4 * (2 * 4 + 8 + 10 - 2), 4 * 14),
        (replace(SYSTOLIC, dataflow="os"), Product(10, 7, 9), 3 * 2 * (7 + 4 + 8 - 2), 6 * 10),
        (replace(SYSTOLIC, dataflow="is"), Product(10, 7, 9), 2 * 2 * (2 * 4 + 8 + 9 - 2), 4 * 14),
        (CUBE, Product(10, 7, 9), 3 * 2 * 4 + 5, 5),
        # groups one after the other; 16-bit inputs twice
        (SYSTOLIC, Product(10, 7, 9, groups=3), 4 + 12 * 10 + 10, 14),
        (SYSTOLIC, Product(10, 7, 9, width=2), 2 * 54, 28),
        (CUBE, Product(10, 7, 9, groups=3, width=2), 2 * (3 * 3 * 2 * 4 + 5), 10),
        # depthwise: 4 rows hold 2 channels of 2 taps; 5 channels in 3 folds
        (SYSTOLIC, Product(10, 2, 1, groups=5, depthwise=True), 4 + 3 * 10 + 10, 14),
        # 8 rows hold 2 channels of 4 inputs under 3 results of 2 taps (6 of 8 columns); 5 channels in 3 folds of 2 rows x 2 steps
        (replace(SYSTOLIC, rows=8), Product(12, 2, 1, groups=5, depthwise=True, windows=Windows(6, (1, 2))), 3 * 8 + 22, 22),
        # 4 x 8 results of a channel fill the columns of two folds, which hold the 6 x 10 inputs under them; 10 x 5 steps
        (EDGE, Product(1600, 9, 1, groups=4, depthwise=True, windows=Windows(40, (3, 3))), 4 * 2 * 50 + 94, 94),
        # two results of 16 channels side by side: 3 x 4 inputs of 16 channels are 192 rows in 6 folds, not 144 in 5, of half the steps
        (EDGE, Product(784, 144, 16, windows=Windows(28, (3, 3))), 6 * 392 + 94, 94),
        (replace(EDGE, patches=False), Product(784, 144, 16, windows=Windows(28, (3, 3))), 5 * 784 + 94, 94),
        # 24 outputs leave a quarter of a strip: the results of four 3x3 windows fill three
        (EDGE, Product(784, 9, 24, windows=Windows(28, (3, 3))), 3 * 196 + 94, 94),
        # 32 outputs fill the strip: one result at a time, whatever the windows
        (EDGE, Product(784, 144, 32, windows=Windows(28, (3, 3))), 5 * 784 + 94, 94),
        # 8 groups of 4 inputs and 4 outputs lie along the diagonal of one fold
        (EDGE, Product(100, 4, 4, groups=8), 100 + 94, 94),
        # 9 taps in 3 folds per channel
        (SYSTOLIC, Product(10, 9, 1, groups=5, depthwise=True), 4 + 15 * 10 + 10, 14),
        (replace(SYSTOLIC, dataflow="os"), Product(10, 9, 1, groups=5, depthwise=True), 5 * 3 * (9 + 10), 5 * 3 * 10),
        (CUBE, Product(10, 9, 1, groups=17, depthwise=True), 3 * 3 * 5 + 5, 5),
    ],
)
def test_matrix_cycles(target: Target, product: Product, cycles: int, fill: int) -> None:
    got = matrix_cost(product, target)
    assert (got.cycles, got.fill) == (cycles, fill)
    assert got.work.macs == product.pixels * product.depth * product.outputs * product.groups
    assert got.cycles - got.fill >= got.work.macs / target.macs_per_cycle


def test_a_patch_reads_what_lies_under_its_windows() -> None:
    windows = Windows(7, (3, 2), stride=(2, 3), dilation=(1, 2))
    for rows, columns in [(1, 1), (2, 3), (5, 7)]:
        under = {(2 * i + k, 3 * j + 2 * m) for i in range(rows) for j in range(columns) for k in range(3) for m in range(2)}
        assert windows.inputs((rows, columns)) == len(under)
    assert windows.steps(35, (2, 3)) == 3 * 3
    assert set(windows.patches(35, 6)) == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (5, 1)}


def test_matrix_traffic() -> None:
    """Bytes of 10 pixels x 7 products x 9 outputs: what each fold reads, and what each accumulation writes and reads again."""
    product = Product(10, 7, 9)
    assert matrix_cost(product, SYSTOLIC).work == Work(630, spm_bytes=10 * 7 * 2 + 63, acc_bytes=360 * 3)
    assert matrix_cost(product, replace(SYSTOLIC, dataflow="os")).work == Work(630, spm_bytes=10 * 7 * 2 + 63 * 3, acc_bytes=360)
    assert matrix_cost(product, replace(SYSTOLIC, dataflow="is")).work == Work(630, spm_bytes=70 + 63 * 2, acc_bytes=360 * 3)
    assert matrix_cost(product, CUBE).work == Work(630, spm_bytes=10 * 7 * 2 + 63 * 3, acc_bytes=360)
    assert matrix_cost(replace(product, width=2), CUBE).work == Work(630, spm_bytes=2 * 10 * 7 * 2 + 63 * 3, acc_bytes=360)
    depthwise = Product(10, 9, 1, groups=5, depthwise=True)
    assert matrix_cost(depthwise, SYSTOLIC).work == Work(450, spm_bytes=450 + 45, acc_bytes=200 * 5)
    assert matrix_cost(depthwise, CUBE).work == Work(450, spm_bytes=450 + 45 * 3, acc_bytes=200)


def test_matrix_instructions_are_the_products_they_say() -> None:
    x, w, y = Tile.dense("spm", 0, "s8", (6, 6, 4)), Tile.dense("spm", 512, "s8", (3, 3, 4, 16)), Tile.dense("acc", 0, "s32", (4, 4, 16))
    assert cost(instruction("conv", y, x, w), SYSTOLIC) == matrix_cost(Product(16, 36, 16), SYSTOLIC)
    grouped = replace(w, shape=(3, 3, 2, 16))
    assert cost(instruction("conv", y, x, grouped, groups=2), SYSTOLIC) == matrix_cost(Product(16, 18, 8, groups=2), SYSTOLIC)
    depthwise = instruction("dwconv", Tile.dense("acc", 0, "s32", (4, 4, 4)), x, Tile.dense("spm", 512, "s8", (3, 3, 4)))
    windows = Windows(4, (3, 3))
    assert cost(depthwise, SYSTOLIC) == matrix_cost(Product(16, 9, 1, groups=4, depthwise=True, windows=windows), SYSTOLIC)
    product = instruction("matmul", Tile.dense("acc", 0, "s32", (5, 6)), Tile.dense("spm", 0, "s16", (5, 7)), Tile.dense("spm", 128, "s8", (7, 6)))
    assert cost(product, SYSTOLIC) == matrix_cost(Product(5, 7, 6, width=2), SYSTOLIC)


def test_vector_cycles() -> None:
    y, x = Tile.dense("spm", 0, "s8", (3, 3, 5)), Tile.dense("spm", 64, "s8", (6, 6, 5))
    same = Tile.dense("spm", 64, "s8", (3, 3, 5))
    assert cost(instruction("cvt", y, same), SYSTOLIC).cycles == 3 + 12
    assert cost(instruction("div", y, same, same), SYSTOLIC).cycles == 3 + 12 * 4
    assert cost(instruction("maxpool", y, x, kernel=(2, 3)), SYSTOLIC).cycles == 3 + 12 * 6
    reduce = instruction("reduce", Tile.dense("spm", 256, "s32", (1, 1, 5)), x)
    assert cost(reduce, SYSTOLIC).cycles == 3 + 45
    assert cost(reduce, SYSTOLIC).work == Work(vector_operations=180, spm_bytes=180 + 20)


def test_dma_bytes() -> None:
    """Bursts of 8 bytes."""
    assert burst_bytes(Tile.dense("dram", 0, "s8", (2, 10)), 8) == 24  # one run of 20
    assert burst_bytes(Tile("dram", 0, "s8", (2, 10), (100, 1)), 8) == 32  # two runs of 10
    assert burst_bytes(Tile("dram", 0, "s8", (10, 2), (1, 100)), 8) == 32  # in any order of dimensions
    assert burst_bytes(Tile("dram", 0, "s8", (2, 10), (-100, 1)), 8) == 32
    assert burst_bytes(Tile("dram", 0, "s8", (10,), (2,)), 8) == 24  # every second byte: the gaps are streamed over
    assert burst_bytes(Tile("dram", 0, "s8", (10,), (64,)), 8) == 80  # every byte its own burst
    assert burst_bytes(Tile("dram", 0, "s32", (3, 50), (4, 0)), 8) == 16  # a broadcast is read once
    assert moved_bytes(Tile("dram", 0, "s32", (3, 50), (4, 0))) == 12
    load = instruction("ld", Tile.dense("spm", 0, "s8", (2, 10)), Tile("dram", 0, "s8", (2, 10), (100, 1)))
    assert (cost(load, SYSTOLIC).cycles, cost(load, SYSTOLIC).work) == (8, Work(spm_bytes=20, dram_read_bytes=20))
    store = instruction("st", Tile("dram", 0, "s8", (2, 10), (100, 1)), Tile.dense("spm", 0, "s8", (2, 10)))
    assert (cost(store, SYSTOLIC).cycles, cost(store, SYSTOLIC).work) == (8, Work(spm_bytes=20, dram_write_bytes=20))


# ---- timelines worked out by hand --------------------------------------------------------------------------------------


def ld(size: int, *, waits: tuple[Event, ...] = (), signals: tuple[Event, ...] = ()) -> Instruction:
    return Instruction("ld", (Tile.dense("spm", 0, "s8", (size,)), Tile.dense("dram", 0, "s8", (size,))), (), waits, signals)


def store(size: int, *, waits: tuple[Event, ...] = (), signals: tuple[Event, ...] = ()) -> Instruction:
    return Instruction("st", (Tile.dense("dram", 0, "s8", (size,)), Tile.dense("spm", 0, "s8", (size,))), (), waits, signals)


def vec(size: int, *, waits: tuple[Event, ...] = (), signals: tuple[Event, ...] = ()) -> Instruction:
    return Instruction("fill", (Tile.dense("spm", 0, "s8", (size,)),), (), waits, signals)


def mm(pixels: int, *, waits: tuple[Event, ...] = (), signals: tuple[Event, ...] = ()) -> Instruction:
    """pixels x 4 x 8: one fold that fills the array."""
    tiles = (Tile.dense("acc", 0, "s32", (pixels, 8)), Tile.dense("spm", 0, "s8", (pixels, 4)), Tile.dense("spm", 4096, "s8", (4, 8)))
    return Instruction("matmul", tiles, (), waits, signals)


def times(built: Program) -> list[tuple[int, int]]:
    timeline = simulate(built)
    return list(zip(timeline.starts.tolist(), timeline.ends.tolist(), strict=True))


def parts(built: Program) -> list[tuple[int, ...]]:
    return [tuple(getattr(share, part) for part in PARTS) for share in simulate(built).layers]


def test_latency_is_hidden_by_the_transfer_before() -> None:
    """32 bytes are 8 cycles. The first waits 10 for its data; the second asked at 10, when the first began to stream; the third at 20."""
    assert times(program(layer("a", ld(32), ld(80), ld(32)), target=SYSTOLIC)) == [(0, 18), (18, 40), (40, 48)]


def test_short_transfers_do_not_hide_the_whole_latency() -> None:
    """The second asks at 10 and has its data at 20, though the channel is free from 12."""
    assert times(program(layer("a", ld(8), ld(8)), target=SYSTOLIC)) == [(0, 12), (12, 22)]


def test_loads_and_stores_share_the_channel() -> None:
    """Both ask at 0: the load streams 10 to 30, the store 30 to 50."""
    built = program(layer("a", store(80), ld(80)), target=SYSTOLIC)
    assert times(built) == [(0, 50), (0, 30)]
    assert parts(built) == [(0, 0, 0, 40, 10)]


def test_events_order_the_queues() -> None:
    """ld 0-18, mm (4 + 16 + 10 = 30) 18-48, vec (3 + 2 = 5) 48-53, st asks at 53 and ends at 53 + 10 + 8."""
    to_mm, to_vec, to_st = Event("mm"), Event("vec"), Event("st")
    built = program(
        layer("first", ld(32, signals=(to_mm,)), mm(16, waits=(Event("ld"),), signals=(to_vec,))),
        layer("second", vec(8, waits=(Event("mm"),), signals=(to_st,)), store(32, waits=(Event("vec"),))), target=SYSTOLIC,
    )  # fmt: skip
    assert times(built) == [(0, 18), (18, 48), (48, 53), (53, 71)]
    assert parts(built) == [(16, 0, 14, 8, 10), (0, 5, 0, 8, 10)]


def test_counting_events_pair_in_order() -> None:
    """Two signals, two waits; the second mm waits for the second load."""
    built = program(
        layer("a", ld(32, signals=(Event("mm"),)), ld(800, signals=(Event("mm"),)), mm(16, waits=(Event("ld"),)), mm(16, waits=(Event("ld"),))),
        target=SYSTOLIC,
    )
    assert times(built) == [(0, 18), (18, 220), (18, 48), (220, 250)]
    assert parts(built) == [(32, 0, 28, 180, 10)]


def test_two_waits_on_one_event_take_two_signals() -> None:
    twice = (Event("ld"), Event("ld"))
    built = program(layer("a", ld(32, signals=(Event("mm"),)), ld(32, signals=(Event("mm"),)), mm(16, waits=twice)), target=SYSTOLIC)
    assert times(built)[2] == (28, 58)  # the second load's data came at 20, and took 8 cycles


def test_cycles_in_which_nothing_works_go_to_the_next_instruction() -> None:
    """The load asks at 5 and streams from 15: ten cycles of waiting are its layer's, though nothing moves."""
    built = program(
        layer("a", vec(8, signals=(Event("ld"),))),
        layer("b", ld(32, waits=(Event("vec"),), signals=(Event("vec"),))),
        layer("c", vec(8, waits=(Event("ld"),))),
        target=SYSTOLIC,
    )
    assert times(built) == [(0, 5), (5, 23), (23, 28)]
    assert parts(built) == [(0, 5, 0, 0, 0), (0, 0, 0, 8, 10), (0, 5, 0, 0, 0)]


def test_the_matrix_engine_hides_what_runs_beside_it() -> None:
    """mm 0-30 covers vec 0-5 and the transfer until 30; vec 30-... is not; layers take what their own engine shows."""
    built = program(layer("m", mm(16)), layer("v", vec(8), vec(400)), layer("d", ld(1000)), target=SYSTOLIC)
    assert times(built) == [(0, 30), (0, 5), (5, 108), (0, 260)]
    assert parts(built) == [(16, 0, 14, 0, 0), (0, 78, 0, 0, 0), (0, 0, 0, 152, 0)]


def test_ideal_fractions_of_a_layer_are_added_before_they_are_rounded_down() -> None:
    """Eleven products of 1 x 4 x 8 at peak 32 make 11 ideal cycles; of 1 x 1 x 8, a quarter each, 2 of 2.75."""
    small = Instruction("matmul", (Tile.dense("acc", 0, "s32", (1, 8)), Tile.dense("spm", 0, "s8", (1, 1)), Tile.dense("spm", 64, "s8", (1, 8))))
    built = program(layer("a", Loop(11, (small,))), target=SYSTOLIC)
    assert parts(built) == [(2, 11 * 4 - 2, 11 * 14, 0, 0)]


def test_deadlock_is_a_fault() -> None:
    with pytest.raises(RuntimeFault, match=r"deadlock: ld at line 0 \(ld\) waits for vec\.0"):
        simulate(program(layer("a", ld(8, waits=(Event("vec"),)), vec(8, waits=(Event("ld"),), signals=(Event("ld"),))), target=SYSTOLIC))


# ---- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [SYSTOLIC, CUBE, replace(SYSTOLIC, dataflow="os"), replace(SYSTOLIC, shadow_weights=False, dram_latency=0), replace(CUBE, vec_lanes=1)]
)
def test_everything_adds_up(target: Target) -> None:
    built, constants, _ = conv_program()
    built = replace(built, target=replace(target, dram_bytes=1 << 20))
    report = Machine(built, constants).report
    assert report.cycles == int(simulate(built).ends.max())
    assert report.cycles == sum(each.cycles for each in report.layers)
    for each in report.layers:
        assert each.cycles == sum(getattr(each, part) for part in PARTS)
        assert min(getattr(each, part) for part in PARTS) >= 0
    assert report.macs == sum(each.macs for each in report.layers) == 32 * 10 * 8 * 72
    assert report.utilization == report.macs / target.macs_per_cycle / report.cycles
    assert report.dram_read_bytes + report.dram_write_bytes == sum(each.dram_bytes for each in report.layers)
    assert report.energy_pj == pytest.approx(sum(each.energy_pj for each in report.layers))
    assert report.energy_pj == pytest.approx(sum(report.energy.values()))
    assert report.energy.keys() == report.energy_sources.keys()
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["name"] == "conv"


def test_random_queues_add_up_and_respect_events() -> None:
    """Random programs whose waits come after their signals: no overlap within a queue, no start before its events, parts sum."""
    rng = np.random.default_rng(9)
    makers = {"ld": ld, "st": store, "vec": vec, "mm": mm}
    for _ in range(30):
        body: list[Instruction] = []
        open_events: list[tuple[str, str]] = []
        for _ in range(40):
            queue = str(rng.choice(list(makers)))
            mine = [event for event in open_events if event[1] == queue][: int(rng.integers(0, 3))]
            for event in mine:
                open_events.remove(event)
            goals = [str(goal) for goal in rng.choice([name for name in makers if name != queue], int(rng.integers(0, 2)))]
            open_events += [(queue, goal) for goal in goals]
            body.append(
                makers[queue](
                    int(rng.integers(1, 200)), waits=tuple(Event(source) for source, _ in mine), signals=tuple(Event(goal) for goal in goals)
                )
            )
        built = program(layer("a", *body[:20]), layer("b", *body[20:]), target=SYSTOLIC)
        timeline = simulate(built)
        assert sum(share.cycles for share in timeline.layers) == timeline.total_cycles
        given: dict[tuple[str, str], list[int]] = {}
        last: dict[str, int] = {}
        for step, start, end in zip(timeline.steps, timeline.starts.tolist(), timeline.ends.tolist(), strict=True):
            assert last.get(step.line.queue, 0) <= start < end
            last[step.line.queue] = end
            for source, _, _ in step.line.waits:
                assert given[(source, step.line.queue)].pop(0) <= start
            for _, goal, _ in step.line.signals:
                given.setdefault((step.line.queue, goal), []).append(end)


def test_energy_is_a_sum_of_counted_events() -> None:
    work = Work(macs=10, vector_operations=20, spm_bytes=30, acc_bytes=40, dram_read_bytes=50, dram_write_bytes=60)
    target = replace(SYSTOLIC, pj_mac=1.0, pj_vector=10.0, pj_spm_byte=100.0, pj_acc_byte=1000.0, pj_dram_byte=10000.0)
    assert energy(work, target) == {"mac": 10, "vector": 200, "spm": 3000, "acc": 40000, "dram": 1100000}
    assert work.times(3) + work == work.times(4)


def test_scratchpad_peak_counts_loop_steps() -> None:
    walking = Instruction("fill", (Tile("spm", 100, "s32", (4,), (4,), (64, -8)),))
    assert spm_peak(program(layer("a", Loop(3, (Loop(2, (walking,)),))), target=SYSTOLIC)) == 100 + 2 * 64 + 16


def test_a_trace_that_viewers_open() -> None:
    built, _, _ = conv_program()
    timeline = simulate(built)
    trace = json.loads(json.dumps(timeline.chrome_trace()))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(timeline.steps)
    assert {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"} == {"ld", "mm", "vec", "st"}
    assert max(event["ts"] + event["dur"] for event in spans) == timeline.total_cycles


def test_an_empty_program_takes_no_time() -> None:
    report = make_report(
        program(Layer("nothing", "reshape", (), 0, ()), target=SYSTOLIC), simulate(program(Layer("nothing", "reshape", (), 0, ()), target=SYSTOLIC))
    )
    assert (report.cycles, report.utilization, report.layers[0].cycles) == (0, 0.0, 0)


def test_twenty_thousand_instructions_are_timed_at_once() -> None:
    events = (
        ld(32, signals=(Event("mm"),)),
        mm(16, waits=(Event("ld"),), signals=(Event("vec"),)),
        vec(8, waits=(Event("mm"),), signals=(Event("st"),)),
        store(32, waits=(Event("vec"),)),
    )
    built = program(layer("a", Loop(5000, events)), target=SYSTOLIC)
    simulate(program(layer("a", *events), target=SYSTOLIC))
    start = time.perf_counter()
    assert len(simulate(built).steps) == 20000
    assert time.perf_counter() - start < 3.0  # a tenth of this on a quiet computer
