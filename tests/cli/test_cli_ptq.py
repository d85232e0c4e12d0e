"""`qvit ptq`: its JSON, its directory as other commands take it, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, SMALL_DIGITS, Qvit, qvit  # noqa: F401  (a fixture)
from image_sets import make_images, make_tar
from safetensors.torch import load_file, save_file
from tiny_models import events

from qvit.cli.console import bits
from qvit.runs.finished import load_run

SMALL_VIT = ["deit_tiny_patch16_224"]
for _argument in ("img_size=16", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=2"):
    SMALL_VIT += ["-m", _argument]
OPTIONS = ["--device", "cpu", "--threads", "1", "--calibration-images", "32"]


@pytest.fixture
def ptq(qvit: Qvit, float_run: Path, tmp_path: Path) -> Any:  # noqa: F811
    """Runs `qvit ptq` on digits into `tmp_path/run`."""

    def call(*arguments: Any, out: str = "run") -> Any:
        given = ["--weights", float_run, "--out", tmp_path / out, *OPTIONS, *arguments]
        return qvit("ptq", *SMALL_DIGITS, *given)

    return call


def test_result(ptq: Any, tmp_path: Path) -> None:
    result = ptq("--budget", "w8a8", "--json").json
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["model"] == "vit_digits" and result["method"] == "ptq" and result["budget"] == "w8a8"
    assert result["version"] == 2 and result["epochs"] == 0 and 0 <= result["float_accuracy"] <= 100
    assert 0 <= result["accuracy"] <= 100 and 95 <= result["agreement"] <= 100 and result["images"] == 597
    assert list(result["seconds"]) == ["calibrate", "evaluate", "total"] and result["seconds"]["calibrate"] > 0
    assert result["bit_operations"] > 0 and result["weight_bytes"] > 0 and result["seed"] == 0


def test_the_directory_is_a_run(ptq: Any, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    result = ptq("--budget", "4bit", "--json").json
    scores = qvit("evaluate", run, "--data", "digits", "--device", "cpu", "--json").json
    assert scores["top1"] == pytest.approx(result["accuracy"])
    assert qvit("plan", "show", run, "--json").json["model"] == "vit_digits"
    assert "per-channel" in qvit("plan", "show", run).out
    (row,) = qvit("report", run, "--out", tmp_path / "page.html", "--json").json["rows"]
    assert row["method"] == "ptq" and row["seconds"] == pytest.approx(result["seconds"]["total"])
    options = ["--method", "lsq+", "--plan", run / "plan.json", "--data", "digits", "--out", tmp_path / "trained"]
    trained = qvit("train", *SMALL_DIGITS, *options, *QUICK, "--json").json
    assert trained["bit_operations"] == result["bit_operations"]
    widths = [quantizer.bit_width for quantizer in load_run(run).modules() if hasattr(quantizer, "bit_width")]
    assert {int(width) for width in widths} == {4, 8}


def test_train_makes_the_same_run(ptq: Any, qvit: Qvit, float_run: Path, tmp_path: Path) -> None:  # noqa: F811
    result = ptq("--budget", "4bit", "--metric", "fisher", "--json").json
    options = ["--budget", "4bit", "-o", "metric=fisher", "--set", "calibration_images=32", "--set", "threads=1"]
    run = tmp_path / "trained"
    command = ["train", *SMALL_DIGITS, "--method", "ptq", *options, "--device", "cpu"]
    trained = qvit(*command, "--weights", float_run, "--out", run, "--json").json
    assert trained | {"seconds": 0} == result | {"seconds": 0}
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in (tmp_path / "run").iterdir())
    for name in ("plan.json", "cost.json", "model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert len(events(run, "start")) == len(events(run, "end")) == 1
    (run / "result.json").unlink()
    assert "qvit train --resume" in qvit("pack", run).failed(1)
    assert qvit("train", "--resume", run, "--json").json | {"seconds": 0} == result | {"seconds": 0}
    assert "no training" in qvit(*command, "--weights", float_run, "--dry-run").failed(2)


def test_budgets_that_are_the_same_plan(ptq: Any) -> None:
    """But for the class token's width, which a budget in bits has no room for."""
    off = ["--class-token", "off"]
    first, second = (
        ptq("--budget", budget, *own, "--json", out=budget).json for budget, own in (("w4a4", off), ("4bit", []))
    )
    assert first["bit_operations"] == second["bit_operations"] and first["accuracy"] == second["accuracy"]


