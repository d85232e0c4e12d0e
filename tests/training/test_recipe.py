"""Recipes: every file of the repository is valid and says what it promises; merging, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import QUICK, SMALL_DIGITS, Qvit
from command_line import qvit as qvit  # a fixture
from tiny_models import SMALL

from qvit.methods import create_method
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.budget import parse_budget
from qvit.training.config import TrainConfig
from qvit.training.recipe import config_from_recipe, merged, read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
IMAGENET = [recipe for recipe in RECIPES if not recipe.stem.startswith("digits")]
VVTQ = [recipe for recipe in IMAGENET if recipe.stem.endswith("vvtq")]
# The float model, LSQ+ and Q-ViT: top-1 in percent and G bit operations, Q-ViT paper, Table 1.
PUBLISHED = {
    "deit-tiny-4bit": ("72.86", ("72.46", "21.5"), ("72.79", "21.4")),
    "deit-tiny-3bit": ("72.86", ("68.09", "12.9"), ("69.62", "13.0")),
    "deit-small-4bit": ("79.92", ("79.66", "76.4"), ("80.11", "77.9")),
    "deit-small-3bit": ("79.92", ("77.76", "44.6"), ("78.08", "45.7")),
    "swin-tiny-4bit": ("80.90", ("80.47", "72.6"), ("80.59", "70.1")),
    "swin-tiny-3bit": ("80.90", ("78.96", "41.3"), ("79.45", "40.8")),
}
# The float model and VVTQ: top-1 in percent, README of its public code.
PUBLISHED_VVTQ = {
    "deit-tiny-4bit": ("73.75", "74.71"),
    "deit-tiny-3bit": ("73.75", "71.22"),
    "deit-tiny-2bit": ("73.75", "59.73"),
    "swin-tiny-4bit": ("81.0", "82.42"),
    "swin-tiny-3bit": ("81.0", "81.37"),
    "swin-tiny-2bit": ("81.0", "77.66"),
}


def ids(recipe: Path) -> str:
    return recipe.stem


def header(recipe: Path) -> dict[str, str]:
    """The labelled comments on top of a recipe, each on one line."""
    lines = recipe.read_text("utf-8").split("\n\n")[0].splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    parts = re.split(r"\b(labels|command|hours|published|budget):\s+", text)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def config_of(recipe: Path) -> TrainConfig:
    return config_from_recipe(recipe, {} if recipe.stem.startswith("digits") else {"data": "imagenet"})


# ------------------------------------------------------------------------------------------- the repository's recipes


def test_every_model_budget_and_method_has_its_recipe() -> None:
    expected = {
        f"{base}-{method}{kind}" for base in PUBLISHED for method in ("lsq+", "qvit") for kind in ("", "-paper")
    }
    expected |= {f"{base}-vvtq" for base in PUBLISHED_VVTQ}
    expected |= {f"{base}-qvit+vvtq" for base in PUBLISHED_VVTQ if not base.endswith("4bit")}
    assert {recipe.stem for recipe in RECIPES} == expected | {"digits-float", "digits-3bit-qvit"}


def test_recipes_are_what_their_generator_writes() -> None:
    done = subprocess.run([sys.executable, ROOT / "recipes" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_recipes_are_valid_and_their_models_are_known(recipe: Path) -> None:
    config = config_of(recipe)
    method = create_method(config)
    assert timm.is_model(config.model)
    with torch.device("meta"):
        model = create_model(config.model)
    cost = inspect_model(model)
    plan = method.plan(cost)
    assert (plan is None) == (config.method == "float")
    if config.budget is not None:
        (number, unit) = re.findall(r"^([\d.]+) ([GM]) bit operations", header(recipe)["budget"])[0]
        factor, digits = {"G": 1e9, "M": 1e6}[unit], len(number.partition(".")[2])
        assert parse_budget(config.budget, cost) / factor == pytest.approx(float(number), abs=0.51 * 10**-digits)


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_headers_say_how_to_run_what_it_takes_and_what_to_expect(recipe: Path) -> None:
    says = header(recipe)
    assert set(says) == {"command", "hours", "published", "budget"} | ({"labels"} if recipe in VVTQ else set())
    assert f"recipes/{recipe.name}" in says["command"] and "--out runs/" in says["command"]
    assert max(map(len, recipe.read_text("utf-8").splitlines())) <= 120
    if recipe in VVTQ:
        floating, top1 = PUBLISHED_VVTQ[recipe.stem.rpartition("-")[0]]
        own = "uniform widths reach" in says["published"]
        assert own == ("qvit+" in recipe.stem) and f"{top1} % top-1 (Huang et al. 2023" in says["published"]
        assert f"float {floating} %" in says["published"]
    elif recipe in IMAGENET:
        base, _, method = re.sub("-paper$", "", recipe.stem).partition("bit-")
        floating, uniform, learned = PUBLISHED[base + "bit"]
        top1, giga = learned if method == "qvit" else uniform
        assert says["published"].startswith(f"{top1} % top-1 at {giga} G bit operations (Li et al. 2022")
        assert "Table 1" in says["published"] and f"float {floating} %" in says["published"]
    if recipe in IMAGENET:
        assert "an estimate, not measured" in says["hours"] and "--data PATH/TO/imagenet" in says["command"]


@pytest.mark.parametrize("recipe", IMAGENET, ids=ids)
def test_hours_follow_from_the_formula(recipe: Path) -> None:
    text = header(recipe)["hours"]
    low, high, low8, high8 = (
        int(n) for n in re.findall(r"(\d+) to (\d+) on one GPU, (\d+) to (\d+) on eight", text)[0]
    )
    macs = float(re.findall(r"\(([\d.]+) G\)", text)[0]) * 1e9
    seconds = 6 * macs * 1_281_167 * config_of(recipe).epochs / 5e12
    assert low == pytest.approx(1.5 * seconds / 3600, abs=5.1) and high == pytest.approx(2 * seconds / 3600, abs=5.1)
    assert low8 == pytest.approx(low / 8, abs=0.51) and high8 == pytest.approx(high / 8, abs=0.51)


@pytest.mark.parametrize("base", PUBLISHED)
def test_pairs_differ_in_the_method_alone(base: str) -> None:
    def options(name: str) -> dict[str, Any]:
        return read_recipe(ROOT / "recipes" / f"{name}.toml")

    ours, uniform = options(f"{base}-qvit"), options(f"{base}-lsq+")
    assert ours | {"method": "lsq+"} == uniform and ours["budget"] == base.rpartition("-")[2]
    published, baseline = options(f"{base}-qvit-paper"), options(f"{base}-lsq+-paper")
    own = {"method_options": published["method_options"]}
    assert published == ours | own, "the schedule of all recipes of a model is that of the paper"
    assert baseline == uniform | {"lr": 5e-4}, "the published baseline has another learning rate"


@pytest.mark.parametrize("recipe", [r for r in IMAGENET if r.stem.endswith("qvit-paper")], ids=ids)
def test_the_paper_s_training(recipe: Path) -> None:
    """Q-ViT, section 4.1, and DeiT's training, which it follows."""
    config = config_of(recipe)
    assert (config.opt, config.lr, config.batch_size, config.epochs) == ("adamw", 2e-4, 512, 300)
    assert (config.sched, config.min_lr, config.warmup_epochs, config.weight_decay) == ("cosine", 0.0, 0, 0.05)
    assert (config.augment, config.mixup, config.cutmix, config.label_smoothing) == ("deit", 0.8, 1.0, 0.1)
    assert config.repeated_augmentation == (0 if "swin" in recipe.stem else 3)
    assert config.distill == 0 and config.precision == "fp32" and config.ema_decay is config.clip_grad is None
    method: Any = create_method(config)
    assert method.searching_epochs == 270 and method.width_lr == config.lr
    assert (method.options.penalty, method.options.penalty_weight) == ("absolute", 0.1)
    assert method.options.penalty_widths == "rounded" and method.options.scales == "per-head"


