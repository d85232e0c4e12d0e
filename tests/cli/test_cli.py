"""The command line: exit codes, one clear line on stderr, JSON contracts, and commands end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import QUICK, SMALL_DIGITS, Qvit
from command_line import qvit as qvit  # a fixture
from rich.text import Text
from tiny_models import make_images, small_config

from qvit import cli
from qvit.errors import QvitError
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.run import train

COST_KEYS = {"model", "plan", "macs", "bit_operations", "weight_bytes", "sites"}
SITE_KEYS = {"site", "macs", "bit_width", "bit_operations", "weight_bytes"}


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs `lsq` and `qvit` on digits."""
    folder = tmp_path_factory.mktemp("runs")
    train(small_config(method="lsq+", budget="3bit", epochs=1), folder / "lsq", quiet=True)
    train(small_config(method="qvit", budget="3bit", epochs=2), folder / "qvit", quiet=True)
    return folder


def small_cost() -> CostModel:
    return inspect_model(create_model("vit_digits", depth=1, embed_dim=16, num_heads=2))


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("plan", ["w3a3", "w4a8", None])
def test_cost_json_keeps_its_contract(qvit: Qvit, plan: str | None) -> None:
    report = qvit("cost", *SMALL_DIGITS, *(["--plan", plan] if plan else []), "--json").json
    assert set(report) == COST_KEYS
    assert report["model"] == "vit_digits" and report["plan"] == (plan or "float")
    for key in ("macs", "bit_operations", "weight_bytes"):
        assert type(report[key]) is int
        assert report[key] == sum(row[key] for row in report["sites"])
    assert [row["site"] for row in report["sites"]] == list(small_cost().sites)
    for row in report["sites"]:
        assert set(row) == SITE_KEYS
        assert all(type(row[key]) is int for key in SITE_KEYS - {"site"})
        ends = row["site"].startswith(("patch_embed", "head"))
        assert row["bit_width"] == (
            32 if plan is None else 8 if ends else int(plan[1 if "weight" in row["site"] else 3])
        )


def test_cost_of_a_plan_with_widths_per_head(qvit: Qvit, tmp_path: Path) -> None:
    plan = QuantPlan.preset("w4a4").resolve(small_cost().sites).with_widths({"blocks.0.attn.key": (2, 7)}, "mine")
    plan.save(tmp_path / "plan.json")
    report = qvit("cost", *SMALL_DIGITS, "--plan", tmp_path / "plan.json", "--json").json
    (row,) = [row for row in report["sites"] if row["site"] == "blocks.0.attn.key"]
    assert row["bit_width"] == [2, 7] and row["bit_operations"] == row["macs"] // 2 * (4 * 2 + 4 * 7)
    assert report["plan"] == "mine" and report["bit_operations"] == small_cost().bit_operations(plan.widths())


@pytest.mark.parametrize(
    ("model", "plan", "giga"),
    [("deit_tiny_patch16_224", "w3a3", 12.883), ("deit_tiny_patch16_224", "w4a4", 21.455)],
)
def test_cost_of_the_paper_s_models(qvit: Qvit, model: str, plan: str, giga: float) -> None:
    report = qvit("cost", model, "--plan", plan, "--json").json
    assert report["bit_operations"] / 1e9 == pytest.approx(giga, abs=5e-4)
    table = qvit("cost", model, "--plan", plan)
    assert table.code == 0 and f"{giga:.3f} G bit operations" in table.out


def test_cost_as_a_table(qvit: Qvit) -> None:
    text = qvit("cost", *SMALL_DIGITS).out
    assert "uniform budgets" in text and all(re.search(rf"│ +{bits} +│", text) for bits in range(2, 9)), text
    text = qvit("cost", *SMALL_DIGITS, "--plan", "w3a3", "--sites").out
    assert all(site in text for site in small_cost().sites)