def test_reconstruction_and_all_switches(ptq: Any) -> None:
    switches = ["--no-reparameterize", "--no-bias-correction", "--observer", "percentile", "--probs", "log2"]
    switches += ["--weight-scales", "per-head", "--reconstruct", "--steps", 5, "--recon-images", 48, "--fisher"]
    result = ptq("--budget", "w3a3", *switches, "--json").json
    assert result["seconds"]["reconstruct"] > 0
    assert result["reconstruction"] == {"steps": 5, "images": 48, "batch_size": 32}


def test_the_seed_decides(ptq: Any, tmp_path: Path) -> None:
    states = {}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert ptq("--budget", "w4a4", "--seed", seed, "--quiet", out=out).code == 0
        states[out] = load_file(str(tmp_path / out / "model.safetensors"))
    assert all(torch.equal(states["a"][key], states["b"][key]) for key in states["a"])
    assert any(not torch.equal(states["a"][key], states["c"][key]) for key in states["a"])


@pytest.mark.parametrize("metric", ["fisher", "hessian"])
def test_mixed_widths_within_the_budget(ptq: Any, tmp_path: Path, metric: str) -> None:
    uniform = ptq("--budget", "w4a4", "--json", out="uniform").json
    mixed = ptq("--budget", "4bit", "--metric", metric, "--json", out="mixed").json
    assert 0.9 * uniform["bit_operations"] < mixed["bit_operations"] <= uniform["bit_operations"]
    assert mixed["seconds"]["sensitivity"] > 0 and mixed["seconds"]["allocate"] > 0 and mixed["metric"] == metric
    sites = json.loads((tmp_path / "mixed" / "plan.json").read_text())["sites"]
    widths = {str(spec["bit_width"]) for spec in sites.values()}
    assert len(widths) > 2


def test_a_measured_sensitivity_serves_other_budgets(ptq: Any, tmp_path: Path) -> None:
    first = ptq("--budget", "4bit", "--metric", "fisher", "--sensitivity-images", 8, out="first").code
    kept = tmp_path / "first" / "sensitivity.json"
    assert first == 0 and json.loads(kept.read_text())["images"] == 8
    again = ptq("--budget", "4bit", "--sensitivity", kept, "--json", out="again").json
    assert again["metric"] == "fisher" and again["seconds"]["sensitivity"] < 1
    plans = [json.loads((tmp_path / run / "plan.json").read_text())["sites"] for run in ("first", "again")]
    assert plans[0] == plans[1]
    narrow = ptq("--budget", "4bit", "--sensitivity", kept, "--min-width", 3, "--json", out="narrow").json
    sites = json.loads((tmp_path / "narrow" / "plan.json").read_text())["sites"].values()
    widths = {w for site in sites for w in (site["bit_width"] if isinstance(site["bit_width"], list) else [9])}
    assert min(widths) == 3 and narrow["bit_operations"] <= again["bit_operations"] * 1.1
    ptq("--budget", "4bit", "--sensitivity", kept, "--boundary", "free", "--solver", "greedy", out="free")
    assert json.loads((tmp_path / "free" / "plan.json").read_text())["name"].startswith("fisher-4bit-greedy")
    of_ends = [
        json.loads((tmp_path / run / "plan.json").read_text())["sites"]["patch_embed.proj.weight"]["bit_width"]
        for run in ("again", "free")
    ]
    assert of_ends[0] == 8 and of_ends[1] < 8
    wrong = ["--budget", "4bit", "--sensitivity", kept, "--metric", "kl"]
    assert "was measured by 'fisher'" in ptq(*wrong, out="wrong").failed(2)


