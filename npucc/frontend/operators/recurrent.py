"""LSTM, GRU and RNN, written out step by step.

The one big idea: the inputs of all steps are multiplied at once; what remains per step is one product with the last state and a few
elementwise operations. Sums of gates and states are marked `wide`: what a recurrence rounds away it never gets back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from npucc import ops, scalar
from npucc.frontend.node import Importer, NodeImport

MOST_STEPS = 1024
Weights = np.ndarray


@dataclass(frozen=True, slots=True)
class _Layer:
    """One direction. Weights are [gates·hidden, inputs], biases [gates·hidden] (those of the input, those of the state)."""

    node: NodeImport
    hidden: int
    weights: Weights
    recurrence: Weights
    bias: Weights
    state_bias: Weights
    functions: tuple[Callable[[scalar.Expression], scalar.Expression], ...]
    clip: float
    is_reversed: bool
    peepholes: Weights | None = None  # [3·hidden]: input, output, forget
    constants: dict[str, str] = field(default_factory=dict)  # what all steps share, by its stem

    def op(self, op: str, *inputs: str) -> str:
        """A binary operation in 16 bits."""
        return self.node.emit(op, inputs, ops.Binary(), wide=True)

    def apply(self, function: int, tensor: str) -> str:
        """The layer's n-th activation function, after its clip."""
        inner: scalar.Expression = ("clip", "x", -self.clip, self.clip) if self.clip else "x"
        return self.function(self.functions[function](inner), tensor)

    def function(self, expression: scalar.Expression, tensor: str) -> str:
        """A function of one tensor in 16 bits."""
        return self.node.emit("table", (tensor,), ops.Table(scalar.simplify(expression)), wide=True)

    def product(self, tensor: str, weights: Weights, bias: Weights | None, stem: str) -> str:
        """tensor · weightsᵀ (+ bias) in 16 bits."""
        constants = [self.constant(weights.T, stem)]
        if bias is not None and bias.any():
            constants.append(self.constant(bias, f"{stem}_bias"))
        return self.node.emit("matmul", (tensor, *constants), ops.MatMul(), wide=True)

    def constant(self, value: Weights, stem: str) -> str:
        """A constant that is stored once for all steps."""
        if stem not in self.constants:
            self.constants[stem] = self.node.new_constant(value, stem)
        return self.constants[stem]

    def peek(self, gate: str, index: int, c: str) -> str:
        """The gate plus what it sees of the cell through its peephole."""
        if self.peepholes is None or not c:
            return gate
        weights = self.constant(self.peepholes[index * self.hidden : (index + 1) * self.hidden], f"peephole{index}")
        return self.op("add", gate, self.op("mul", c, weights))

    def gate(self, tensor: str, index: int, count: int = 1) -> str:
        """Some of the gates in a tensor [batch, gates·hidden]."""
        return self.node.slice(tensor, 1, index * self.hidden, count * self.hidden)


#: (layer, the step's products with the input, h or "", c or "") → (h, c)
Step = Callable[[_Layer, str, str, str], tuple[str, str]]


def _lstm_step(layer: _Layer, inputs: str, h: str, c: str) -> tuple[str, str]:
    """Gates in ONNX's order: input, output, forget, cell."""
    total = layer.op("add", inputs, layer.product(h, layer.recurrence, None, "recurrence")) if h else inputs
    opened = layer.apply(0, layer.peek(layer.gate(total, 0), 0, c))
    new = layer.op("mul", opened, layer.apply(1, layer.gate(total, 3)))
    if c:
        coupled = layer.node.integer("input_forget", 0)
        kept = layer.function(("sub", 1.0, "x"), opened) if coupled else layer.apply(0, layer.peek(layer.gate(total, 2), 2, c))
        new = layer.op("add", layer.op("mul", kept, c), new)
    shown = layer.apply(0, layer.peek(layer.gate(total, 1), 1, new))
    return layer.op("mul", shown, layer.function(layer.functions[2]("x"), new)), new


def _gru_step(layer: _Layer, inputs: str, h: str, c: str) -> tuple[str, str]:
    """Gates in ONNX's order: update, reset, hidden. The state bias of the hidden gate stays inside the reset where that comes last."""
    size, parts = layer.hidden, (slice(0, 2 * layer.hidden), slice(2 * layer.hidden, None))
    gates, candidate = layer.gate(inputs, 0, 2), layer.gate(inputs, 2)
    last = bool(layer.node.integer("linear_before_reset", 0))
    if h:
        gates = layer.op("add", gates, layer.product(h, layer.recurrence[parts[0]], None, "gates"))
    update, reset = layer.apply(0, layer.node.slice(gates, 1, 0, size)), layer.apply(0, layer.node.slice(gates, 1, size, size))
    if last and (h or layer.state_bias.any()):
        weights = layer.recurrence[parts[1]]
        state = layer.product(h, weights, layer.state_bias, "candidate") if h else layer.node.new_constant(layer.state_bias, "bias")
        candidate = layer.op("add", candidate, layer.op("mul", reset, state))
    elif h:
        candidate = layer.op("add", candidate, layer.product(layer.op("mul", reset, h), layer.recurrence[parts[1]], None, "candidate"))
    new = layer.op("mul", layer.function(("sub", 1.0, "x"), update), layer.apply(1, candidate))
    return (layer.op("add", layer.op("mul", update, h), new) if h else new), c


