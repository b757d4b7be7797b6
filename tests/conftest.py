"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures and data sets beside the checkout; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with fixtures and data is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """A test that draws numbers draws the same ones in whatever order the tests run."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not SHARED.is_dir():
        text = "left out: the tests on ../shared (fixtures and data), which is not beside this checkout"
        terminalreporter.write_line(text)
