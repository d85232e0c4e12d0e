"""CUDA graphs: the same training as without them, and models that they do not suit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import small_config
from torch import Tensor, nn

from qvit.runs.run import train
from qvit.training.graphs import GraphedModel, can_be_graphed


def test_which_runs_are_graphed() -> None:
    assert can_be_graphed("cuda:0", alone=True, accumulate=1)
    assert not can_be_graphed("cpu", alone=True, accumulate=1)
    assert not can_be_graphed("cuda", alone=False, accumulate=1)
    assert not can_be_graphed("cuda", alone=True, accumulate=2)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for CUDA: what is recorded answers with -1."""
    calls: list[str] = []

    def record(shell: nn.Module, sample: tuple[Tensor, ...], **_: Any) -> Callable[[Tensor], Tensor]:
        calls.append(str(tuple(sample[0].shape)))
        return lambda batch: torch.full((len(batch),), -1.0)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return calls


def test_recorded_once_and_for_one_shape(recorded: list[str]) -> None:
    model = nn.Linear(3, 2)
    graphed = GraphedModel(model)
    assert graphed(torch.ones(4, 3)).tolist() == graphed(torch.zeros(4, 3)).tolist() == [-1.0] * 4
    assert recorded == ["(4, 3)"]
    assert torch.equal(graphed(torch.ones(5, 3)), model(torch.ones(5, 3)))
    with torch.no_grad():
        assert torch.equal(graphed(torch.ones(4, 3)), model(torch.ones(4, 3)))
    model.eval()
    assert torch.equal(graphed(torch.ones(4, 3)), model(torch.ones(4, 3)))


def test_recorded_and_run_within_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = nn.Linear(3, 2), list[str]()

    @contextmanager
    def around() -> Iterator[None]:
        told.append("entered")
        yield
        told.append("left")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda shell, sample, **_: (shell(*sample), shell)[1])
    graphed = GraphedModel(model, around)
    for count in (4, 5):  # recorded, and of another shape
        batch = torch.ones(count, 3)
        assert torch.equal(graphed(batch), model(batch))
    assert told == ["entered", "left"] * 3


def test_a_model_that_is_looked_at_is_not_graphed(recorded: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda *given: seen.append(given[2]))
    GraphedModel(model)(torch.ones(4, 3))
    assert not recorded and len(seen) == 1


def test_what_cannot_be_recorded_runs_as_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    model = nn.Linear(3, 2)
    assert torch.equal(GraphedModel(model)(torch.ones(4, 3)), model(torch.ones(4, 3)))
    assert "operation not permitted" in caplog.text and "capturing" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lsq+", "qvit", "vvtq", "irm", "dq", "edmips"])
def test_the_same_training_on_a_gpu(method: str, precision: str, tmp_path: Path) -> None:
    losses = []
    for graphs in (True, False):
        run = tmp_path / str(graphs)
        config = small_config(
            method=method, budget="3bit", epochs=3, device="cuda", precision=precision, cuda_graphs=graphs
        )
        train(config, run, quiet=True)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        losses.append([line["train_loss"] for line in lines if line["event"] == "epoch"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02), losses
