"""`qvit train`: options to a config, a config to a run or to its plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    Json,
    Quiet,
    bops,
    notifier,
    pairs,
    print_json,
    print_table,
    progress_bar,
    say,
    size,
    without_labels,
)
from qvit.cli.options import Fields, Given, command
from qvit.errors import UsageError
from qvit.training.config import TrainConfig


@command("train", order=2)
def train(
    subject: Annotated[
        Given,
        Fields(
            TrainConfig,
            "model method budget plan data weights pretrained",
            help={"model": "timm's name, vit_digits, or a recipe (a .toml file)."},
            required=False,
        ),
    ],
    training: Annotated[Given, Fields(TrainConfig, "epochs batch_size lr seed device")],
    options: Annotated[Given, Fields(TrainConfig, "method_options model_kwargs")],
    more: Annotated[
        Given,
        Fields(
            TrainConfig,
            "eval_data class_map unlabelled on_bad_image accumulate distill distill_features teacher start steps "
            "augment precision integer_forward workers tensorboard",
            panel="Settings that --set takes, too",
        ),
    ],
    run: Annotated[Path | None, typer.Option("--out", help="The run's directory.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue an interrupted run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, costs, steps and memory; train and write nothing.")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting: weight_decay, warmup_epochs, mixup, ema_decay ... (docs/cli.md). Repeatable.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a float model, a baseline, or Q-ViT; evaluate it on test images at the end.

    In place of MODEL a recipe gives all options; options given beside it override the recipe's.

    Examples:
    [cyan]qvit train vit_digits --method float --data digits --epochs 80 --lr 3e-3 --out runs/float[/]

    [cyan]qvit train vit_digits --method qvit --budget 3bit --weights runs/float --distill 1 --out runs/qvit[/]

    [cyan]qvit train deit_tiny_patch16_224 --pretrained --method qvit --budget 4bit --data imagenet --epochs 300 --out
    runs/deit[/]

    [cyan]qvit train deit_tiny_patch16_224 --method lsq+ --plan w4a8 -o scales=shared --set mixup=0.8 --data folder
    --out runs/lsq[/]

    [cyan]qvit train recipes/deit-tiny-4bit-qvit.toml --data imagenet --epochs 100 --set
    method_options.searching_ratio=0.5 --out runs/deit[/]

    [cyan]qvit train recipes/deit-tiny-4bit-qvit.toml --dry-run[/]

    [cyan]qvit train vit_digits --method lsq+ --weights runs/float --distill 1 --steps 8bit,4bit,2bit --out
    runs/steps[/]

    [cyan]qvit train --resume runs/qvit[/]
    """
    from qvit.runs import run as runs

    silent = quiet or as_json
    given = subject | training | options | more
    model = given.pop("model", None)
    if resume is not None:
        if model is not None or run is not None or dry_run:
            raise UsageError("--resume takes the model, the directory and every option from the run: give nothing else")
        with progress_bar(hidden=silent or not _speaks()) as show:
            result = runs.resume(resume, quiet=silent, notify=notifier(silent), progress=show)
        return _show_result(result, resume, as_json)
    if model is None or (run is None and not dry_run):
        raise UsageError("give a MODEL and --out RUN, or --resume RUN")
    for table in ("model_kwargs", "method_options"):
        given |= {f"{table}.{key}": value for key, value in given.pop(table, {}).items()}
    settings = pairs(setting)
    if twice := [key for key in settings if any(key == own.split(".")[0] or key == own for own in given)]:
        raise UsageError(f"'{twice[0]}' is given twice, as an option of its own and with --set")
    config, has_data = _config(model, given | settings, dry_run=dry_run)
    if dry_run:
        from qvit.runs.dry_run import dry_run as plan_of_run

        return _show_plan(plan_of_run(config, with_data=has_data), as_json)
    assert run is not None
    with progress_bar(hidden=silent or not _speaks()) as show:
        result = runs.train(config, run, overwrite=overwrite, quiet=silent, notify=notifier(silent), progress=show)
    return _show_result(result, run, as_json)


def _config(model: str, overrides: dict[str, Any], *, dry_run: bool) -> tuple[Any, bool]:
    """The config of a model or a recipe with overrides, and whether it says which data (a dry run goes without)."""
    from qvit.training.config import TrainConfig
    from qvit.training.recipe import SUFFIX, config_from_recipe, merged, read_recipe

    if not model.endswith(SUFFIX):
        return TrainConfig.create(**merged({"model": model}, overrides)), True
    has_data = bool(merged(read_recipe(model), overrides).get("data"))
    return config_from_recipe(model, overrides, needs_data=not dry_run), has_data


def _speaks() -> bool:
    """Whether this is the process, of those that `accelerate launch` started, that prints what all of them found."""
    return int(os.environ.get("RANK", "0")) == 0


def _show_result(result: dict[str, Any], run: Path, as_json: bool) -> None:
    if not _speaks():
        return None
    if as_json:
        return print_json(result)
    found = without_labels(result)
    if result["accuracy"] is not None:
        of_float = "" if result["method"] == "float" else f" (float {result['float_accuracy']:.2f} %)"
        found = f"accuracy {result['accuracy']:.2f} %{of_float}"
    say(
        f"{found}, {bops(result['bit_operations'])} bit operations, "
        f"weights {size(result['weight_bytes'])}, {result['seconds']['total']:.0f} s"
    )
    say(f"run: {run.absolute()}   (`qvit report {run}` draws it)")


def _show_plan(report: dict[str, Any], as_json: bool) -> None:
    """A dry run for people: widths by kind of tensor, then one line per subject."""
    if not _speaks():
        return None
    if as_json:
        return print_json(report)
    if report["widths"]:
        rows = []
        for row in report["widths"]:
            state = "float" if row["bits"] is None else "learned" if row["learned"] else "fixed"
            low, high = row["bits"] or ("", "")
            span = f"{low}" if low == high else f"{low} to {high}"
            rows.append((row["tensors"], row["sites"], row["widths"], span, state))
        title = f"{report['model']}, {report['method']}: widths at the start"
        print_table(("tensors", "sites", "widths", "bits", ""), rows, title=title, align="<>><")
    budget = report["budget_bit_operations"]
    within = f", budget {bops(budget)} ({report['budget']})" if budget else ""
    say(f"bit operations: {bops(report['bit_operations'])} at the start{within}")
    say(f"weights: {size(report['weight_bytes'])} packed; float weights from {report['float_weights']}")
    images, memory = report["images"], report["memory"]
    counts = "not counted: give --data" if images is None else ", ".join(f"{n} {kind}" for kind, n in images.items())
    say(f"images: {counts}")
    processes = f"{report['processes']} process" + ("es" if report["processes"] > 1 else "")
    step = f"{report['batch_size']} images ({processes} × {report['accumulate']} × {report['micro_batch']})"
    every = "" if report["steps"] is None else f" × {report['steps_per_epoch']} steps = {report['steps']} steps"
    say(f"steps: {report['epochs']} epochs{every} of {step}")
    parts = ", ".join(f"{name.replace('_', ' ')} {size(n)}" for name, n in memory["parts"].items())
    say(f"memory of a step, estimated, per process: {size(memory['total'])} ({parts}); {memory['note']}")
