"""`qvit sensitivity` and `qvit allocate`: what each tensor's quantization costs, and the plan that follows from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    Json,
    bops,
    boundary_width,
    integers,
    kept_beside,
    print_json,
    print_table,
    progress_bar,
    say,
    size,
)
from qvit.cli.options import Fields, Given, ModelArgs, command
from qvit.errors import QvitError, UsageError
from qvit.runs.requests import Request
from qvit.training.config import validated


@command("sensitivity", order=11)
def sensitivity(
    subject: Annotated[
        Given,
        Fields(
            Request,
            "model data weights pretrained class_map unlabelled on_bad_image images seed device workers model_kwargs",
            help={
                "model": "timm's name, vit_digits, or a finished run for --metric learned",
                "data": "training images, as for `qvit train`",
                "images": "how many training images",
                "seed": "chooses images and random signs",
            },
            defaults={"images": 32, "data": ""},
        ),
    ],
    target: Annotated[Path, typer.Option("--out", help="The JSON file.")],
    metric: Annotated[
        str | None,
        typer.Option(
            help="fisher (the default), hessian, relevance, nuclear-norm, lampq, ompq, topological-entropy, kl (slow), "
            "mix-qvit (slow) or learned (from a run); of models without classes features (their default) or cosine "
            "(slow)."
        ),
    ] = None,
    widths: Annotated[str, typer.Option(help="Candidate widths: 2-8, or a list such as 2,3,4,6,8.")] = "2-8",
    plan: Annotated[
        str | None, typer.Option(help="Grids and granularity to measure with: preset or plan file.")
    ] = None,
    type_normalised: Annotated[
        bool, typer.Option("--type-normalised", help="Give every kind of tensor the same mean (after LampQ).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how much the loss rises when one tensor, or one head of it, is quantized to 2 to 8 bits.

    A measurement that was stopped resumes where it was.

    Examples:
    [cyan]qvit sensitivity deit_tiny_patch16_224 --weights deit.safetensors --data imagenet/train --out s.json[/]

    [cyan]qvit sensitivity vit_digits --weights runs/float --data digits --metric kl --widths 2,4,8 --out s.json[/]

    [cyan]qvit sensitivity runs/qvit --metric learned --out s.json[/]
    """
    from qvit.measure import measure_sensitivity

    request = validated(Request, subject)
    options: dict[str, Any] = {
        "metric": metric,
        "widths": integers(widths, "--widths"),
        "seed": request.seed,
        "type_normalised": type_normalised,
        "plan": plan,
    }
    with kept_beside(target) as partial:
        if metric == "learned":
            if request.data or request.weights:
                raise UsageError("metric 'learned' reads a finished run: leave out --data and --weights")
            from qvit.runs.directory import read_config
            from qvit.runs.finished import load_run

            options["name"] = read_config(Path(request.model))[0].model
            found = measure_sensitivity(load_run(request.model), **options)
        else:
            found = _measured(request, partial, options)
        found.save(target)
    if as_json:
        return print_json(found.to_json())
    _show_types(found)
    say(f"{found.metric} on {found.images} images in {found.seconds:.1f} s")
    say(f"sensitivity: {target.absolute()}   (`qvit allocate {target} --budget 4bit --out plan.json` makes a plan)")


def _measured(request: Request, kept: Path | None, options: dict[str, Any]) -> Any:
    from qvit.data.open import calibration_batches, data_config_of
    from qvit.measure import default_metric, measure_sensitivity
    from qvit.models.create import create_model
    from qvit.training.processes import Processes

    if not request.data:
        raise UsageError(f"metric '{options['metric'] or 'fisher'}' needs training images: give --data")
    if request.weights is None and not request.pretrained:
        raise UsageError(
            "give the float model's weights with --weights FILE or --pretrained: an untrained model says nothing"
        )
    assert request.images is not None
    place = Processes(request.device).device
    weights = {"weights": request.weights, "pretrained": request.pretrained}
    float_model = create_model(request.model, **weights, **request.model_kwargs).to(place).eval()
    batches = calibration_batches(
        _training_images(request),
        data_config_of(float_model),
        images=request.images,
        batch_size=min(16, request.images),
        seed=request.seed,
        workers=request.workers,
        on_bad_image=request.on_bad_image,
        device=place,
    )
    with progress_bar(hidden=False) as show:
        return measure_sensitivity(
            float_model,
            batches,
            progress=partial(show, options["metric"] or default_metric(float_model)),
            partial=kept,
            name=request.model,
            **options,
        )


def _training_images(request: Request) -> Any:
    """The training images that `qvit train` would see; all of them where no share could be set aside for testing."""
    from qvit.data.open import open_data, open_source

    which: dict[str, Any] = {"class_map": request.class_map, "unlabelled": request.unlabelled}
    try:
        return open_data(request.data, **which).train
    except UsageError:
        raise
    except QvitError as error:
        if not re.search("too few images( per class)? to set some aside", str(error)):
            raise
        return open_source(request.data, split="train", **which)