def _rnn_step(layer: _Layer, inputs: str, h: str, c: str) -> tuple[str, str]:
    total = layer.op("add", inputs, layer.product(h, layer.recurrence, None, "recurrence")) if h else inputs
    return layer.apply(0, total), c


@dataclass(frozen=True, slots=True)
class _Kind:
    """How many gates and activation functions a cell has, the latter's defaults, and what one step does."""

    gates: int
    functions: tuple[str, ...]
    step: Step


_KINDS = {
    "LSTM": _Kind(4, ("Sigmoid", "Tanh", "Tanh"), _lstm_step),
    "GRU": _Kind(3, ("Sigmoid", "Tanh"), _gru_step),
    "RNN": _Kind(1, ("Tanh",), _rnn_step),
}
#: function → (scalar function of x and the two parameters, their defaults)
_FUNCTIONS: dict[str, tuple[Callable[[scalar.Expression, float, float], scalar.Expression], float, float]] = {
    "sigmoid": (lambda x, _a, _b: ("sigmoid", x), 0.0, 0.0),
    "tanh": (lambda x, _a, _b: ("tanh", x), 0.0, 0.0),
    "relu": (lambda x, _a, _b: ("relu", x), 0.0, 0.0),
    "softsign": (lambda x, _a, _b: ("softsign", x), 0.0, 0.0),
    "softplus": (lambda x, _a, _b: ("softplus", x), 0.0, 0.0),
    "hardsigmoid": (lambda x, a, b: ("hard_sigmoid", x, a, b), 0.2, 0.5),
    "leakyrelu": (lambda x, a, _: ("leaky_relu", x, a), 0.01, 0.0),
    "elu": (lambda x, a, _: ("elu", x, a), 1.0, 0.0),
    "thresholdedrelu": (lambda x, a, _: ("thresholded_relu", x, a), 1.0, 0.0),
    "affine": (lambda x, a, b: ("add", ("mul", x, a), b), 1.0, 0.0),
    "scaledtanh": (lambda x, a, b: ("mul", ("tanh", ("mul", x, b)), a), 1.0, 1.0),
}


def recurrent(node: NodeImport) -> list[str]:
    """Y [steps, directions, batch, hidden], the last h and the last c [directions, batch, hidden]."""
    kind, batch_first = _KINDS[node.operator], bool(node.integer("layout", 0))
    x = node.transpose(node.input(0), (1, 0, 2)) if batch_first else node.input(0)
    steps, batch, _ = node.shape_of(x)
    _check(node, kind, steps)
    found = [_run(layer, kind.step, x, _initial(node, index, batch, batch_first)) for index, layer in enumerate(_layers(node, kind))]
    size = (batch, node.shape(2)[2])
    sequence = [_join(node, [node.reshape(h, (1, 1, *size)) for h in states], 0) for states, _ in found]
    last = [[node.reshape(ends[i], (1, *size)) for _, ends in found] for i in range(2 if node.operator == "LSTM" else 1)]
    results = [_join(node, sequence, 1), *(_join(node, part, 0) for part in last)]
    if batch_first:
        results = [node.transpose(results[0], (2, 0, 1, 3)), *(node.transpose(part, (1, 0, 2)) for part in results[1:])]
    return results


def _check(node: NodeImport, kind: _Kind, steps: int) -> None:
    if steps > MOST_STEPS:
        raise node.refuse(f"it has {steps} steps; supported are up to {MOST_STEPS}", hint="bind a shorter one with --shape and carry the state over")
    directions = 2 if node.word("direction", "forward") == "bidirectional" else 1
    rows, hidden = node.shape(1)[1], node.shape(2)[2]
    if node.shape(1)[0] != directions or rows != kind.gates * hidden or node.shape(2)[1] != rows:
        raise node.refuse(f"its weights have shapes {list(node.shape(1))} and {list(node.shape(2))}", hint="the model is damaged; export it again")


