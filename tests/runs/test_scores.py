"""An evaluation that was ended goes on where it was, and comes to the scores of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Qvit, qvit  # noqa: F401
from image_sets import CONFIG, make_images
from tiny_models import small_config
from torch import Tensor, nn

from qvit.data.loading import eval_loader
from qvit.data.open import open_source
from qvit.measure import partial as partial_module
from qvit.measure.features import judge_features
from qvit.measure.partial import Partial
from qvit.runs.run import train
from qvit.runs.scores import counted_so_far
from qvit.training.evaluate import evaluate

Score = Any


class Projection(nn.Module):
    """Logits, or features, by a fixed random projection of the image that is a parameter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(CONFIG["input_size"][1] ** 2 * 3, 6, generator=generator))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


def scored(model: nn.Module, loader: Any, **options: Any) -> dict[str, Any]:
    return evaluate(model, loader, reference=Projection(1), **options)


def judged(model: Any, loader: Any, **options: Any) -> dict[str, Any]:
    return judge_features(Projection(1), model, loader, lambda _: ["all"], **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("score", [scored, judged])
def test_scores_go_on(tmp_path: Path, score: Score, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With unreadable images on both sides of the place where it was ended, and a batch of nothing else."""
    folder, kept = make_images(tmp_path / "images", {"cat": 9, "dog": 9}), tmp_path / "s.json.partial"
    for number in (2, 4, 5, 15):
        sorted(folder.rglob("*.*"))[number].write_text("no image")
    monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)

    def call(seed: int = 0, batch_size: int = 2, path: Path | None = None, stop: int = 100) -> tuple[Any, list[int]]:
        source, model, seen = open_source(folder), Projection(seed), list[int]()

        def tell(images: int) -> None:
            seen.append(images)
            if len(seen) == stop:
                raise KeyboardInterrupt

        loader = eval_loader(source, CONFIG, batch_size=batch_size, workers=workers, on_bad_image="skip")
        partial = counted_so_far(path, source, CONFIG, batch_size, models=[model])
        return score(model, loader, progress=tell, partial=partial), seen

    whole, images = call()
    assert (whole["images"], whole["skipped"]) == (14, 4) and images == [2, 3, 5, 7, 9, 11, 12, 14]
    with pytest.raises(KeyboardInterrupt):
        call(path=kept, stop=4)
    for other in ({"seed": 2}, {"batch_size": 3}):
        assert call(**other, path=Path(kept.rename(tmp_path / "other")))[1][0] <= 3, "of another call"
        (tmp_path / "other").rename(kept)
        with pytest.raises(KeyboardInterrupt):
            call(path=kept, stop=4)
    again, images = call(path=kept)
    assert again == whole and images == [7, 9, 11, 12, 14]


def test_of_a_run_and_of_a_packed_model(
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(small_config(method="float", epochs=1), tmp_path / "float", quiet=True)
    quantized = small_config(method="ptq", plan="w8a8", weights=str(tmp_path / "float"))
    train(quantized, tmp_path / "run", quiet=True)
    assert qvit("pack", tmp_path / "run", "--out", tmp_path / "packed.safetensors").code == 0
    monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)
    for model in (tmp_path / "run", tmp_path / "packed.safetensors"):
        for more in ([], ["--features", "--weights", tmp_path / "float"]):
            target = tmp_path / "scores.json"
            arguments = ("evaluate", model, "--data", "digits", "--batch-size", "100", "--json", *more)
            wanted = qvit(*arguments).json
            save, saved = Partial.save, list[int]()

            def ends(self: Partial, done: int, tensors: Any, saved: Any = saved, save: Any = save) -> None:
                save(self, done, tensors)
                saved.append(done)
                if len(saved) == 3:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(Partial, "save", ends)
                assert qvit(*arguments, "--out", target).code == 130
            assert not target.exists() and (tmp_path / "scores.json.partial").is_file()
            with monkeypatch.context() as patched:
                patched.setattr(Partial, "save", ends)
                assert qvit(*arguments, "--out", target).json == wanted
            assert saved[:4] == [1, 2, 3, 4], "it began after the third batch"
            assert json.loads(target.read_text()) == wanted and [path.name for path in tmp_path.glob("scores*")] == [
                "scores.json"
            ]
            target.unlink()


def test_scores_do_not_replace_the_model(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "packed.safetensors").write_text("")
    for target in (tmp_path, tmp_path / "packed.safetensors"):
        line = qvit("evaluate", tmp_path / "packed.safetensors", "--data", "digits", "--out", target).failed(2)
        assert "name a file with --out" in line
