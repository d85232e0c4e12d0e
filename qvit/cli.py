"""The command line: every command calls one function of the library and prints what it returns.

The result is a table or, with --json, JSON. Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. A failure is
one line on stderr; --debug (or QVIT_DEBUG=1) adds the traceback. The library is imported inside the commands, so that
--help answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qvit.errors import QvitError, UsageError
from qvit.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Vision Transformers at 2 to 8 bits: learn, train, measure and report mixed-precision plans for timm models.",
)
plan_app = typer.Typer(no_args_is_help=True, help="Look at plans: which tensor has how many bits.")
app.add_typer(plan_app, name="plan")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Workers = Annotated[int | None, typer.Option(help="Processes that decode images.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no messages.")]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        "-m",
        metavar="KEY=VALUE",
        help="Argument for timm.create_model, such as img_size=64. Repeatable.",
    ),
]
out, err = Console(), Console(stderr=True)


def main() -> NoReturn:
    """Entry point of the `qvit` command."""
    click_error = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
    debug = "--debug" in sys.argv or bool(os.environ.get("QVIT_DEBUG"))
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how typer returns from a keyboard interrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; a run continues with `qvit train --resume RUN`", 130)
    except QvitError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, click_error):
            message = error.format_message()  # type: ignore[attr-defined]
            if not message:
                sys.exit(2)
            _fail(f"{message} (see `qvit --help`)", 2)
        _fail(f"{type(error).__name__}: {error} (this is a defect of qvit or of a library; --debug shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    sys.exit(code)


def _version(show: bool) -> None:
    if show:
        out.print(__version__, highlight=False)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Messages of libraries stay out of the way unless asked for."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("timm").setLevel(logging.DEBUG if debug else logging.ERROR)
    if not debug:
        warnings.filterwarnings("ignore")


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Where runs, results.json and report.html go.")] = Path(
        "demo-output"
    ),
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    processes: Annotated[int | None, typer.Option(help="Runs side by side; by default one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run everything again.")] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Two epochs per run: tries the machinery, the numbers mean nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small ViT on real handwritten digits and compare LSQ+ with Q-ViT at equal bit operations.

    A demo that was stopped goes on where it was.

    Examples:  [cyan]qvit demo --out demo-output[/]    [cyan]qvit demo --seeds 1 --out quick[/]
    """
    from qvit.demo import REPORT, run_demo, verdict

    results = run_demo(out_dir, seeds=seeds, workers=processes, overwrite=overwrite, short=short)
    if as_json:
        return _print_json(results)
    table = Table(title="vit_digits on 597 test images, first and last layer counted")
    for column in ("method", "budget", "accuracy %", "training loss", "bit operations", "weights", "seeds"):
        table.add_column(column, justify="left" if column in ("method", "budget") else "right")
    of_float = _spread(results["float_accuracy_mean"], results["float_accuracy_std"])
    table.add_row("float", "32 bit", of_float, "", "", "", str(seeds))
    for row in results["rows"]:
        table.add_row(
            row["method"],
            row["budget"],
            _spread(row["accuracy_mean"], row["accuracy_std"]),
            "" if row["train_loss_mean"] is None else f"{row['train_loss_mean']:.3f}",
            _bops(row["bit_operations"]),
            _bytes(row["weight_bytes"]),
            str(len(row["seeds"])),
        )
    out.print(table)
    for sentence in verdict(results):
        out.print(sentence, highlight=False)
    out.print(escape(f"page: {(out_dir / REPORT).absolute()}"), highlight=False, soft_wrap=True)