def test_text_for_people(ptq: Any) -> None:
    answer = ptq("--budget", "w8a8")
    assert answer.code == 0 and "same answer on" in answer.out and "qvit report" in answer.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--budget"),
        (["--budget", "w1a1"], 2, "2 to 16 bits"),
        (["--budget", "huge"], 2, "not understood"),
        (["--budget", "0.5"], 2, "--metric"),
        (["--budget", "0.001"], 1, "impossible"),
        (["--budget", "4bit", "--metric", "guess"], 2, "guess"),
        (["--budget", "4bit", "--metric", "fisher", "--boundary", "wide"], 2, "or free"),
        (["--budget", "4bit", "--metric", "fisher", "--boundary", "99"], 2, "boundary"),
        (["--budget", "w8a8", "--observer", "max"], 2, "observer"),
        (["--budget", "w8a8", "--calibration-images", "5000"], 1, "too few images"),
        (["--budget", "w8a8", "--reconstruct", "--recon-images", "5000"], 1, "too few images"),
        (["--budget", "w8a8", "--weights", "missing.safetensors"], 1, "no weights"),
        (["--plan", "missing.json"], 2, "neither a preset"),
        (["--budget", "w8a8", "--data", "nowhere"], 2, "does not exist"),
    ],
)
def test_errors(ptq: Any, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    assert message in ptq(*arguments).failed(code)
    assert not (tmp_path / "run" / "result.json").exists()


def test_broken_weights(ptq: Any, float_run: Path, tmp_path: Path) -> None:
    state = load_file(str(float_run / "model.safetensors"))
    state["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(state, str(tmp_path / "broken.safetensors"))
    assert "NaN" in ptq("--budget", "w8a8", "--weights", tmp_path / "broken.safetensors").failed(1)


def test_an_existing_run_is_kept(ptq: Any) -> None:
    assert ptq("--budget", "w8a8", "--quiet").code == 0
    assert "--overwrite" in ptq("--budget", "w4a4").failed(2)
    assert ptq("--budget", "w4a4", "--overwrite", "--json").json["budget"] == "w4a4"


def test_images_in_both_sets_are_refused(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    folder = make_images(tmp_path / "all", {"a": 12, "b": 12})
    shutil.copytree(folder, tmp_path / "all" / "c")  # a sub-folder that is evaluated on its own
    options = [*OPTIONS[:4], "--calibration-images", "8", "--budget", "w8a8", "--out", tmp_path / "run"]
    failure = qvit("ptq", *SMALL_VIT, "--data", folder, "--eval-data", folder / "c", *options).failed(1)
    assert "calibration images too" in failure
    archive = make_tar(make_images(tmp_path / "two", {"a": 12, "b": 12}, seed=4), tmp_path / "two.tar")
    link = tmp_path / "link.tar"
    link.symlink_to(archive)
    failure = qvit("ptq", *SMALL_VIT, "--data", archive, "--eval-data", link, *options).failed(2)
    assert "are the training data" in failure
    others = make_images(tmp_path / "others", {"a": 6, "b": 6}, seed=5)
    assert qvit("ptq", *SMALL_VIT, "--data", archive, "--eval-data", others, *options, "--json").json["images"] == 12


def test_images_of_several_sizes(ptq: Any, qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    sizes, free = ["--image-size", "8", "--image-size", "8x12"], ["-m", "dynamic_img_size=true"]
    assert "takes images of 8x8 pixels, not 8x12" in ptq("--budget", "w4a4", *sizes).failed(2)
    assert "HEIGHTxWIDTH" in ptq("--budget", "w4a4", *free, "--image-size", "8*12", out="other").failed(2)
    answer = ptq("--budget", "w4a4", *free, *sizes, out="free")
    assert answer.code == 0 and "32 images of 8x8, 8x12 pixels" in answer.out
    assert qvit("pack", tmp_path / "free").code == 0
    scores = ("evaluate", tmp_path / "free" / "packed.safetensors", "--data", "digits", "--json")
    assert qvit(*scores, "--image-size", "8x12").json["images"] == 597


def test_pmq(qvit: Qvit, float_run: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ["pmq", *SMALL_DIGITS, "--weights", float_run, "--out", tmp_path / "run", *OPTIONS, "--share", "0.5"]
    out = qvit(*command, "--budget", "4bit", "--points", "5").out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    chosen, search = result["search"]["chosen"], result["search"]
    assert result["method"] == "pmq" and len(search["frontier"]) == 5
    words = " ".join(out.split())
    assert f"{chosen['class_token']} activations with a width for the class token alone" in words
    assert f"{chosen['split']} with patches of two widths" in words
    rows = qvit("plan", "show", tmp_path / "run", "--json").json["sites"].values()
    groups = [row["token_bit_width"] for row in rows if row and "token_bit_width" in row]
    assert sum(own["share"] == 0 for own in groups) == chosen["class_token"]
    assert sum(own["share"] > 0 for own in groups) == chosen["split"] and groups
    assert bits(8, {"share": 0.5, "high": 5, "low": 3}) == "8 | 5 | 3 (prefix tokens | tokens: 50 % | rest)"
    assert "give --budget, such as 4bit" in qvit(*command, "--overwrite").failed(2)
    help_text = qvit("pmq", "--help").out
    assert "--no-patches" in help_text and "--max-drop" not in help_text
