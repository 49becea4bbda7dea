"""Options and fixtures of all tests: `pytest --update-golden` rewrites the golden files instead of comparing with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import npucc
from npucc import demo

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the code yields now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text equals tests/golden/NAME (or becomes it, with --update-golden)."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; run pytest --update-golden and read what it wrote"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; if the change is meant, run pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def demo_package() -> npucc.Package:
    """The bundled network, compiled for `edge` with the bundled calibration data."""
    return npucc.compile(demo.MODEL, calibration=demo.CALIBRATION)


@pytest.fixture(scope="session")
def demo_file(demo_package: npucc.Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a `.npu` file."""
    path = tmp_path_factory.mktemp("demo") / "shapes.npu"
    demo_package.save(path)
    return path
