"""Options of a run: what they may be, and that they survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvit.errors import UsageError
from qvit.training.config import TrainConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": "many"}, "epochs = 'many'"),
        ({"lr": -1}, "lr = -1"),
        ({"distill": 1.5}, "distill = 1.5"),
        ({"augment": "heavy"}, "augment = 'heavy'.*'none', 'light' or 'deit'"),
        ({"precision": "fp16"}, "precision = 'fp16'"),
        ({"test_share": 1.0}, "test_share"),
        ({"epochs": 0, "lr": 0}, "epochs = 0.*; lr = 0"),
    ],
)
def test_options_are_validated(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TrainConfig.create(**({"model": "vit_digits"} | values))
    assert "\n" not in str(caught.value)


def test_a_config_survives_json_and_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.create(model="vit_digits", data="images", method_options={"head_wise": False}, mixup=0.5)
    assert config.data == str(tmp_path / "images"), "a run is resumed from wherever you are"
    assert TrainConfig.create(**json.loads(json.dumps(config.model_dump()))) == config
    with pytest.raises(ValueError):
        config.lr = 1.0  # type: ignore[misc]
    (tmp_path / "digits").mkdir()
    assert TrainConfig.create(model="vit_digits", data="digits").data == "digits"
