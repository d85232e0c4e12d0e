"""What tests of several commands start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import small_config

from qvit.runs.run import train


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of digits, trained for a moment."""
    out = tmp_path_factory.mktemp("float") / "run"
    train(small_config(method="float", epochs=2), out, quiet=True)
    return out
