"""A reconstruction that was killed goes on with the block where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import SMALL, small_config

from qvit.errors import UsageError
from qvit.methods.ptq.options import EFFORTS, PTQOptions
from qvit.methods.ptq.reconstruction import Progress
from qvit.runs.run import resume, train
from qvit.training.config import TrainConfig, validated


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def config() -> TrainConfig:
    return small_config(
        method="ptq",
        budget="w4a4",
        model_kwargs=SMALL | {"depth": 3},
        method_options={"reconstruct": True, "steps": 4, "recon_images": 32, "recon_batch": 8},
    )


def kill_in(block: str, step: int) -> Progress:
    """A progress function that ends the process in a block, at a step counted over all blocks."""

    def progress(path: str, done: int, total: int, _loss: float) -> None:
        assert total == 12
        if done == step:
            assert path == block
            raise Killed

    return progress


@pytest.mark.parametrize(("block", "step", "kept"), [("blocks.0", 2, 0), ("blocks.2", 10, 2)])
def test_a_killed_reconstruction_goes_on(tmp_path: Path, block: str, step: int, kept: int) -> None:
    train(config(), tmp_path / "whole", quiet=True)
    with pytest.raises(Killed):
        train(config(), tmp_path / "run", quiet=True, progress=kill_in(block, step))
    blocks = tmp_path / "run" / "blocks"
    assert len(list(blocks.glob("*.safetensors"))) == kept
    if kept:
        with pytest.raises(UsageError, match="--resume"):
            train(config(), tmp_path / "run", quiet=True)
    told: list[str] = []
    resume(tmp_path / "run", quiet=True, notify=told.append)
    assert any(("starts again" if not kept else f"{kept} block(s)") in line for line in told)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == other
    assert not blocks.exists(), "what is finished needs no parts"


def reconstruction(seed: int, **options: Any) -> Any:
    """The reconstruction that options of `qvit ptq` ask for."""
    return validated(PTQOptions, options).reconstruction(seed)


def test_efforts_are_presets() -> None:
    assert reconstruction(0) is None
    chosen = reconstruction(7, effort="fast", recon_batch=5)
    assert chosen is not None
    assert (chosen.steps, chosen.images, chosen.batch_size, chosen.seed) == (*EFFORTS["fast"][:2], 5, 7)
    plain = reconstruction(0, reconstruct=True)
    assert plain is not None and plain.steps == EFFORTS["standard"][0]
