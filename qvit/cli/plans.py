"""Commands that need no training: what a model costs under a plan, and what plans say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qvit.cli.console import Debug, Json, ModelArgs, bits, bops, out, pairs, print_json, say, size
from qvit.errors import UsageError


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
    from qvit.models.create import create_shapes
    from qvit.models.families import inspect_model
    from qvit.plan.cost import FLOAT_BITS
    from qvit.plan.quant_plan import plan_from

    costs = inspect_model(create_shapes(model, **pairs(model_arg)))
    if plan is None:
        name, widths = "float", {site: (FLOAT_BITS,) for site in costs.sites}
    else:
        resolved = plan_from(plan).resolve(costs.sites)
        name, widths = resolved.name, resolved.widths()
    report = costs.report(widths, model=model, plan=name)
    if as_json:
        return print_json(report)
    say(
        f"{model}, plan {name}: {report['macs'] / 1e9:.3f} G MACs, {bops(report['bit_operations'])} bit operations, "
        f"weights {size(report['weight_bytes'])}"
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
                bits(row["bit_width"]),
                bops(row["bit_operations"]) if counted else "",
                size(row["weight_bytes"]) if row["weight_bytes"] else "",
            )
        out.print(table)
    elif plan is None:
        table = Table(title="uniform budgets (8 bits in the first and the last layer)")
        for column in ("bits", "bit operations", "weights"):
            table.add_column(column, justify="right")
        for width in range(2, 9):
            table.add_row(
                str(width),
                bops(costs.bit_operations(costs.uniform(width))),
                size(costs.weight_bytes(costs.uniform(width))),
            )
        out.print(table)


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
        return print_json(resolved.to_json())
    table = Table(title=escape(f"plan {resolved.name}" + (f" of {resolved.model}" if resolved.model else "")))
    for column in ("site", "bits", "grid", "scales"):
        table.add_column(column)
    for site, spec in resolved.sites.items():
        if spec is None:
            table.add_row(site, "float", "", "")
        else:
            grid = "signed" if spec.signed else "unsigned" if spec.symmetric else "unsigned + offset"
            split = spec.token_bit_width
            groups = f" | {split.low} (tokens: {100 * split.share:g} % | rest)" if split else ""
            table.add_row(site, bits(list(spec.widths)) + groups, grid, spec.to_json()["granularity"])
    out.print(table)


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
        return print_json(rows)
    table = Table(title=f"{len({row['site'] for row in rows})} of {len(first.sites)} sites differ")
    for column in ("site", "key", first.name, second.name):
        table.add_column(escape(column))
    for row in rows:
        table.add_row(row["site"], row["key"], escape(str(row["here"])), escape(str(row["there"])))
    out.print(table)


def _resolved_plan(name: str, model: str | None, model_arg: list[str] | None) -> Any:
    from qvit.plan.quant_plan import QuantPlan, plan_from

    plan = QuantPlan.load(name) if Path(name).exists() else plan_from(name)
    if model is not None:
        from qvit.models.create import create_shapes
        from qvit.models.families import inspect_model

        return plan.resolve(inspect_model(create_shapes(model, **pairs(model_arg))).sites, model)
    if plan.rules:
        raise UsageError(f"'{name}' consists of rules: add --model to see what they mean for a model")
    return plan
