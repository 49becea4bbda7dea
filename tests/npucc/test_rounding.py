"""Second-order rounding: what it gains, that its sums are exact, and when it is not used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from npucc.graph import Graph
from npucc.quantize import QuantizeOptions, quantize, rounding
from npucc.quantize.rounding import EXACT_BITS, Evidence, Lattice, gram_matrix, grouped_lattice, round_weights, solve
from npucc.sites import Site, find_sites

from .float_graphs import classifier, classifier_feeds

ONE = Lattice(np.ones(()), 127)


def correlated(seed: int, groups: int, rows: int, depth: int, largest: int = 255) -> np.ndarray:
    """Integers of few degrees of freedom and a little noise, as the inputs of real layers."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 1, (groups, rows, 4)) @ generator.normal(0, 1, (groups, 4, depth)) + generator.normal(0, 0.3, (groups, rows, depth))
    return np.rint(values / np.abs(values).max() * largest).astype(np.int16)


def some_site() -> Site:
    return next(iter(find_sites(classifier()).values()))


def energy(rows: np.ndarray, error: np.ndarray) -> float:
    answers = rows.astype(np.float64) @ error
    return float(((answers - answers.mean(axis=1, keepdims=True)) ** 2).sum())


@pytest.mark.parametrize(("groups", "depth", "outputs"), [(1, 96, 40), (12, 9, 1)])
def test_errors_that_add_up_are_made_to_cancel(groups: int, depth: int, outputs: int) -> None:
    rows = correlated(0, groups, 600, depth)
    steps = np.random.default_rng(1).normal(0, 30, (groups, depth, outputs)).clip(-127, 127)
    rounded = round_weights(steps, ONE, Evidence(some_site(), rows[:, :450], rows[:, 450:]))
    assert np.array_equal(rounded, np.rint(rounded))
    assert np.abs(rounded).max() <= 127
    gain = energy(rows[:, 450:], np.rint(steps) - steps) / energy(rows[:, 450:], rounded - steps)
    assert 10 * np.log10(gain) > 5, "on rows that did not decide"


def test_the_choice_does_not_depend_on_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum is exact, so how columns and outputs are cut into blocks can't matter. Values as large as they get."""
    rows = correlated(2, 1, 700, 150, largest=4095)
    rows[:, :, ::7] //= 500
    steps = np.random.default_rng(3).normal(0, 60, (1, 150, 33))
    gram, fixed = gram_matrix(rows), np.rint(steps * 1024)
    whole = solve(fixed, ONE, gram)
    monkeypatch.setattr(rounding, "BLOCK", 13)
    monkeypatch.setattr(rounding, "CHUNK", 8)
    np.testing.assert_array_equal(solve(fixed, ONE, gram), whole)
    error = np.ldexp(whole, 10) - fixed
    assert float((np.abs(gram[0]) @ np.abs(error[0])).max()) < 2.0**EXACT_BITS


def test_what_the_judging_rows_do_not_confirm_is_not_done() -> None:
    steps = np.random.default_rng(4).normal(0, 30, (1, 60, 8)).clip(-127, 127)
    fit, other = correlated(5, 1, 400, 60), np.zeros((1, 400, 60), np.int16)
    other[0, np.arange(400), np.arange(400) % 60] = 255  # one column at a time: nothing can cancel
    np.testing.assert_array_equal(round_weights(steps, ONE, Evidence(some_site(), fit, other)), np.rint(steps))


@pytest.mark.parametrize(("kernel", "depth"), [((1, 1), 96), ((3, 3), 32 * 9)])
def test_4_bit_weights_are_small_multiples_of_a_factor_per_group(kernel: tuple[int, int], depth: int) -> None:
    site = replace(some_site(), groups=1, depth=depth, outputs=10, kernel=kernel)
    rows = correlated(6, 1, 800, depth)
    evidence = Evidence(site, rows[:, :600], rows[:, 600:])
    steps = (np.random.default_rng(7).normal(0, 20, (1, depth, 10)) * np.linspace(0.3, 1.5, depth)[:, None]).clip(-127, 127)
    lattice = grouped_lattice(steps, site, 32, evidence)
    rounded = round_weights(steps, lattice, evidence)
    stored = rounded[0].reshape(depth // site.taps, site.taps, 10).transpose(1, 0, 2).reshape(-1, 32, 10)  # as it lies in memory
    for group in stored.transpose(0, 2, 1).reshape(-1, 32):
        assert any(np.array_equal(group, (quarter := np.rint(group / factor)) * factor) and np.abs(quarter).max() <= 7 for factor in range(1, 19))
    gain = energy(rows[:, 600:], lattice.nearest(steps) - steps) / energy(rows[:, 600:], rounded - steps)
    assert 10 * np.log10(gain) > 5, "second order is what makes 4 bits usable"


def weights_of(graph: Graph) -> list[bytes]:
    return [tensor.data.tobytes() for tensor in graph.tensors.values() if tensor.data is not None and tensor.data.dtype == np.int8]


def test_it_is_the_default_and_may_be_switched_off() -> None:
    feeds = list(classifier_feeds(8))
    default, nearest = (weights_of(quantize(classifier(), feeds, options=QuantizeOptions.parse(text)).graph) for text in ("int8", "rounding=nearest"))
    assert default != nearest
    assert weights_of(quantize(classifier(), feeds[:2]).graph) == weights_of(
        quantize(classifier(), feeds[:2], options=QuantizeOptions(rounding="nearest")).graph
    ), "too few samples to judge"
