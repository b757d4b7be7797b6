"""Every system's recorded fixtures, through the same adapters as `python -m tests.parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import parity

SYSTEMS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith(("_", "test_")))


@pytest.mark.parametrize("system", SYSTEMS)
def test_fixture(system: str, shared: Path) -> None:
    checks = list(parity.run(shared / "fixtures" / system))
    assert checks
    assert [c for c in checks if not c.passed] == []
