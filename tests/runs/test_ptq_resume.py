"""A reconstruction that was killed goes on with the block where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import SMALL, small_config

from qvit.errors import UsageError
from qvit.measure import partial as partial_module
from qvit.methods.ptq.images import Progress
from qvit.methods.ptq.options import EFFORTS, PTQOptions
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

    def progress(path: str, done: int, total: int, _loss: str) -> None:
        if path.startswith("blocks"):
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


def test_a_measured_sensitivity_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed while it measured goes on with the next image; one killed later does not measure again."""
    monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)
    mixed = config().model_copy(update={"budget": "4bit", "method_options": {"metric": "fisher"}})
    seen: list[tuple[str, int]] = []

    def kill_at(text: str, image: int) -> Progress:
        def progress(part: str, done: int, _total: int, _figures: str) -> None:
            seen.append((part, done))
            if part == text and done >= image:
                raise Killed

        return progress

    train(mixed, tmp_path / "whole", quiet=True)
    with pytest.raises(Killed):
        train(mixed, tmp_path / "run", quiet=True, progress=kill_at("sensitivity (fisher)", 5))
    with pytest.raises(Killed):
        resume(tmp_path / "run", quiet=True, progress=kill_at("calibrating", 1))
    assert ("sensitivity (fisher)", 5) in seen
    seen.clear()
    resume(tmp_path / "run", quiet=True, progress=kill_at("", 0))
    assert seen
    assert not any(part.startswith("sensitivity") for part, _ in seen)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == other
    assert not list((tmp_path / "run").glob("*.partial"))


def test_efforts_are_presets() -> None:
    assert reconstruction(0) is None
    chosen = reconstruction(7, effort="fast", recon_batch=5)
    assert chosen is not None
    assert (chosen.steps, chosen.images, chosen.batch_size, chosen.seed) == (*EFFORTS["fast"][:2], 5, 7)
    plain = reconstruction(0, reconstruct=True)
    assert plain is not None and plain.steps == EFFORTS["standard"][0]