def test_json_is_all_there_is_on_stdout() -> None:
    """In a process of its own: libraries that print or warn on import would spoil it."""
    done = run_process("cost", *SMALL_DIGITS, "--plan", "w3a3", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert set(json.loads(done.stdout)) == COST_KEYS


def run_process(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qvit.cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# --------------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "deit_tinny_patch16_224"], "did you mean 'deit_tiny_patch16_224'"),
        (["cost", "vit_digits", "-m", "dept=1"], "dept"),
        (["cost", "vit_digits", "-m", "depth"], "'depth' is not KEY=VALUE"),
        (["cost", "vit_digits", "--plan", "w3b3"], "neither a preset .* nor a plan file"),
        (["cost", "vit_digits", "--plan", "w1a1"], "2 to 16 bits"),
        (["cost", "resnet18"], "ResNet"),
        (["cost", "vit_tiny_r_s16_p8_224", "-m", "depth=1"], r"patch_embed\.backbone"),
        (["cost"], "Missing argument '(?i:model)'"),
        (["cost", "vit_digits", "--plam", "w3a3"], "--plam.*--plan"),
        (["cosst", "vit_digits"], "No such command 'cosst'"),
        (["train", "vit_digits"], "give a MODEL and --out RUN"),
        (["train", "--out", "run"], "give a MODEL and --out RUN"),
        (["train", "vit_digits", "--out", "run", "--method", "qvitt"], "did you mean 'qvit'"),
        (["train", "vit_digits", "--out", "run", "--method", "lsq"], "either --budget"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bits4"], "budget '3bits4' is not understood"),
        (["train", "vit_digits", "--out", "run", "--budget", "1.5"], "did you mean '1.5bit'"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "-o", "head_wize=1"], "did you mean 'head_wise'"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--set", "warmup=1"], "unknown option 'warmup'"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--augment", "strong"], "augment = 'strong'"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--epochs", "0"], "epochs = 0"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--epochs", "ten"], "'--epochs'"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--lr", "-1"], "lr = -1"),
        (
            ["train", "vit_digits", "--out", "run", "--budget", "3bit", "--device", "cuda:99"],
            "'cuda:99' is not available",
        ),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--data", "digit"], "did you mean 'digits'"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--data", "./nowhere"], "nowhere"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--set", "opt=adamwww"], "adamwww"),
        (["train", "vit_digits", "--out", "run", "--budget", "3bit", "--pretrained"], "no pretrained weights"),
        (["train", "--resume", "run", "--out", "other"], "--resume takes .* from the run"),
        (["train", "vit_digits", "--resume", "run"], "--resume takes .* from the run"),
        (["plan", "show", "w3a3"], "add --model"),
        (["plan", "show", "w3a3", "--model", "vit_digitz"], "did you mean 'vit_digits'"),
        (["plan"], ""),
        (["demo", "--seeds", "0"], "at least one seed"),
        (["evaluate", "run"], "Missing option '--data'"),
    ],
)
def test_wrong_use_exits_with_2_and_one_line(
    qvit: Qvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = qvit(*arguments)
    if not message:
        assert answer.code == 2
        return
    assert re.search(message, answer.failed(2)), answer.err


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": "blocks.0.attn.qeury", "bit_width": 3}, "'blocks.0.attn.qeury' matches no site; did you mean"),
        ({"pattern": "blocks.*.mlp.fc3.*", "bit_width": 3}, "matches no site"),
        ({"pattern": "*", "bitwidth": 3}, "unknown key 'bitwidth'.*did you mean 'bit_width'"),
        ({"pattern": "*", "bit_width": 99}, "bit_width 99"),
        ({"pattern": "*", "granularity": "per-row"}, "unknown granularity 'per-row'"),
        ({"pattern": "blocks.0.attn.query", "bit_width": [3, 3, 3]}, r"has 2 head\(s\), the plan gives 3"),
        ({"pattern": "*", "role": "bias"}, "role 'bias'"),
    ],
)
def test_rules_that_mean_nothing_are_wrong_use(qvit: Qvit, tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": "qvit-plan", "version": 1, "name": "mine", "rules": [rule]}))
    for command in (["cost", *SMALL_DIGITS, "--plan", path], ["plan", "show", path, "--model", *SMALL_DIGITS]):
        line = qvit(*command).failed(2)
        assert re.search(message, line), line
    if "did you mean" in message and "attn" in message:
        assert "'blocks.0.attn.query'" in line


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "other"}', '{"format": "qvit-plan", "version": 9}', "\0\0"]
)
def test_files_that_are_no_plans_are_named(qvit: Qvit, tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    answer = qvit("cost", *SMALL_DIGITS, "--plan", path)
    assert str(path) in answer.failed(answer.code) and answer.code in (1, 2)


def test_a_plan_for_another_model_names_the_first_site(qvit: Qvit, small_runs: Path) -> None:
    line = qvit("cost", "vit_digits", "--plan", small_runs / "lsq").failed(2)
    assert "it was made for vit_digits" in line and "blocks.1.attn.qkv.input" in line


# ------------------------------------------------------------------------------------------------------------ failures


def test_an_impossible_budget_exits_with_1_and_shows_what_is_possible(qvit: Qvit, tmp_path: Path) -> None:
    smallest, largest = (value / 1e6 for value in small_cost().extreme())
    for budget in ("0.1M", "0.0001G", "1%"):
        command = ["train", *SMALL_DIGITS, "--out", tmp_path / "run", "--method", "qvit", "--budget", budget, *QUICK]
        line = qvit(*command).failed(1)
        assert "impossible" in line and f"{smallest:.3f} M" in line and f"{largest:.3f} M" in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_unreadable_image_is_named(qvit: Qvit, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"ant": 8, "bee": 8}, size=8)
    for image in (folder / "ant").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    command = [
        "train",
        *SMALL_DIGITS,
        "--method",
        "lsq+",
        "--plan",
        "w4a4",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
    ]
    line = qvit(*command, "--quiet", *QUICK, "--batch-size", 4, "--set", "calibration_images=12").failed(1)
    assert re.search(r"cannot read image 'ant/\d\.jpg' in .*images", line)


