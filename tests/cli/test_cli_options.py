"""Options of commands: those of earlier versions still parse, each is described, and none is said twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Qvit
from command_line import qvit as qvit  # a fixture

from qvit.cli import app
from qvit.cli.options import Fields, plain, types_of
from qvit.methods import METHODS
from qvit.methods.ptq.options import PTQOptions
from qvit.runs.requests import BenchRequest, LabelRequest, Request
from qvit.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
#: Options of version 0.1, beside --json and --debug, which every command has.
OPTIONS = {
    "demo": "--out --seeds --processes --overwrite --short",
    "train": (
        "--method --budget --plan --data --eval-data --class-map --on-bad-image --weights --pretrained "
        "--no-pretrained --out --resume --overwrite --dry-run --epochs --batch-size --accumulate --lr --seed "
        "--distill --teacher --augment --precision --integer-forward --no-integer-forward --device --workers "
        "--tensorboard --no-tensorboard --model-arg -m --option -o --set --quiet -q"
    ),
    "labels": (
        "--teacher --teacher-weights --teacher-arg --data --eval-data --class-map --test-share "
        "--monitor-share --on-bad-image --crops --top-k --scale --ratio --interpolation --flip --seed "
        "--images-per-shard --out --verify --batch-size --device --workers --model-arg -m --quiet -q"
    ),
    "ptq": (
        "--out --budget --plan --metric --sensitivity --sensitivity-images --min-width --boundary --data "
        "--eval-data --class-map --weights --pretrained --overwrite --calibration-images --observer "
        "--weight-scales --probs --head-scales --reparameterize --no-reparameterize --bias-correction "
        "--no-bias-correction --reconstruct --no-reconstruct --steps --recon-images --recon-batch --fisher "
        "--batch-size --seed --device --workers --threads --model-arg -m --quiet -q"
    ),
    "patchwise": (
        "--data --out --budget --eval-data --weights --pretrained --class-map --share --allocate --plan --key "
        "--score-images --picture --images --calibration-images --batch-size --seed --device --workers "
        "--model-arg -m --overwrite"
    ),
    "evaluate": "--data --engine --class-map --batch-size --device --workers",
    "pack": "--out --overwrite",
    "inspect": "",
    "cost": "--plan --model-arg -m --sites",
    "sensitivity": (
        "--out --data --weights --pretrained --class-map --images --metric --widths --plan --type-normalised "
        "--seed --device --workers --model-arg -m"
    ),
    "allocate": "--out --budget --unit --pin --tie --boundary --solver --frontier --against --points --model-arg -m",
    "analyze": (
        "--data --out --what --eval-data --weights --pretrained --class-map --images --calibration-images "
        "--widths --part --layer --layers --low-bits --high-bits --batch-size --seed --device --workers "
        "--model-arg -m --overwrite"
    ),
    "bench": (
        "--plan --batch --engine --no-peers --threads --rounds --seconds --max-seconds --weights --pretrained "
        "--data --eval-data --class-map --calibration-images --images --seed --workers --model-arg -m --out "
        "--quiet -q"
    ),
    "export": "--to --out --containers --batch --no-vnni --overwrite --no-check --quiet -q",
    "report": "--out --title",
    "plan show": "--model --model-arg -m",
    "plan diff": "--model --model-arg -m",
}


def command_of(name: str) -> Any:
    found: Any = typer.main.get_command(app)
    for part in name.split():
        found = found.commands[part]
    return found


def sample(parameter: Any) -> list[str]:
    """The parameter on a command line."""
    value = ["0.5", "1"] if parameter.nargs == 2 else ["a=1"] if parameter.metavar == "KEY=VALUE" else ["1"]
    flag = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
    return flag if getattr(parameter, "is_flag", False) else flag + value


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_earlier_versions_parse(name: str) -> None:
    command = command_of(name)
    for option in [*OPTIONS[name].split(), "--json", "--debug"]:
        parameter = next(p for p in command.params if option in [*p.opts, *p.secondary_opts])
        needed = [word for p in command.params if p.required and p is not parameter for word in sample(p)]
        given = sample(parameter)
        context = command.make_context(name, [*needed, option, *(given[1:] if option in parameter.opts else [])])
        assert context.params[parameter.name] is not None, option


def every_field() -> Iterator[tuple[str, Any]]:
    configs: list[Any] = [TrainConfig, LabelRequest, BenchRequest, Request, PTQOptions]
    for cls in [*configs, *(method.Options for method in METHODS.values())]:
        yield from ((f"{cls.__name__}.{name}", field) for name, field in cls.__pydantic_fields__.items())


def test_every_field_of_a_config_is_described() -> None:
    assert [name for name, field in every_field() if not field.description] == []


def test_help_of_every_command_does_without_torch() -> None:
    code = f"""
