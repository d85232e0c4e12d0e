"""`qvit train`: options to a config, a config to a run or to its plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    Debug,
    Json,
    ModelArgs,
    Quiet,
    Workers,
    bops,
    notifier,
    pairs,
    print_json,
    print_table,
    say,
    size,
)
from qvit.errors import UsageError


def train(
    model: Annotated[
        str | None, typer.Argument(help="timm's name, vit_digits, or a recipe (a .toml file).", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="float, lsq, lsq+, qvit, dq, edmips, vvtq, qvit+vvtq, ofq or irm.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="4bit (= BOPs of the uniform model), 21.455G, or a share of the 8-bit model: 0.25."),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Preset (w4a4) or plan file: the widths for lsq and lsq+, the start for qvit.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="ImageFolder, .tar or .tar.gz of class folders, hfds/NAME, or digits.")
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Test images, for the final number alone. Default: the data's own test split, or a share set aside."
        ),
    ] = None,
    class_map: Annotated[
        str | None, typer.Option(help="File of lines index<TAB>folder, for data with some of the head's classes.")
    ] = None,
    on_bad_image: Annotated[str | None, typer.Option(help="fatal or skip: what an unreadable image does.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Float weights: .safetensors, .pth, or the run of a float model.")
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option("--pretrained/--no-pretrained", help="Float weights from timm's hub.", show_default=False),
    ] = None,
    run: Annotated[Path | None, typer.Option("--out", help="The run's directory.", show_default=False)] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue an interrupted run.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, costs, steps and memory; train and write nothing.")
    ] = False,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per optimizer step, over all processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches that make a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of weights and scales.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that learns from the float model's soft labels, 0 to 1.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Another model to learn from: timm's name or a run. Default: the float model.")
    ] = None,
    augment: Annotated[str | None, typer.Option(help="none, light or deit.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    integer_forward: Annotated[
        bool | None,
        typer.Option(
            "--integer-forward/--no-integer-forward",
            help="Linear layers compute from integers: CPUs with VNNI or AMX.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ...")] = None,
    workers: Workers = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Log for TensorBoard too.", show_default=False)
    ] = None,
    model_arg: ModelArgs = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            help="Option of the method, such as head_wise=false (see the docs). Repeatable.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other option of training: weight_decay, warmup_epochs, mixup, ema_decay ... Repeatable.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a float model, a baseline, or Q-ViT; evaluate it on test images at the end.

    In place of MODEL a recipe gives all options; what is given beside it goes over the recipe's.

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

    [cyan]qvit train --resume runs/qvit[/]
    """
    from qvit.runs import run as runs

    silent = quiet or as_json
    if resume is not None:
        if model is not None or run is not None or dry_run:
            raise UsageError("--resume takes the model, the directory and every option from the run: give nothing else")
        return _show_result(runs.resume(resume, quiet=silent, notify=notifier(silent)), resume, as_json)
    if model is None or (run is None and not dry_run):
        raise UsageError("give a MODEL and --out RUN, or --resume RUN")
    flags = {
        "method": method, "budget": budget, "plan": plan, "weights": weights, "pretrained": pretrained,
        "data": data, "eval_data": eval_data, "class_map": class_map, "on_bad_image": on_bad_image,
        "augment": augment, "epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "lr": lr,
        "seed": seed, "distill": distill, "teacher": teacher, "precision": precision, "device": device,
        "integer_forward": integer_forward, "workers": workers, "tensorboard": tensorboard,
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    given |= {f"model_kwargs.{key}": value for key, value in pairs(model_arg).items()}
    given |= {f"method_options.{key}": value for key, value in pairs(method_option).items()}
    settings = pairs(setting)
    if twice := [key for key in settings if any(key == own.split(".")[0] or key == own for own in given)]:
        raise UsageError(f"'{twice[0]}' is given twice, as an option of its own and with --set")
    config, has_data = _config(model, given | settings, dry_run=dry_run)
    if dry_run:
        from qvit.runs.dry_run import dry_run as plan_of_run

        return _show_plan(plan_of_run(config, with_data=has_data), as_json)
    assert run is not None
    result = runs.train(config, run, overwrite=overwrite, quiet=silent, notify=notifier(silent))
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
    of_float = "" if result["method"] == "float" else f" (float {result['float_accuracy']:.2f} %)"
    say(
        f"accuracy {result['accuracy']:.2f} %{of_float}, {bops(result['bit_operations'])} bit operations, "
        f"weights {size(result['weight_bytes'])}, {result['seconds']:.0f} s"
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
