"""The dry run: it agrees with the real run, writes nothing, loads nothing, and counts the bytes that autograd saves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, SMALL_DIGITS, Qvit
from command_line import qvit as qvit  # a fixture
from tiny_models import SMALL, calibrated_model, digits_model, events, make_images, small_config
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.dry_run import dry_run, saved_for_backward
from qvit.runs.run import train


def really_saved(model: nn.Module, batch: int, *, bf16: bool = False) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, parameters and buffers left out."""
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, targets = torch.randn(batch, 1, 8, 8), torch.zeros(batch, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = nn.functional.cross_entropy(model(images).float(), targets)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("plan", [None, "w4a4", "learned"])
def test_saved_bytes_are_those_of_a_real_pass(plan: str | None, bf16: bool) -> None:
    def make() -> nn.Module:
        if plan is None:
            return digits_model()
        if plan != "learned":
            return calibrated_model(plan)
        start = QuantPlan.preset("w4a4").resolve(inspect_model(digits_model()).sites)
        sites = {name: spec and spec.changed({"learn_bit_width": True}) for name, spec in start.sites.items()}
        return calibrated_model(QuantPlan("learned", (), sites))

    for batch in (1, 7):
        expected = really_saved(make(), batch, bf16=bf16)
        assert saved_for_backward(make(), batch, bf16=bf16) == pytest.approx(expected, rel=0.02), batch


def test_activations_grow_with_the_batch_and_parameters_do_not() -> None:
    memory = [
        dry_run(small_config(budget="3bit", batch_size=size, accumulate=accumulate))["memory"]["parts"]
        for size, accumulate in ((10, 1), (20, 1), (20, 2))
    ]
    assert memory[1]["activations"] == pytest.approx(2 * memory[0]["activations"], rel=0.05)
    assert memory[2] == memory[0], "an accumulated step needs the memory of its micro-batch"
    assert memory[0]["parameters"] == memory[0]["gradients"] == memory[1]["parameters"]
    assert memory[0]["optimizer"] == 2 * memory[0]["parameters"], "Adam keeps two moments"


@pytest.mark.parametrize(("opt", "copies"), [("sgd", 1), ("adamw", 2), ("lion", 1)])
def test_optimizer_state_is_that_of_the_optimizer(opt: str, copies: int) -> None:
    parts = dry_run(small_config(method="float", opt=opt))["memory"]["parts"]
    assert parts["optimizer"] == copies * parts["parameters"]
    with pytest.raises(UsageError, match="adamwww"):
        dry_run(small_config(method="float", opt="adamwww"))


def test_further_models_are_counted(tmp_path: Path) -> None:
    def parts(**changes: Any) -> dict[str, int]:
        return dry_run(small_config(**changes))["memory"]["parts"]

    plain = parts(method="lsq+", budget="3bit")
    floating = sum(p.numel() * 4 for p in create_model("vit_digits", **SMALL).parameters())
    assert plain["float_model"] == floating < plain["parameters"]
    assert parts(method="float").keys() == {"parameters", "gradients", "optimizer", "activations"}
    assert parts(method="lsq+", budget="3bit", ema_decay=0.9)["averaged_model"] == plain["parameters"]
    taught = parts(method="lsq+", budget="3bit", distill=0.5, teacher="vit_digits", teacher_kwargs=SMALL | {"depth": 2})
    assert floating < taught["teacher"] < 2 * floating
    train(small_config(method="float", epochs=1), tmp_path / "run", quiet=True)
    taught = parts(method="float", distill=1, teacher=str(tmp_path / "run"))
    assert taught["teacher"] == pytest.approx(floating, rel=0.3), "the file has a header"


@pytest.mark.parametrize("method", ["float", "lsq+", "qvit", "dq", "edmips"])
def test_it_agrees_with_the_run(tmp_path: Path, method: str) -> None:
    budget = None if method == "float" else "3bit"
    config = small_config(method=method, budget=budget, epochs=1, monitor_share=0.1)
    plan = dry_run(config)
    train(config, tmp_path / "run", quiet=True)
    (start,) = events(tmp_path / "run", "start")
    assert plan["steps_per_epoch"] == start["steps_per_epoch"] and plan["steps"] == start["steps_per_epoch"]
    assert plan["budget_bit_operations"] == start["budget_bit_operations"]
    assert plan["images"] == {"train": 1080, "held out": 120, "test": 597} and plan["classes"] == 10
    if method in ("float", "lsq+"):  # widths that are learned are others at the end
        cost = json.loads((tmp_path / "run" / "cost.json").read_text())
        assert (plan["bit_operations"], plan["weight_bytes"]) == (cost["bit_operations"], cost["weight_bytes"])
    if method == "lsq+":
        assert plan["plan"]["sites"] == QuantPlan.load(tmp_path / "run").to_json()["sites"]
    assert json.loads(json.dumps(plan)) == plan


def test_widths_are_summed_up_by_kind_of_tensor() -> None:
    rows = dry_run(small_config(budget="3bit", model_kwargs=SMALL | {"depth": 3}))["widths"]
    by_name = {row["tensors"]: row for row in rows}
    assert len(by_name) == len(rows) < 20
    query = {"tensors": "blocks.*.attn.query", "sites": 3, "widths": 6, "bits": [3, 3], "learned": True}
    assert by_name["blocks.*.attn.query"] == query
    assert by_name["head.weight"]["bits"] == [8, 8] and by_name["head.weight"]["sites"] == 1


def test_processes_share_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = dry_run(small_config(budget="3bit", batch_size=80, accumulate=2))
    assert (plan["processes"], plan["micro_batch"], plan["steps_per_epoch"]) == (4, 10, 15)


def test_without_data_there_are_costs_and_memory_but_no_steps() -> None:
    plan = dry_run(small_config(budget="3bit"), with_data=False)
    assert plan["images"] is plan["steps"] is plan["steps_per_epoch"] is None
    assert plan["bit_operations"] > 0 and plan["memory"]["total"] > 0 and plan["classes"] == 10


def test_wrong_options_fail_as_they_do_in_a_run() -> None:
    for changes, message in (
        ({"method": "lsq"}, "either --budget"),
        ({"budget": "0.1M"}, "impossible"),
        ({"budget": "3bit", "method_options": {"head_wize": True}}, "did you mean 'head_wise'"),
        ({"budget": "3bit", "data": "./nowhere"}, "nowhere"),
        ({"budget": "3bit", "batch_size": 50, "accumulate": 4}, "multiple of 4"),
    ):
        with pytest.raises(QvitError, match=message):
            dry_run(small_config(**changes))


# ------------------------------------------------------------------------------------------------------ command line


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_command_writes_nothing_and_loads_nothing(
    qvit: Qvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = make_images(tmp_path / "images", {"ant": 6, "bee": 6})
    before = files_in(tmp_path)
    command = ["train", "deit_tiny_patch16_224", "--pretrained", "--budget", "4bit", "--batch-size", 4, "--epochs", 3]
    answer = qvit(*command, "--data", images, "--dry-run", "--out", "run")
    assert answer.code == 0 and answer.err == "" and files_in(tmp_path) == before
    for fact in (
        "blocks.*.attn.query",
        "learned",
        "budget 21.4",
        "timm's hub",
        "10 train, 2 test",
        "= 6 steps of 4 images",
    ):
        assert fact in answer.out, fact
    assert len(answer.out.splitlines()) < 40
    plan = qvit(*command, "--data", images, "--dry-run", "--json").json
    assert plan["steps"] == 6 and len(plan["plan"]["sites"]) > 100 and files_in(tmp_path) == before


def test_the_command_names_weights_that_are_not_there(qvit: Qvit) -> None:
    answer = qvit("train", *SMALL_DIGITS, "--budget", "3bit", "--weights", "runs/none", *QUICK, "--dry-run")
    assert answer.code == 0 and "runs/none (nothing there yet)" in answer.out


def test_one_process_of_several_speaks(qvit: Qvit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        answer = qvit("train", *SMALL_DIGITS, "--budget", "3bit", *QUICK, "--dry-run")
        assert answer.code == 0 and ("2 processes" in answer.out) == (rank == 0), os.environ["RANK"]


def test_wrong_use_of_the_command(qvit: Qvit) -> None:
    assert "give a MODEL" in qvit("train", "--dry-run").failed(2)
    assert "--resume takes" in qvit("train", "--resume", "run", "--dry-run").failed(2)
    assert "unknown model" in qvit("train", "vit_digitz", "--dry-run").failed(2)