@app.command()
def train(
    model: Annotated[str | None, typer.Argument(help="timm's name, or vit_digits.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="float, lsq, lsq+ or qvit.")] = None,
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
    weights: Annotated[
        str | None, typer.Option(help="Float weights: .safetensors, .pth, or the run of a float model.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Float weights from timm's hub.")] = False,
    run: Annotated[Path | None, typer.Option("--out", help="The run's directory.", show_default=False)] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue an interrupted run.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of weights and scales.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that learns from the float model's soft labels, 0 to 1.")
    ] = None,
    augment: Annotated[str | None, typer.Option(help="none, light or deit.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ...")] = None,
    workers: Workers = None,
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

    Examples:
    [cyan]qvit train vit_digits --method float --data digits --epochs 80 --lr 3e-3 --out runs/float[/]

    [cyan]qvit train vit_digits --method qvit --budget 3bit --weights runs/float --distill 1 --out runs/qvit[/]

    [cyan]qvit train deit_tiny_patch16_224 --pretrained --method qvit --budget 4bit --data imagenet --epochs 300 --out
    runs/deit[/]

    [cyan]qvit train deit_tiny_patch16_224 --method lsq+ --plan w4a8 -o scales=shared --set mixup=0.8 --data folder
    --out runs/lsq[/]

    [cyan]qvit train --resume runs/qvit[/]
    """
    from qvit import run as runs
    from qvit.training.config import TrainConfig

    notify = (lambda _: None) if quiet or as_json else lambda text: out.print(escape(text), highlight=False)
    if resume is not None:
        if model is not None or run is not None:
            raise UsageError("--resume takes the model, the directory and every option from the run: give nothing else")
        result = runs.resume(resume, quiet=quiet or as_json, notify=notify)
        return _show_result(result, resume, as_json)
    if model is None or run is None:
        raise UsageError("give a MODEL and --out RUN, or --resume RUN")
    flags = {
        "method": method, "budget": budget, "plan": plan, "weights": weights,
        "data": data, "eval_data": eval_data, "class_map": class_map, "augment": augment,
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "distill": distill,
        "precision": precision, "device": device, "workers": workers,
    }  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    values |= {"model": model, "model_kwargs": _pairs(model_arg), "method_options": _pairs(method_option)}
    values |= {"pretrained": True} if pretrained else {}
    settings = _pairs(setting)
    if twice := [key for key in settings if values.get(key)]:
        raise UsageError(f"'{twice[0]}' is given twice, as an option of its own and with --set")
    values |= settings
    config = TrainConfig.create(**values)
    _show_result(runs.train(config, run, overwrite=overwrite, quiet=quiet or as_json, notify=notify), run, as_json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    data: Annotated[str, typer.Option(help="Images, as for `qvit train`.")],
    class_map: Annotated[str | None, typer.Option(help="File of lines index<TAB>folder.")] = None,
    batch_size: Annotated[int, typer.Option()] = 64,
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score the model of a run on images: top-1 and top-5.

    Example:  [cyan]qvit evaluate runs/deit --data imagenet/val --class-map classes.txt --json[/]
    """
    from rich.progress import Progress

    from qvit.run import evaluate_run

    with Progress(console=err, transient=True, disable=as_json or not err.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        scores = evaluate_run(
            run,
            data,
            class_map=class_map,
            batch_size=batch_size,
            workers=workers or 0,
            device=device,
            progress=lambda n: bar.update(task, completed=n),
        )
    if as_json:
        return _print_json(scores)
    out.print(
        f"top-1 {scores['top1']:.2f} %   top-5 {scores['top5']:.2f} %   ({scores['images']} images)", highlight=False
    )


@app.command()
def cost(
    model: Annotated[str, typer.Argument(help="timm's name, or vit_digits.")],
    plan: Annotated[str | None, typer.Option(help="Preset (w4a4) or plan file; without one, float.")] = None,
    model_arg: ModelArgs = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count the bit operations and weight bytes of a model under a plan.

    Examples:  [cyan]qvit cost deit_tiny_patch16_224[/]    [cyan]qvit cost deit_tiny_patch16_224 --plan w3a3 --json[/]
    """
    from qvit.cost import FLOAT_BITS
    from qvit.families import inspect_model
    from qvit.plan import plan_from
    from qvit.training.models import create_model

    costs = inspect_model(create_model(model, **_pairs(model_arg)))
    if plan is None:
        name, widths = "float", {site: (FLOAT_BITS,) for site in costs.sites}
    else:
        resolved = plan_from(plan).resolve(costs.sites)
        name, widths = resolved.name, resolved.widths()
    report = costs.report(widths, model=model, plan=name)
    if as_json:
        return _print_json(report)
    out.print(
        f"{model}, plan {name}: {report['macs'] / 1e9:.3f} G MACs, {_bops(report['bit_operations'])} bit operations, "
        f"weights {_bytes(report['weight_bytes'])}",
        highlight=False,
    )
    if sites:
        table = Table()
        for column in ("site", "MACs", "bits", "bit operations", "weights"):
            table.add_column(column, justify="left" if column == "site" else "right")
        for row in report["sites"]:
            counted = row["macs"] > 0
            table.add_row(
                row["site"],
                f"{row['macs'] / 1e6:.3f} M" if counted else "",
                _bits(row["bit_width"]),
                _bops(row["bit_operations"]) if counted else "",
                _bytes(row["weight_bytes"]) if row["weight_bytes"] else "",
            )
        out.print(table)
    elif plan is None:
        table = Table(title="uniform budgets (8 bits in the first and the last layer)")
        for column in ("bits", "bit operations", "weights"):
            table.add_column(column, justify="right")
        for bits in range(2, 9):
            table.add_row(
                str(bits),
                _bops(costs.bit_operations(costs.uniform(bits))),
                _bytes(costs.weight_bytes(costs.uniform(bits))),
            )
        out.print(table)


@plan_app.command("show")
def plan_show(
    plan: Annotated[str, typer.Argument(help="A run, a plan file, or a preset with --model.")],
    model: Annotated[str | None, typer.Option(help="Resolve rules or a preset for this model.")] = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the widths of a plan, one line per site.

    Examples:  [cyan]qvit plan show runs/qvit[/]    [cyan]qvit plan show w3a3 --model deit_tiny_patch16_224[/]
    """
    resolved = _resolved_plan(plan, model, model_arg)
    if as_json:
        return _print_json(resolved.to_json())
    table = Table(title=escape(f"plan {resolved.name}" + (f" of {resolved.model}" if resolved.model else "")))
    for column in ("site", "bits", "grid", "scales"):
        table.add_column(column)
    for site, spec in resolved.sites.items():
        if spec is None:
            table.add_row(site, "float", "", "")
        else:
            grid = "signed" if spec.signed else "unsigned" if spec.symmetric else "unsigned + offset"
            table.add_row(site, _bits(list(spec.widths)), grid, spec.to_json()["granularity"])
    out.print(table)


@plan_app.command("diff")
def plan_diff(
    here: Annotated[str, typer.Argument(help="A run, a plan file, or a preset with --model.")],
    there: Annotated[str, typer.Argument(help="Another one.")],
    model: Annotated[str | None, typer.Option(help="Resolve rules or presets for this model.")] = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where two plans differ.

    Example:  [cyan]qvit plan diff runs/qvit-seed0 runs/qvit-seed1[/]
    """
    first, second = (_resolved_plan(name, model, model_arg) for name in (here, there))
    rows = first.diff(second)
    if as_json:
        return _print_json(rows)
    table = Table(title=f"{len({row['site'] for row in rows})} of {len(first.sites)} sites differ")
    for column in ("site", "key", first.name, second.name):
        table.add_column(escape(column))
    for row in rows:
        table.add_row(row["site"], row["key"], escape(str(row["here"])), escape(str(row["there"])))
    out.print(table)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or a demo's directory.")],
    page: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The HTML page. Default: report.html in the run, or in this directory for several.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[str | None, typer.Option()] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about a run, or a comparison of several.

    Examples:  [cyan]qvit report runs/qvit[/]    [cyan]qvit report runs/* --out comparison.html[/]
    """
    from qvit.report import display_table, load_runs, results_table, write_page

    loaded = load_runs(runs)
    target = page or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_page(loaded, target, title=title)
    rows = results_table(loaded)
    if as_json:
        return _print_json({"page": str(target.absolute()), "rows": rows})
    header, lines = display_table(rows)
    table = Table(*map(escape, header))
    for line in lines:
        table.add_row(*map(escape, line))
    out.print(table)
    out.print(escape(f"page: {target.absolute()}"), highlight=False, soft_wrap=True)


def _resolved_plan(name: str, model: str | None, model_arg: list[str] | None) -> Any:
    from qvit.families import inspect_model
    from qvit.plan import QuantPlan, plan_from
    from qvit.training.models import create_model

    plan = QuantPlan.load(name) if Path(name).exists() else plan_from(name)
    if model is not None:
        return plan.resolve(inspect_model(create_model(model, **_pairs(model_arg))).sites, model)
    if plan.rules:
        raise UsageError(f"'{name}' consists of rules: add --model to see what they mean for a model")
    return plan


def _pairs(items: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a dict; values are JSON where they parse as such, else text."""
    pairs: dict[str, Any] = {}
    for item in items or []:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise UsageError(f"'{item}' is not KEY=VALUE")
        try:
            pairs[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            pairs[key.strip()] = {"True": True, "False": False, "None": None}.get(text, text)
    return pairs


def _show_result(result: dict[str, Any], run: Path, as_json: bool) -> None:
    if as_json:
        return _print_json(result)
    of_float = "" if result["method"] == "float" else f" (float {result['float_accuracy']:.2f} %)"
    out.print(
        f"accuracy {result['accuracy']:.2f} %{of_float}, {_bops(result['bit_operations'])} bit operations, "
        f"weights {_bytes(result['weight_bytes'])}, {result['seconds']:.0f} s",
        highlight=False,
    )
    place = escape(f"run: {run.absolute()}   (`qvit report {run}` draws it)")
    out.print(place, highlight=False, soft_wrap=True)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.2f} ± {deviation:.2f}"


def _bops(value: float) -> str:
    return f"{value / 1e9:.3f} G" if value >= 1e8 else f"{value / 1e6:.3f} M"


def _bytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def _bits(value: int | list[int]) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
