"""The manual `isa/ISA.md`, generated from the table: `python -m isa.manual` writes it anew, a test compares it.

The one big idea: what a reader is told is what the tools check. Formats, operands, defaults and errors come from `isa.spec`,
`isa.target` and `isa.shapes`; only the chapters on ideas are prose.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from isa import reader, shapes, target, text
from isa.packing import FORMATS
from isa.program import DTYPES, LOOP_VARIABLES, QUEUES, SPACES
from isa.spec import TABLE, Attribute, InstructionSpec, Operand
from isa.tokens import MAXIMUM_DIMENSIONS, MAXIMUM_EVENT, print_value

MANUAL = Path(__file__).parent / "ISA.md"

ENGINES = {
    "ld": "DMA from DRAM into the scratchpad",
    "mm": "matrix engine: products of scratchpad tiles, summed in the accumulators",
    "vec": "vector engine: everything else on the scratchpad, and the accumulators' way out",
    "st": "DMA from the scratchpad to DRAM",
    "host": "what is computed outside the NPU, on tensors in DRAM",
}
MEMORIES = {
    "dram": "external memory: constants, inputs, outputs, what does not fit; `.memory dram=` bytes",
    "spm": "scratchpad, on chip; `spm_bytes` of the target",
    "acc": "32-bit accumulators of the matrix engine; `acc_bytes` of the target",
}
#: timing class → cycles on the engine; the runtime's cost model computes exactly these
TIMING = {
    "dma": "`ceil(burst bytes / dram_bytes_per_cycle)` of the one DRAM channel that `ld` and `st` share, `dram_latency` after the request; the "
    "next request of a queue is issued when its last one starts to stream. Burst bytes: each contiguous run in DRAM takes whole bursts of "
    "`dram_burst_bytes` (as in Arm's Vela compiler); gaps shorter than a burst are streamed over; dimensions of stride 0 move once "
    "(both npucc's own). "
    "Of packed weights the packed bytes count.",
    "gather": "as dma: each row of y in whole bursts; the rest of x is not moved. npucc's own.",
    "matrix": "with M = output pixels or rows, K = products per output, N = outputs per group, G = groups (1 for `matmul`). "
    "Systolic (SCALE-Sim, Samajdar et al., ISPASS 2020; its report counts from 0, one less per layer), weight stationary, "
    "F = `G * ceil(K/rows) * ceil(N/cols)` folds: without shadow weights `F * (M + 2*rows + cols - 2)`, "
    "with them (npucc's own) `F * max(M, rows) + 2*rows + cols - 2`; a target with `patches` "
    "(as the variable windows of VW-SDK, Rhe et al., DATE 2022) may hold in the columns of a fold "
    "the results of a patch of h' × w' pixels (then K = inputs under the patch, N times h'w', M = `ceil(h/h') * ceil(w/w')`; the weights lie as a "
    "Toeplitz matrix), and g groups block-diagonally (g·K <= rows, g·N <= cols, `ceil(G/g)` instead of G), as takes fewest cycles; "
    "output stationary `G * ceil(M/rows) * ceil(N/cols) * (K + rows + cols - 2)`; "
    "input stationary "
    "`G * ceil(K/rows) * ceil(M/cols) * (N + 2*rows + cols - 2)`. "
    "MAC array (Da Vinci cube, Liao et al., HPCA 2021; the pipeline's fill is npucc's own): "
    "`G * ceil(M/rows) * ceil(N/cols) * ceil(K/depth) + pipeline_depth`. "
    "s16 inputs: twice that, as two bytes (npucc's own). A target with `skip` needs less, see [skipping](#skipping).",
    "depthwise": "as `matrix` with K = kernel taps, N = 1, G = channels. "
    "MAC array: `ceil(M/rows) * ceil(channels/cols) * ceil(taps/depth) + pipeline_depth`. How channels lie in either array is npucc's own.",
    "vector": "`vec_startup + ceil(elements / vec_lanes)`; `div` and `sqrt` pass four times. Elements are those of the result (of x for `reduce`). "
    "npucc's own.",
    "window": "`vec_startup + ceil(elements / vec_lanes) * taps`: one pass per tap of the window. npucc's own.",
    "resize": "`vec_startup + ceil(elements / vec_lanes) * 4`: one pass per neighbour. npucc's own.",
    "transfer": "as dma, on the same channel; the queue goes on when the transfer is complete. npucc's own.",
    "host": "`host_latency`. How long the host computes is not modelled. npucc's own.",
}
ROLES = {"read": "read", "write": "written", "update": "written, and read when accumulating"}


def manual() -> str:
    """The whole manual as Markdown."""
    parts = [HEAD, _memories(), _packings(), TEXT, _limits(), _queues(), NUMBERS, _timing(), SKIPPING, _targets(), _index()]
    parts += map(_instruction, TABLE)
    return "\n\n".join(part.strip() for part in parts) + "\n"


HEAD = """
# The instruction set

