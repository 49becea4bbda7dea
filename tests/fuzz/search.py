"""Search for a model that breaks a promise of the compiler, and shrink it.

    python -m tests.fuzz.search [--examples 1000] [--seed 0] [--check machine_equals_reference …] [--save FOLDER]

Prints the smallest model found per promise, and writes it as ONNX with a feed. The exit code is 1 where one was found.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.checks import CHECKS, Case, Check
from tests.fuzz.random_models import RandomModel, random_models

BATCH = 50  # examples that share a seed: hypothesis varies what it has seen, so many short searches see more than a long one


def search(check: Check, *, examples: int, start: int, operators: Counter[str], shrink: bool = True) -> tuple[RandomModel, Exception] | None:
    """The smallest model found that breaks the promise, and how."""
    worst: list[tuple[RandomModel, Exception]] = []

    def attempt(net: RandomModel) -> None:
        operators.update(node.proto.op_type for node in net.nodes)
        try:
            check(Case(net))
        except Exception as error:
            worst.append((net, error))
            raise

    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    options = settings(max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    try:
        options(seed(start)(given(random_models())(attempt)))()
    except BaseException:
        if not worst:
            raise
        return min(worst, key=lambda found: (len(found[0].nodes), len(repr(found[0]))))
    return None


def report(check: Check, net: RandomModel, error: Exception, folder: Path) -> None:
    """Print a failure and keep it."""
    path = folder / f"{check.__name__}.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(net.proto, path)
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **net.feeds()[0])
    print(f"BROKEN {check.__name__}: {type(error).__name__}: {str(error)[:500]}\n{net}\nsaved as {path}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = {check.__name__: check for check in CHECKS}
    parser.add_argument("--examples", type=int, default=1000, help="models per promise")
    parser.add_argument("--seed", type=int, default=0, help="another one searches elsewhere")
    parser.add_argument("--check", choices=names, action="append", help="default: all")
    parser.add_argument("--save", type=Path, default=Path("broken"), help="folder for what is found")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    broken = 0
    for name in chosen.check or names:
        operators: Counter[str] = Counter()
        begin, found = time.perf_counter(), None
        for batch in range(-(-chosen.examples // BATCH)):
            found = search(names[name], examples=min(BATCH, chosen.examples), start=chosen.seed * 10_000 + batch, operators=operators)
            if found:
                report(names[name], *found, chosen.save)
                broken += 1
                break
        else:
            spent = time.perf_counter() - begin
            print(f"{name}: {chosen.examples} models, {operators.total()} nodes of {len(operators)} operators, {spent:.0f} s", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
