"""The rivals at two bits, `ofq` and `irm`: their plans, the guiding loss by hand, and runs to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import digits_model, small_config

from qvit.errors import UsageError
from qvit.methods import create_method
from qvit.methods.irm import similarity_distance
from qvit.models.families import inspect_model
from qvit.quantizers import quantizers_of
from qvit.quantizers.statsq import StatsQuantizer
from qvit.runs.finished import load_run
from qvit.runs.run import resume, train
from qvit.training import checkpoint as checkpoint_module


def plan_of(method: str, **options: Any) -> Any:
    plan = create_method(small_config(method=method, budget="2bit", method_options=options)).plan(
        inspect_model(digits_model())
    )
    assert plan is not None
    return plan.sites


def test_plans() -> None:
    for site, spec in plan_of("ofq").items():
        assert spec.quantizer == ("statsq" if site.endswith("weight") else "lsq")
    rectified = {site for site, spec in plan_of("irm").items() if spec.quantizer == "irm"}
    assert rectified == {f"blocks.0.attn.{name}" for name in ("query", "key")}
    assert not any(spec.quantizer == "irm" for spec in plan_of("irm", rectify=False).values())
    cost = inspect_model(digits_model())
    for method in ("ofq", "irm"):
        widths = {site: spec.widths for site, spec in plan_of(method).items()}
        assert cost.bit_operations(widths) == cost.bit_operations(cost.uniform(2))


def test_guidance_by_hand() -> None:
    """Cosines of all pairs of tokens, scaled to norm one; two images, two heads, written as loops."""
    torch.manual_seed(0)
    x, reference = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 3, 4, dtype=torch.float64)
    total = 0.0
    for image in range(2):
        for head in range(2):
            own, wanted = (t[image, head] @ t[image, head].T for t in (x, reference))
            total += float((wanted / wanted.norm() - own / own.norm()).norm())
    assert float(similarity_distance(x, reference)) == pytest.approx(total / 2, rel=1e-5)
    assert float(similarity_distance(3 * x, x)) == pytest.approx(0, abs=1e-5)  # no matter how long the vectors are


def test_guidance_draws_queries_to_those_of_the_float_model(tmp_path: Path) -> None:
    """With the similarities alone as loss, the distance falls."""
    options = {"method": "irm", "budget": "3bit", "epochs": 3, "lr": 2e-3}
    losses = {}
    for guidance in (1.0, 20.0):
        run = tmp_path / str(guidance)
        train(small_config(**options, method_options={"guidance": guidance}), run, quiet=True)
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        penalties = [step["penalty"] / guidance for step in steps if step["event"] == "step"]
        assert all(penalty > 0 for penalty in penalties)
        losses[guidance] = penalties
    assert losses[20.0][-1] < losses[20.0][0] and losses[20.0][-1] < losses[1.0][-1]


@pytest.mark.parametrize("method", ["ofq", "irm"])
def test_a_run_and_its_resumption(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(method=method, budget="2bit", epochs=4)
    whole = train(config, tmp_path / "whole", quiet=True)
    original, saved = checkpoint_module.save_checkpoint, []

    def stops(*arguments: Any, **options: Any) -> Path:
        saved.append(original(*arguments, **options))
        if len(saved) == 3:
            raise KeyboardInterrupt
        return saved[-1]

    monkeypatch.setattr("qvit.training.loop.save_checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken", quiet=True)
    monkeypatch.setattr("qvit.training.loop.save_checkpoint", original)
    again = resume(tmp_path / "broken", quiet=True)
    assert again["accuracy"] == whole["accuracy"]
    first, second = load_run(tmp_path / "whole"), load_run(tmp_path / "broken")
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    if method == "ofq":
        kinds = [isinstance(q, StatsQuantizer) for site, q in quantizers_of(first) if site.endswith("weight")]
        assert kinds and all(kinds)
        log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
        sites = [line for line in log if line["event"] == "diagnostics"][-1]["sites"]
        assert all(site.endswith("weight") for site in sites) and len(sites) == len(kinds)


def test_a_compiled_model_cannot_be_guided(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be compiled"):
        train(small_config(method="irm", budget="2bit", compile=True), tmp_path / "run", quiet=True)