import contextlib, io, sys, typer
from qvit.cli import app
for name in {list(OPTIONS)}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        app(name.split() + ["--help"])
    assert "--debug" in out.getvalue(), name
assert not {{"torch", "timm", "numpy"}} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_help_shows_default_words_and_meaning_of_the_field(qvit: Qvit) -> None:
    text = qvit("train", "--help").out
    for part in ("[default: 30]", "none|light|deit", "Passes over the training images.", "--no-pretrained"):
        assert part in text
    assert "[default: 128]" in qvit("ptq", "--help").out, "of the command, not of training"


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("wieght_decay=1", "weight_decay"),
        ("epoch=1", "epochs"),
        ("method_options.searching_rato=0.5", "searching_ratio"),
        ("method_option.x=1", "method_options"),
    ],
)
def test_an_unknown_setting_gives_the_nearest_names(qvit: Qvit, tmp_path: Path, setting: str, name: str) -> None:
    answer = qvit("train", "vit_digits", "--budget", "3bit", "--set", setting, "--dry-run")
    assert f"did you mean '{name}'" in answer.failed(2)


def test_a_setting_is_an_option_or_in_set_not_both(qvit: Qvit, tmp_path: Path) -> None:
    answer = qvit("train", "vit_digits", "--epochs", 2, "--set", "epochs=3", "--dry-run")
    assert "'epochs' is given twice" in answer.failed(2)


def test_descriptions_become_plain_sentences() -> None:
    assert plain("`fatal` stops; see [Data](#data)") == "fatal stops."
    assert plain("`irm` ([Two bits](two-bits.md))") == "irm."
    assert (
        plain("a list of [soft labels](soft-labels.md), such as `[0, 1]`") == "A list of soft labels, such as \\[0, 1]."
    )


def test_options_and_their_types_come_from_the_fields() -> None:
    made = dict(Fields(LabelRequest, "model crops top_k scale flip teacher_kwargs").parameters())
    assert {name: parameter.annotation for name, parameter in made.items()} == {
        "model": str, "crops": int, "top_k": str | None, "scale": tuple[float, float] | None, "flip": float | None,
        "teacher_kwargs": list[str] | None,
    }  # fmt: skip
    assert made["top_k"].default.metavar == "int|full"
    assert types_of(TrainConfig.model_fields["checkpoint_steps"].annotation) == [int]


PLUGIN = """
from typing import Annotated
from qvit.cli.console import say
from qvit.cli.options import Fields, Given, command
from qvit.training.config import TrainConfig

@command("hello", order=100)
def hello(given: Annotated[Given, Fields(TrainConfig, "model epochs model_kwargs")]) -> None:
    '''Greet a model.'''
    say(f"hello {given}")
"""


def test_a_package_adds_a_command(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(PLUGIN)
    about = tmp_path / "hello-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hello\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[qvit.plugins]\nhello = hello\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def call(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "150"}
        done = subprocess.run(
            [sys.executable, "-m", "qvit.cli", *words], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = re.findall(r"^│ (\w+)", call("--help"), re.MULTILINE)
    assert listed.index("hello") > listed.index("report")
    assert (
        call("hello", "vit_digits", "-m", "depth=1").strip()
        == "hello {'model': 'vit_digits', 'model_kwargs': {'depth': 1}}"
    )


def test_the_schema_of_recipes_knows_settings_and_options() -> None:
    schema = json.loads((ROOT / "recipes" / "schema.json").read_text("utf-8"))
    assert set(schema["properties"]) == set(TrainConfig.model_fields)
    assert set(schema["properties"]["method"]["enum"]) == {*METHODS, "ptq"}
    assert schema["$defs"]["QViTOptions"]["properties"]["searching_ratio"]["description"].startswith("σ")