def test_too_few_images_to_calibrate(qvit: Qvit, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"ant": 4, "bee": 4}, size=8)
    command = [
        "train",
        *SMALL_DIGITS,
        "--method",
        "lsq+",
        "--plan",
        "w4a4",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
    ]
    line = qvit(*command, "--quiet", "--batch-size", 2, "--device", "cpu").failed(1)
    assert "too few images to calibrate" in line and "256" in line


@pytest.mark.parametrize("command", ["evaluate", "report", "train --resume"])
def test_what_is_no_run_fails(qvit: Qvit, tmp_path: Path, command: str) -> None:
    data = ["--data", "digits"] if command == "evaluate" else []
    for folder in (tmp_path, tmp_path / "missing"):
        line = qvit(*command.split(), folder, *data).failed(1)
        assert str(folder) in line


def test_an_interrupted_run_is_refused_with_the_way_out(qvit: Qvit, small_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((small_runs / "lsq" / "config.json").read_bytes())
    line = qvit("evaluate", tmp_path, "--data", "digits").failed(1)
    assert f"interrupted run (it has no result.json): continue it with `qvit train --resume {tmp_path}`" in line


def test_a_run_that_is_there_is_not_overwritten(qvit: Qvit, small_runs: Path) -> None:
    run = small_runs / "lsq"
    line = qvit("train", *SMALL_DIGITS, "--method", "float", "--out", run, *QUICK).failed(2)
    assert "finished run" in line and "--overwrite" in line


def test_an_interrupt_says_how_to_go_on(qvit: Qvit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qvit.runs.run.train", interrupt)
    assert "--resume" in qvit("train", *SMALL_DIGITS, "--method", "float", "--out", tmp_path / "run").failed(130)


def test_a_defect_is_called_one(qvit: Qvit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero\nwith a second line")

    monkeypatch.setattr("qvit.models.families.inspect_model", broken)
    answer = qvit("cost", "vit_digits")
    assert answer.code == 1 and len(answer.err.strip().splitlines()) == 1
    assert "ZeroDivisionError: division by zero with a second line" in answer.err and "--debug" in answer.err


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("QVIT_DEBUG", "1" if way == "variable" else "")
    monkeypatch.setattr(sys, "argv", ["qvit", "cost", "vit_digit", *(["--debug"] if way == "option" else [])])
    with warnings.catch_warnings(), pytest.raises(QvitError, match="unknown model"):
        cli.main()


def test_debug_shows_the_traceback() -> None:
    done = run_process("cost", "vit_digit", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr and "unknown model 'vit_digit'" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- help


COMMANDS = ["demo", "train", "evaluate", "cost", "plan show", "plan diff", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(qvit: Qvit, command: str) -> None:
    answer = qvit(*command.split(), "--help")
    assert answer.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", answer.out).split())
    assert re.search(rf"Examples?: qvit {command} \S+", text), answer.out
    assert "--debug" in text and "--json" in text


def test_every_command_is_listed_and_described(qvit: Qvit) -> None:
    text = qvit("--help").out
    assert all(re.search(rf"│ {name} +\S+", text) for name in ("demo", "train", "evaluate", "cost", "plan", "report"))
    assert qvit().code in (0, 2)


def test_the_version(qvit: Qvit) -> None:
    from qvit.version import __version__

    assert qvit("--version").out.strip() == __version__


def every_command() -> Iterator[tuple[str, Any]]:
    waiting = [("qvit", typer.main.get_command(cli.app))]
    while waiting:
        name, command = waiting.pop()
        yield name, command
        waiting += [(f"{name} {key}", value) for key, value in getattr(command, "commands", {}).items()]


def test_no_help_text_loses_its_brackets() -> None:
    """rich takes `[bench]` for a style, and shows `pip install "qvit"` in its place."""
    for name, command in every_command():
        for text in [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]:
            meant = re.sub(r"\[cyan\]|\[/\]", "", text or "").replace(r"\[", "[")
            assert Text.from_markup(text or "").plain == meant, name


def test_help_names_the_extra_to_install(qvit: Qvit) -> None:
    assert 'pip install "qvit[bench]"' in qvit("bench", "--help").out


FILE = Path(__file__).parents[1] / "deploy" / "files" / "packed-v1.safetensors"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "show", "RUN"],
        ["plan", "diff", "RUN", "RUN", "--json"],
        ["plan", "show", "w4a4"],
        ["report", "RUN", "--out", "page.html"],
        ["inspect", str(FILE)],
        ["inspect", str(FILE), "--json"],
        ["inspect", "none"],
    ],
    ids=" ".join,
)
def test_commands_that_only_read_do_not_wait_for_torch(arguments: list[str], small_runs: Path, tmp_path: Path) -> None:
    code = (
        "import atexit, sys; from qvit import cli\n"
        "atexit.register(lambda: sys.stderr.write(str({'torch', 'timm', 'scipy', 'accelerate'} & set(sys.modules))))\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(small_runs / "qvit") if word == "RUN" else word for word in arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    refused = arguments[-1] in ("w4a4", "none")
    assert done.stderr.endswith("set()") and (done.returncode == 0) != refused, done.stderr


# --------------------------------------------------------------------------------------------------------------- plans


def test_plan_show(qvit: Qvit, small_runs: Path) -> None:
    text = qvit("plan", "show", small_runs / "qvit").out
    assert "qvit-3bit" in text and all(site in text for site in small_cost().sites)
    assert "unsigned + offset" in text and "per-head" in text
    shown = QuantPlan.from_json(qvit("plan", "show", small_runs / "qvit", "--json").json)
    assert shown.sites == QuantPlan.load(small_runs / "qvit").sites
    shown = QuantPlan.from_json(qvit("plan", "show", "w3a3", "--model", *SMALL_DIGITS, "--json").json)
    assert shown.sites == QuantPlan.preset("w3a3").resolve(small_cost().sites).sites and shown.model == "vit_digits"


def test_plan_diff(qvit: Qvit, small_runs: Path, tmp_path: Path) -> None:
    rows = qvit("plan", "diff", small_runs / "lsq", small_runs / "qvit", "--json").json
    expected = QuantPlan.load(small_runs / "lsq").diff(QuantPlan.load(small_runs / "qvit"))
    assert rows == json.loads(json.dumps(expected)) and {"site", "key", "here", "there"} == set(rows[0])
    assert "sites differ" in qvit("plan", "diff", small_runs / "lsq", small_runs / "qvit").out
    assert qvit("plan", "diff", small_runs / "lsq", small_runs / "lsq", "--json").json == []
    rows = qvit("plan", "diff", "w3a3", "w4a4", "--model", *SMALL_DIGITS, "--json").json
    assert {(row["key"], row["here"], row["there"]) for row in rows} == {("bit_width", 3, 4)}


# ----------------------------------------------------------------------------------------------- runs from end to end


def test_train_evaluate_and_report_on_jpegs(qvit: Qvit, tmp_path: Path) -> None:
    """A folder of JPEGs in, a report of the quantized model out: what a user does, with timm's ViT made small."""
    images = make_images(tmp_path / "images", {"ant": 16, "bee": 16, "cow": 16}, size=40)
    model = ["vit_tiny_patch16_224"]
    for argument in ("img_size=32", "patch_size=16", "depth=1", "embed_dim=24", "num_heads=2"):
        model += ["-m", argument]
    common = ["--data", images, "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--quiet", "--json"]
    first = qvit("train", *model, "--method", "float", *common, "--lr", "1e-3", "--out", tmp_path / "float").json
    assert first["budget"] is None and first["images"] == 10
    quantized = [*common, "--weights", tmp_path / "float", "--set", "calibration_images=16", "--seed", 3]
    second = qvit("train", *model, "--budget", "4bit", *quantized, "--out", tmp_path / "qvit", "--distill", "0.5").json
    assert second["method"] == "qvit" and second["seed"] == 3 and second["float_accuracy"] == first["accuracy"]
    assert second == json.loads((tmp_path / "qvit" / "result.json").read_text())
    (tmp_path / "classes.txt").write_text("0\tant\tan insect\n1\tbee\n2\tcow\n")
    others = make_images(tmp_path / "others", {"bee": 3, "cow": 4}, size=50, seed=5)
    scores = qvit(
        "evaluate", tmp_path / "qvit", "--data", others, "--class-map", tmp_path / "classes.txt", "--json"
    ).json
    assert set(scores) == {"top1", "top5", "images"} and scores["images"] == 7 and scores["top5"] == 100.0
    assert "(7 images)" in qvit("evaluate", tmp_path / "qvit", "--data", others).out
    answer = qvit("report", tmp_path / "float", tmp_path / "qvit", "--out", tmp_path / "page.html", "--json").json
    assert answer["page"] == str(tmp_path / "page.html") and len(answer["rows"]) == 2
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page and "qvit" in page and not re.search(r'src="https?://', page), "the page stands alone"
    assert qvit("report", tmp_path / "qvit").code == 0 and (tmp_path / "qvit" / "report.html").is_file()


@pytest.mark.parametrize("length", [1, 150])
def test_train_prints_where_the_run_is(qvit: Qvit, tmp_path: Path, length: int) -> None:
    """Whatever the width of the window and the length of the path: no line is broken."""
    run = tmp_path / ("r" * length)
    answer = qvit("train", *SMALL_DIGITS, "--method", "lsq", "--budget", "4bit", *QUICK, "--out", run)
    assert answer.code == 0
    assert re.search(r"accuracy \d+\.\d\d % \(float \d+\.\d\d %\), \d+\.\d+ M bit operations", answer.out)
    assert f"run: {run}   (`qvit report {run}` draws it)\n" in answer.out
    assert "calibrating" in answer.out and "597" in answer.out and answer.err == ""
    resumed = qvit("train", "--resume", run)
    assert resumed.code == 0 and f"{run} is finished\n" in resumed.out


def test_one_process_of_several_prints_the_result(
    qvit: Qvit, small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        answer = qvit("train", "--resume", small_runs / "qvit", "--quiet")
        assert answer.code == 0 and ("accuracy" in answer.out) == (rank == 0)


def test_options_reach_the_run(qvit: Qvit, tmp_path: Path) -> None:
    options = ["-o", "head_wise=false", "-o", "searching_ratio=0", "-o", 'asymmetric=["*.fc1.input"]']
    settings = ["--set", "weight_decay=0.1", "--set", "ema_decay=0.9", "--set", "mixup=0.1", "--set", "clip_grad=None"]
    command = ["train", *SMALL_DIGITS, "--budget", "0.2", *QUICK, *options, *settings, "--out", tmp_path / "run"]
    assert qvit(*command, "--json").json["budget"] == "0.2"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["method_options"] == {"head_wise": False, "searching_ratio": 0, "asymmetric": ["*.fc1.input"]}
    assert (record["weight_decay"], record["ema_decay"], record["mixup"], record["clip_grad"]) == (0.1, 0.9, 0.1, None)
    assert record["command"][1:] == [str(item) for item in [*command, "--json"]]
    plan = QuantPlan.load(tmp_path / "run")
    assert all(len(spec.widths) == 1 for spec in plan.sites.values() if spec)
    spec = plan.sites["blocks.0.mlp.fc1.input"]
    assert spec is not None and not spec.symmetric


def test_text_with_brackets_is_printed_as_it_is(qvit: Qvit, tmp_path: Path) -> None:
    """Rich takes [words] in brackets for markup; a folder may be called so."""
    folder = tmp_path / "run [bold] 1"
    answer = qvit("train", *SMALL_DIGITS, "--method", "float", *QUICK, "--out", folder)
    assert answer.code == 0 and str(folder) in answer.out.replace("\n", "")
    assert str(folder) in qvit("report", folder).out.replace("\n", "")
