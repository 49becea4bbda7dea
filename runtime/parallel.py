"""Many samples on several machines, each in a process of its own.

The one big idea: an inference is thousands of short numpy calls, which threads of one interpreter would only pass back and forth;
processes share nothing, and the bytes are the same whoever computes them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from isa.program import Program

if TYPE_CHECKING:
    from runtime.host import HostEngine
    from runtime.machine import Machine
    from runtime.memory import Array

#: what a worker sends back: outputs, raw, tensors
Values = tuple[dict[str, "Array"], dict[str, "Array"], dict[str, "Array"]]
#: how the usual BLAS libraries and numba are told their number of threads, when a process starts
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS")
#: the machine of this worker process
_own: list[Machine] = []


def run_in_processes(
    program: Program,
    constants: bytes,
    samples: Iterable[Mapping[str, Any]],
    *,
    workers: int,
    dump: bool | Collection[str] | None,
    host: HostEngine | None = None,
    engine: str | None = None,
) -> Iterator[Values]:
    """Outputs, stored outputs and tensors per sample, in order. At most twice as many samples as workers wait at a time."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _load, (program, constants, host, engine)) as pool:
        pending: deque[Future[Values]] = deque()
        for sample in samples:
            with _one_thread():
                pending.append(pool.submit(_run, dict(sample), dump))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _load(program: Program, constants: bytes, host: HostEngine | None, engine: str | None) -> None:
    from runtime.machine import Machine

    _own.append(Machine(program, constants, host=host, engine=engine))


def _run(sample: dict[str, Any], dump: bool | Collection[str] | None) -> Values:
    run = _own[0].run(sample, dump=dump)
    return run.outputs, run.raw, run.tensors


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started meanwhile use one thread each, unless the environment says otherwise: they would only fight for the cores."""
    added = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