def _show_types(found: Any) -> None:
    """The table for people: sums over all sites and heads of a kind, at no more widths than fit a line."""
    from qvit.measure import site_type

    columns = range(0, len(found.widths), 1 + (len(found.widths) - 1) // 4)

    sums: dict[str, Any] = {}
    for name, values in found.table.items():
        kind = site_type(name)
        sums[kind] = sums.get(kind, 0.0) + values.sum(0)
    print_table(
        ("tensors", *(f"{found.widths[column]} bit" for column in columns)),
        [
            (kind, *(f"{values[column]:.3g}" for column in columns))
            for kind, values in sorted(sums.items(), key=lambda item: -item[1][0])
        ],
        title=f"predicted loss increase of {found.model}, by kind of tensor",
        whole=True,
    )


@command("allocate", order=12)
def allocate(
    sensitivity: Annotated[Path, typer.Argument(help="File of `qvit sensitivity`.")],
    model_arg: ModelArgs,
    target: Annotated[
        Path | None, typer.Option("--out", help="The plan; with several budgets NAME-BUDGET.json.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Limit in the unit: 4bit (the uniform model's cost), 21.455G, 2.5MB, 12ms, 25% of the 8-bit model's. "
            "Repeatable."
        ),
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            help="bit_operations, weight_bytes, or a file of milliseconds: that of qvit bench --latency-table, or JSON "
            "{site: {width: milliseconds}}; what it leaves out takes no time."
        ),
    ] = "bit_operations",
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=BITS", help="Sites of a fixed width; a later pin wins. Repeatable."),
    ] = None,
    tie: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=PATTERN",
            help="Sites whose wildcards stand for the same text share a width, head by head; PATTERN alone: all "
            "matching sites share one. Repeatable.",
        ),
    ] = None,
    boundary: Annotated[
        str, typer.Option(help="Width of the first and the last layer; free: allocated like the others.")
    ] = "8",
    solver: Annotated[
        str,
        typer.Option(
            help="program: the least predicted loss of all plans; greedy: one width lowered at a time (MPTQ-ViT)."
        ),
    ] = "program",
    frontier: Annotated[
        Path | None, typer.Option(help="The whole frontier: an .html page with a slider, or a .json file.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another sensitivity, such as of metric kl, that the page holds predictions against."),
    ] = None,
    points: Annotated[int, typer.Option(help="Largest number of points of the frontier.")] = 100,
    as_json: Json = False,
) -> None:
    """Make the plan of least predicted loss within a budget, and draw the frontier of all budgets.

    Examples:
    [cyan]qvit allocate s.json --budget 4bit --out plan.json[/]

    [cyan]qvit allocate s.json --budget 4bit --budget 6bit --out plans/deit.json --frontier frontier.html[/]

    [cyan]qvit allocate s.json --budget 2.5MB --unit weight_bytes --pin "blocks.0.*=8"
    --tie "blocks.*.attn.query=blocks.*.attn.key" --out plan.json[/]

    [cyan]qvit allocate s.json --budget 5ms --unit latency.json --out plan.json[/]
    """
    from qvit.allocate import allocate_plan, frontier_report
    from qvit.allocate.units import MILLISECONDS, Unit
    from qvit.files import write_json
    from qvit.measure import Sensitivity
    from qvit.models.create import create_shapes
    from qvit.models.families import inspect_model

    budgets = budget or []
    if (target is None) != (not budgets) or not (budgets or frontier):
        raise UsageError("give --budget and --out for a plan, --frontier FILE for the frontier, or all three")
    if frontier is not None and frontier.suffix not in (".html", ".json"):
        raise UsageError(f"the frontier's file '{frontier}' must end in .html or .json")
    measured = Sensitivity.load(sensitivity)
    cost = inspect_model(create_shapes(measured.model, **model_arg))
    kind = Unit.of(unit, cost, measured.model)
    options: dict[str, Any] = {"unit": kind, "pins": pin or [], "ties": tie or [], "boundary": boundary_width(boundary)}
    jobs = len(budgets) + (frontier is not None)
    with progress_bar(hidden=as_json) as show:
        plans = {}
        for done, text in enumerate(budgets):
            show("plans", done, jobs)
            plans[text] = allocate_plan(cost, measured, text, solver=solver, **options)
        show("plans", len(budgets), jobs)
        report = None
        if frontier is not None:
            report = frontier_report(
                cost,
                measured,
                [(text, plan.widths()) for text, plan in plans.items()],
                points=points,
                against=None if against is None else Sensitivity.load(against),
                **options,
            )
            show("plans", jobs, jobs)
    rows = []
    for text, plan in plans.items():
        assert target is not None
        file = (
            target
            if len(plans) == 1
            else target.with_name(f"{target.stem}-{text.replace('%', 'percent')}{target.suffix}")
        )
        plan.save(file)
        widths = plan.widths()
        rows.append(
            {
                "budget": text,
                "plan": str(file.absolute()),
                "predicted_loss": measured.predicted(widths),
                "bit_operations": cost.bit_operations(widths),
                "weight_bytes": cost.weight_bytes(widths),
            }
            | ({} if kind.name != MILLISECONDS else {"milliseconds": kind.total(cost, widths)})
        )
    if frontier is not None:
        assert report is not None
        if frontier.suffix == ".json":
            write_json(frontier, report)
        else:
            from qvit.report import write_frontier_page

            write_frontier_page(report, frontier)
    if as_json:
        return print_json({"plans": rows, "frontier": None if frontier is None else str(frontier.absolute())})
    _show_plans(rows)
    if frontier is not None:
        say(f"frontier: {frontier.absolute()}")


def _show_plans(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "budget": lambda row: row["budget"],
        "predicted loss": lambda row: f"{row['predicted_loss']:.4g}",
        "bit operations": lambda row: bops(row["bit_operations"]),
        "weights": lambda row: size(row["weight_bytes"]),
    }
    if "milliseconds" in rows[0]:
        columns["ms"] = lambda row: f"{row['milliseconds']:.3g}"
    print_table(tuple(columns), [[cell(row) for cell in columns.values()] for row in rows])
    for row in rows:
        say(f"plan: {row['plan']}")
