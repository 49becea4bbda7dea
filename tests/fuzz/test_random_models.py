"""Random models keep every promise: a fixed, small part of what tests/fuzz/search.py looks at."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from npucc import reference
from tests.fuzz.checks import CHECKS, Broken, Case, Check, export_agrees
from tests.fuzz.random_models import RandomModel, random_models
from tests.fuzz.search import search

EXAMPLES = {check.__name__: 25 for check in CHECKS} | {"machine_equals_reference": 12}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check.__name__))
def test_random_models_keep(check: Check) -> None:
    @settings(max_examples=EXAMPLES[check.__name__], deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(random_models())
    def attempt(net: RandomModel) -> None:
        check(Case(net))

    attempt()


@pytest.mark.filterwarnings("ignore")
def test_a_search_finds_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.KERNELS["concat"]
    monkeypatch.setitem(reference.KERNELS, "concat", lambda call: right(call)[..., ::-1])
    found = search(export_agrees, examples=60, start=3, operators=Counter(), shrink=False)
    assert found is not None
    assert isinstance(found[1], Broken)
    assert "Concat" in repr(found[0])