Generated from `isa/spec.py` by `python -m isa.manual`; do not edit.

Few instructions, each on whole tiles, each exact. A line can be read alone: there are no modes and no magic address bits.
Contents: [addressing](#addressing), [packed weights](#packed-weights), [text](#text), [order](#order), [numbers](#numbers),
[timing](#timing), [targets](#targets), [instructions](#instructions).
"""

TEXT = f"""
## Text

One thing per line; `;` begins a comment. Strings stand in double quotes with JSON's escapes. Whole numbers are decimal or `0x…`,
floats are float32 in their shortest spelling. Attributes with their default value are left out.

```
.npu {reader.VERSION}                                                         the version; first line
.source "model.onnx"                                           what was compiled (optional)
.target edge rows=16 …                                         name, then every field that is not the default of `Target`
.memory dram=0x1200000 constants=0x400000+0x2f000              DRAM bytes used; address + size of the constants in it
.input  "image" s8[1,3,32,32]{{3072,1,96,3}} @0x0 scale=0.04 zero=-3 type=float32
.output "logits" s8[1,10] @0x4000 scale=0.1 zero=4 type=float32
.tensor "relu1" s8[1,16,32,32] @0x5000 scale=0.1 zero=4 layer="conv1"     a tensor to look at: holds after that layer
.layer "conv1" conv macs=1234 nodes="Conv_1","Relu_2"          name, operation, multiply-accumulates, ONNX nodes served
  ld %0x0:s8[16,64], @0x400000:s8[16,64] signal=mm.0           MNEMONIC TILE, TILE… ATTRIBUTE…
  loop 4                                                       the body four times
    …
  end
```

The sizes of `.input`, `.output` and `.tensor` are in ONNX order; the strides say how they lie in memory. `type` is the element type outside.
`real = scale * (stored - zero)`; inputs enter as `saturate(rint(x / scale) + zero)`, in float32.
"""

NUMBERS = """
## Numbers

Every reduction is over integers, so its order does not matter. Floating point appears only elementwise: IEEE-754 float32, one
rounding per stated operation, `rint` half to even.

    real(x) = float32(x - zero) * scale          for integer tiles; float tiles are what they are
    quant(v, scale, zero) = clamp(rint(v / scale) + zero, lo, hi)          for a float result: v

`clamp` limits what is stored. Left out (that is, -128,127) it means the whole range of the result's element type.
"""


def _memories() -> str:
    rows = "\n".join(f"| `{mark}` | {space} | {MEMORIES[space]} |" for space, mark in SPACES.items())
    dtypes = ", ".join(f"`{name}` ({size})" for name, size in DTYPES.items())
    return f"""
## Addressing

| mark | memory | what it is |
|---|---|---|
{rows}

An operand is a *tile*: a strided view of one memory.

    SPACE ADDRESS [+STEP*VARIABLE]… : DTYPE [SIZES] {{BYTE STRIDES}}
    %0x1000+0x40*i:s8[16,58,64]{{3712,64,1}}

- Addresses, steps and strides are in bytes. All memories are byte arrays, little endian.
- Strides left out mean dense, row-major. A stride of 0 broadcasts, a negative one walks backwards; results need elements that lie apart.
- `+STEP*i` adds STEP per iteration of the outermost loop around the line, `j` of the next ({", ".join(LOOP_VARIABLES)}); it may be negative.
- Element types (bytes): {dtypes}.
- Addresses, steps and strides are multiples of the element size; addresses and steps also of the target's `alignment`.
- A tile lies within its memory in every iteration. The constants are read only.
- Inside an instruction the result may lie exactly on an elementwise operand of the same element size, or apart from all operands.
"""


def _packings() -> str:
    rows = "\n".join(f"| `{{{','.join((name, *each.numbers))}}}` | {each.layout} |" for name, each in FORMATS.items())
    return f"""
## Packed weights

    @0x100000:s8[3,3,64,64]{{nm,2,4}}

Weights may lie packed: then the braces of the tile name a format instead of strides. The tile stands for the same s8 values, seen as a
matrix K × N (N is the last dimension, K all others in row-major order); its numbers tell how many bytes they take. Bits fill bytes from the lowest.

| packing | bytes, one part after the other |
|---|---|
{rows}

`ld` unpacks, or moves packed weights as they are; `conv` and `matmul` take them packed. Which formats there are says `weight_formats` of the
target. Bytes that stand for no weights (places that do not rise, a bitmap that does not count the values, bits past the end that are not 0,
a value past the last row, a product that is no s8) are a fault.
"""


def _limits() -> str:
    return f"""
Limits: {MAXIMUM_DIMENSIONS} dimensions, {len(LOOP_VARIABLES)} nested loops of at most {reader.MAXIMUM_LOOP_COUNT:,} iterations,
{reader.MAXIMUM_DYNAMIC:,} executed instructions, numbers below 2^48, {text.MAXIMUM_LINES:,} lines of {text.MAXIMUM_LINE:,} characters.
"""


def _queues() -> str:
    rows = "\n".join(f"| `{queue}` | {ENGINES[queue]} |" for queue in QUEUES)
    return f"""
## Order

| queue | engine |
|---|---|
{rows}

Each queue takes its instructions in text order, one after the other; different queues run at the same time and wait for one another
only where the text says so. `signal=mm.0` gives one count of event 0 to the mm queue when the instruction is complete; `wait=ld.0`, on an mm
instruction, takes one count of event 0 from the ld queue before it starts. The k-th wait passes with the k-th signal. Between each pair of
queues there are events 0 to {MAXIMUM_EVENT}; each counts without limit.

The checker refuses a program in which a queue can get stuck, a signal is never waited for, a line waits for a signal that stands below it, an
instruction reads bytes that nothing wrote, or two queues touch a common byte, one of them writing, without an event that orders them.
So the result of a legal program does not depend on timing.
"""


def _timing() -> str:
    rows = "\n".join(f"- **{name}**: {rule}" for name, rule in TIMING.items())
    return f"""
## Timing

An instruction starts when its queue is free and its waits have passed; it occupies its engine for the cycles below, and gives its
signals at the end. Timing never changes values. Names in `code` are fields of the target.

{rows}
"""


SKIPPING = """
<a id="skipping"></a>**Skipping.**

What the array leaves out of its time, by the target's `skip`; of `conv` with one group and `matmul`. The lanes of an array go on together, so a
step takes as long as its slowest lane. With S = the rows of K that a strip of `cols` columns keeps, the sums over the strips:

- `structured`: weights packed as `nm` (S = K·N/M: NVIDIA's sparse tensor cores, Mishra et al. 2021; on a systolic array S2TA, HPCA 2022) or as
  `block` (S = rows of the blocks that are not all zero, packed one under the other). Weight stationary: F = `sum(ceil(S/rows))` folds;
  MAC array: `ceil(M/rows) * sum(ceil(S/depth)) + pipeline_depth`.
- `weights`, `activations`, `both` (MAC arrays): products with a zero weight (where weights are packed as `nm`, `block` or `mask`), with a zero input
  (one that equals `zero` of `conv`, `za` of `matmul`), or with either take no cycle. The lane *l* of the `depth` lanes of an output does the
  products whose row of K is l modulo `depth`; all lanes begin the next `rows` x `cols` outputs together:
  `sum(max(1, most products left in any lane)) + pipeline_depth` (Cnvlutin, ISCA 2016; SCNN, ISCA 2017; SparTen, MICRO 2019). So cycles depend on the
  data of a run; without it the most that it can be is told. A skipped input stands for `zero`: the array adds `zero` times the sum of the weights.

Energy counts the products that are done and the bytes that are moved: packed weights as they are packed, inputs whole (for blocks: the rows that
are kept). Finding the pairs costs nothing here.
"""


def _targets() -> str:
    fields = re.findall(r"^    (\w+): (\w+)(?: = (.+?))?(?:  # (.*))?$", inspect.getsource(target.Target), re.MULTILINE)
    rows = "\n".join(
        f"| `{name}` | {kind} | {f'`{default}`' if default else ''} | {meaning.replace('|', '/')} |" for name, kind, default, meaning in fields
    )
    return f"## Targets\n\nThe fields of a target file and of `.target`.\n\n| field | type | default | meaning |\n|---|---|---|---|\n{rows}"


def _index() -> str:
    rows = "\n".join(f"| [`{spec.name}`](#{spec.name}) | {spec.queue} | `{spec.effect.partition(';')[0]}` |" for spec in TABLE)
    return f"## Instructions\n\n| instruction | queue | effect |\n|---|---|---|\n{rows}"


def _instruction(spec: InstructionSpec) -> str:
    parts = [
        f"### {spec.name}",
        f"**Format** `{format_of(spec)}`",
        *(
            ["**Operands**\n\n| name | | memory | element types | dimensions |\n|---|---|---|---|---|\n" + "\n".join(map(_operand, spec.operands))]
            if spec.operands
            else []
        ),
        *(
            ["**Attributes**\n\n| name | default | meaning |\n|---|---|---|\n" + "\n".join(map(_attribute, spec.attributes))]
            if spec.attributes
            else []
        ),
        f"**Effect** `{spec.effect}`" + (f"\n\n{spec.notes.strip()}" if spec.notes.strip() else ""),
        f"**Reads** {_names(spec, 'read', 'update')}. **Writes** {_names(spec, 'write', 'update')}.",
        f"**Timing** [{spec.timing}](#timing), on `{spec.queue}`.",
        "**Errors**\n\n" + "\n".join(f"- {error}" for error in errors_of(spec)),
        f"**Example**\n\n```\n{spec.example}\n```",
    ]
    return "\n\n".join(parts)


def format_of(spec: InstructionSpec) -> str:
    """`matmul y, a, b [, c] [za=0] [zb=0] [accumulate=0] [wait=…] [signal=…]`."""
    required = ", ".join(operand.name for operand in spec.operands if not operand.optional)
    optional = "".join(f" [, {operand.name}]" for operand in spec.operands if operand.optional)
    attributes = "".join(f" [{attribute.name}={print_value(attribute.default)}]" for attribute in spec.attributes)
    return f"{f'{spec.name} {required}'.strip()}{optional}{attributes} [wait=…] [signal=…]"


def _operand(operand: Operand) -> str:
    where = " or ".join(f"`{SPACES[space]}` {space}" for space in operand.spaces)
    role = ROLES[operand.role] + (", may be left out" if operand.optional else "")
    return f"| `{operand.name}` | {role} | {where} | {', '.join(operand.dtypes)} | {_dimensions(operand.dims)} |"


def _dimensions(dims: str) -> str:
    if dims == "*r":
        return "as *d*, or 1 each"
    letters = [f"*{letter}*" if letter.isalpha() else letter for letter in dims.removeprefix("*d")]
    return "[" + ", ".join([*(["*d…*"] if dims.startswith("*") else []), *letters]) + "]"


def _attribute(attribute: Attribute) -> str:
    words = f": {', '.join(attribute.words)}" if attribute.words else ""
    return f"| `{attribute.name}` | {print_value(attribute.default)} | {attribute.meaning}{words} |"


def _names(spec: InstructionSpec, *roles: str) -> str:
    names = [
        f"{operand.name}{' (accumulate=1)' if operand.role == 'update' and 'read' in roles else ''}"
        for operand in spec.operands
        if operand.role in roles
    ]
    return ", ".join(names) or "nothing"


def errors_of(spec: InstructionSpec) -> list[str]:
    """What the checker demands of this instruction beyond what holds for all."""
    letters = [letter for letter in dict.fromkeys("".join(operand.dims for operand in spec.operands)) if letter.isalpha() and letter != "r"]
    shared = [letter for letter in letters if sum(letter in operand.dims for operand in spec.operands) > 1]
    errors = [f"Sizes called {' or '.join(f'*{letter}*' for letter in shared)} must be the same everywhere."] if shared else []
    errors += [str(rule.__doc__).partition("\n")[0] for rule in shapes.RULES.get(spec.name, ())]
    replaceable = [operand.name for operand in spec.operands if operand.role == "read" and shapes.may_replace(spec, operand)]
    place = (
        f"apart from the operands, or exactly on {' or '.join(replaceable)} with the same element size" if replaceable else "apart from the operands"
    )
    if spec.queue == "host":
        return [*errors, "Tiles lie within their memory; what is written keeps its elements apart."]
    return [*errors, f"Tiles lie within their memories; the result keeps its elements apart and lies {place}."]


if __name__ == "__main__":
    MANUAL.write_text(manual(), encoding="utf-8")