def _layers(node: NodeImport, kind: _Kind) -> Iterator[_Layer]:
    weights, recurrence = node.floats(1, "weights"), node.floats(2, "recurrence weights")
    directions, rows, hidden = recurrence.shape
    biases = node.floats(3, "bias") if node.has(3) else np.zeros((directions, 2 * rows), np.float32)
    functions = _functions(node, kind, directions)
    for index in range(directions):
        bias, state_bias = biases[index, :rows].copy(), biases[index, rows:]
        inside = node.operator == "GRU" and bool(node.integer("linear_before_reset", 0))
        end = rows - hidden if inside else rows
        bias[:end] += state_bias[:end]
        is_reversed = index == 1 or node.word("direction", "forward") == "reverse"
        yield _Layer(
            node, hidden, weights[index], recurrence[index], bias, state_bias[end:], functions[index], node.real("clip", 0.0), is_reversed,
            node.floats(7, "peepholes")[index] if node.operator == "LSTM" and node.has(7) else None,
        )  # fmt: skip


def _functions(node: NodeImport, kind: _Kind, directions: int) -> list[tuple[Callable[[scalar.Expression], scalar.Expression], ...]]:
    """Per direction its activation functions; parameters are handed out in order to those that take some."""
    given = node.attribute("activations", None)
    names = [name.decode() for name in given] if given else list(kind.functions) * directions
    alphas, betas = list(node.attribute("activation_alpha", [])), list(node.attribute("activation_beta", []))
    made = []
    for name in names:
        if name.lower() not in _FUNCTIONS:
            raise node.refuse(f"the activation function {name!r} is not known", hint=f"known are {', '.join(_FUNCTIONS)}")
        build, alpha, beta = _FUNCTIONS[name.lower()]
        alpha = float(alphas.pop(0)) if alpha and alphas else alpha
        beta = float(betas.pop(0)) if beta and betas else beta
        made.append(lambda x, build=build, alpha=alpha, beta=beta: build(x, alpha, beta))
    count = len(kind.functions)
    return [tuple(made[i * count : (i + 1) * count]) for i in range(directions)]


def _initial(node: NodeImport, direction: int, batch: int, batch_first: bool) -> list[str]:
    """The first h and c of a direction as [batch, hidden]; "" where they are zero."""
    states = []
    for index in (5, 6):
        is_zero = not node.has(index) or (node.is_constant(index) and not node.floats(index, "state").any())
        if is_zero or (index == 6 and node.operator != "LSTM"):
            states.append("")
            continue
        if node.is_constant(index):
            states.append(node.new_constant(node.floats(index, "state").take(direction, 1 if batch_first else 0), "state"))
            continue
        part = node.slice(node.input(index), 1 if batch_first else 0, direction, 1)
        states.append(node.reshape(part, (batch, node.shape(2)[2])))
    return states


def _run(layer: _Layer, step: Step, x: str, state: Sequence[str]) -> tuple[list[str], tuple[str, str]]:
    """All states h in the order of the inputs, and the last (h, c). Past its length, a sequence keeps its state and yields zeros."""
    node = layer.node
    steps, batch, size = node.shape_of(x)
    products = layer.product(node.reshape(x, (steps * batch, size)), layer.weights, layer.bias, "weights")
    h, c = state
    states = [""] * steps
    for index in reversed(range(steps)) if layer.is_reversed else range(steps):
        new_h, new_c = step(layer, node.slice(products, 0, index * batch, batch), h, c)
        inside = _inside(node, index, batch)
        states[index] = _kept(node, inside, new_h, "")
        h, c = _kept(node, inside, new_h, h), _kept(node, inside, new_c, c) if new_c else ""
    return states, (h, c)


def _inside(node: NodeImport, index: int, batch: int) -> str:
    """Which sequences have a step of that index, [batch, 1]; "" if all have."""
    if not node.has(4):
        return ""
    if node.is_constant(4):
        inside = np.asarray(node.constant(4, "sequence_lens")).reshape(batch, 1) > index
        return "" if inside.all() else node.new_constant(inside, "inside")
    lengths = node.reshape(node.input(4), (batch, 1))
    return node.emit("compare", (lengths, node.new_constant(float(index), "step")), ops.Compare("gt"), dtype="bool")


def _kept(node: NodeImport, inside: str, new: str, old: str) -> str:
    """The new state inside a sequence, else the old one ("": zero)."""
    if not inside:
        return new
    return node.emit("where", (inside, new, old or node.new_constant(0.0, "zero")), ops.Attributes(), wide=True)


def _join(node: NodeImport, parts: Sequence[str], axis: int) -> str:
    return parts[0] if len(parts) == 1 else node.emit("concat", parts, ops.Concat(axis))


TABLE: tuple[Importer, ...] = tuple(Importer(name, recurrent, "written out step by step; constant weights") for name in _KINDS)