@pytest.mark.parametrize("recipe", VVTQ, ids=ids)
def test_the_training_of_vvtq(recipe: Path) -> None:
    """The command and the defaults of its public code, with soft labels of a teacher made first."""
    config = config_of(recipe)
    assert (config.opt, config.lr, config.batch_size, config.epochs) == ("adamw", 5e-4, 512, 150)
    assert (config.sched, config.min_lr, config.warmup_epochs, config.weight_decay) == ("cosine", 0.0, 0, 1e-4)
    assert config.model_kwargs == {"drop_path_rate": 0.1} and config.stochastic_depth
    assert config.mixup == config.cutmix == config.label_smoothing == config.distill == 0
    assert (config.labels, config.crops_per_image, config.single_crop_epochs) == ("labels/imagenet", 4, 4)
    assert config.crop_interpolation == "bilinear" and "--crops 500" in header(recipe)["labels"]
    assert config.method_options == {}, "the defaults of the method are those of the public code"
    uniform = read_recipe(recipe.with_name(recipe.name.replace("qvit+", "")))
    assert read_recipe(recipe) == uniform | {"method": config.method}


def test_the_documentation_lists_them_all() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for recipe in RECIPES:
        assert f"`{recipe.stem}`" in text, recipe.stem
    for base, (floating, top1) in PUBLISHED_VVTQ.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{base}-vvtq`"))
        hours = re.findall(r"\d+ to \d+ on eight", header(ROOT / "recipes" / f"{base}-vvtq.toml")["hours"])[0]
        assert top1 in row and floating in row and hours.removesuffix(" on eight") in row
    for base, (floating, uniform, learned) in PUBLISHED.items():
        for method, (top1, giga) in (("lsq+", uniform), ("qvit", learned)):
            (row,) = (line for line in text.splitlines() if line.startswith(f"| `{base}-{method}`"))
            hours = re.findall(r"\d+ to \d+ on eight", header(ROOT / "recipes" / f"{base}-{method}.toml")["hours"])[0]
            assert f"{top1} ({giga})" in row and floating in row and hours.removesuffix(" on eight") in row


def test_the_small_recipes_run(qvit: Qvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened; as they are, both together take less than a minute."""
    monkeypatch.chdir(tmp_path)
    short = [
        "--epochs",
        2,
        "--batch-size",
        100,
        "--set",
        "warmup_epochs=0",
        "--set",
        "threads=1",
        "--device",
        "cpu",
        "-q",
    ]
    assert qvit("train", ROOT / "recipes/digits-float.toml", *short, "--out", "runs/digits-float").code == 0
    recipe = ROOT / "recipes/digits-3bit-qvit.toml"
    result = qvit("train", recipe, *short, "--out", "runs/digits-qvit", "--json").json
    assert result["method"] == "qvit" and result["bit_operations"] <= 8_338_400
    record = json.loads(Path("runs/digits-qvit/config.json").read_text())
    assert str(recipe) in record["command"] and record["distill"] == 1.0 and record["epochs"] == 2
    assert record["weights"] == str(tmp_path / "runs/digits-float")


# ------------------------------------------------------------------------------------------------- merging and refusing


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


MINE = """
model = "vit_digits"
data = "digits"
budget = "3bit"
epochs = 7
pretrained = true

[method_options]
searching_ratio = 0.5
penalty = "absolute"

[model_kwargs]
depth = 1
"""


def test_overrides_go_over_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, MINE)
    overrides = {"epochs": 3, "method_options.searching_ratio": 0.9, "model_kwargs.embed_dim": 16}
    config = config_from_recipe(path, overrides)
    assert (config.epochs, config.budget, config.pretrained) == (3, "3bit", True)
    assert config.method_options == {"searching_ratio": 0.9, "penalty": "absolute"}
    assert config.model_kwargs == {"depth": 1, "embed_dim": 16}
    assert config_from_recipe(path, {"method_options": {}}).method_options == {}
    assert read_recipe(path)["epochs"] == 7


def test_float_weights_have_one_source() -> None:
    assert merged({"pretrained": True}, {"weights": "a.pth"}) == {"pretrained": False, "weights": "a.pth"}
    assert merged({"weights": "a.pth"}, {"pretrained": True}) == {"pretrained": True, "weights": None}
    both = {"pretrained": True, "weights": "a.pth"}
    assert merged({}, both) == both
    assert merged({"pretrained": True}, {"epochs": 1})["pretrained"] is True


def test_the_command_line_goes_over_the_recipe(qvit: Qvit, tmp_path: Path) -> None:
    path = write(tmp_path, MINE)
    more = ["--no-pretrained", "-o", "head_wise=false", "-m", "num_heads=2", "--set", "method_options.penalty=relative"]
    command = ["train", path, "--dry-run", "--json", "--lr", "1e-3", "--accumulate", 2, "--on-bad-image", "skip", *more]
    config = qvit(*command, "--tensorboard", "--teacher", "vit_digits", "--set", "mixup=0.1").json["config"]
    options = {"searching_ratio": 0.5, "penalty": "relative", "head_wise": False}
    assert config["method_options"] == options and config["model_kwargs"] == {"depth": 1, "num_heads": 2}
    assert (config["lr"], config["epochs"], config["pretrained"], config["mixup"]) == (1e-3, 7, False, 0.1)
    assert (config["accumulate"], config["on_bad_image"]) == (2, "skip")
    assert (config["tensorboard"], config["teacher"]) == (True, "vit_digits")


def test_a_recipe_without_data_asks_for_them(qvit: Qvit, tmp_path: Path) -> None:
    path = write(tmp_path, MINE.replace('data = "digits"', ""))
    assert "this recipe has no data: give --data" in qvit("train", path, "--out", tmp_path / "run").failed(2)
    assert not (tmp_path / "run").exists()
    assert qvit("train", path, "--dry-run", "--json").json["images"] is None
    assert qvit("train", path, "--dry-run", "--json", "--data", "digits").json["images"]["train"] == 1200
    assert qvit("train", path, "--dry-run", "--json", "--set", "data=digits").json["images"]["train"] == 1200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "vit_digits"\nepoch = 3', r"mine\.toml: unknown option 'epoch'; did you mean 'epochs'"),
        ('model = "vit_digits"\nepochs = "ten"', r"mine\.toml: epochs = 'ten'"),
        ('model = "vit_digits"\nbudget = 4', r"mine\.toml: budget = 4"),
        ('model = "vit_digits"\nlr = 2026-01-01', r"mine\.toml: lr = "),
        ('model = "vit_digits"\nmethod_options = 3', r"mine\.toml: method_options = 3"),
        ('model = "vit_digits"\n[mixup]\nalpha = 1', r"mine\.toml: mixup = "),
        ("epochs = 3", r"mine\.toml: model"),
        ("model = vit_digits", r"mine\.toml cannot be read: .*line 1"),
        ('model = "a"\nmodel = "b"', r"mine\.toml cannot be read: Cannot overwrite"),
        (
            MINE.replace("searching_ratio", "serching_ratio"),
            "unknown option 'serching_ratio'; did you mean 'searching_ratio'",
        ),
        (MINE.replace('"absolute"', '"hard"'), "penalty = 'hard'"),
        (MINE + "img = 3\n[teacher_kwarg]\na = 1", "did you mean 'teacher_kwargs'"),
        (MINE.replace("depth = 1", "dept = 1"), "dept"),
    ],
)
@pytest.mark.parametrize("way", ["run", "dry run"])
def test_mistakes_are_one_line(qvit: Qvit, tmp_path: Path, text: str, message: str, way: str) -> None:
    path = write(tmp_path, text)
    target = ["--dry-run"] if way == "dry run" else ["--out", tmp_path / "run", *QUICK, "--no-pretrained"]
    line = qvit("train", path, *target).failed(2)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_there_or_no_text(qvit: Qvit, tmp_path: Path) -> None:
    write(tmp_path, MINE)
    line = qvit("train", tmp_path / "min.toml", "--out", tmp_path / "run").failed(2)
    assert "no recipe at" in line and f"did you mean '{tmp_path / 'mine.toml'}'" in line
    assert "no recipe at" in qvit("train", "nowhere/at/all.toml", "--dry-run").failed(2)
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\0")
    assert "cannot be read" in qvit("train", tmp_path / "mine.toml", "--dry-run").failed(2)


def test_dotted_keys_without_a_recipe(qvit: Qvit) -> None:
    command = ["train", *SMALL_DIGITS, "--budget", "3bit", "--dry-run", "--json"]
    config = qvit(*command, "--set", "method_options.head_wise=false").json["config"]
    assert config["method_options"] == {"head_wise": False} and config["model_kwargs"] == SMALL
    assert "'epochs' is no table" in qvit(*command, "--set", "epochs.first=1").failed(2)
    assert "'method_option' is no table" in qvit(*command, "--set", "method_option.head_wise=1").failed(2)
    twice = ["-o", "head_wise=true", "--set", "method_options.head_wise=false"]
    assert "'method_options.head_wise' is given twice" in qvit(*command, *twice).failed(2)
    assert "'model_kwargs' is given twice" in qvit(*command, "--set", "model_kwargs={}").failed(2)
