"""Commands that need no training: what a model costs under a plan, and what plans say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.cli.console import Json, bits, bops, print_json, print_table, say, size
from qvit.cli.options import ModelArgs, command
from qvit.errors import UsageError

if TYPE_CHECKING:
    from qvit.plan.spec import TensorSpec


@command("cost", order=9)
def cost(
    model: Annotated[str, typer.Argument(help="timm's name, or vit_digits.")],
    model_arg: ModelArgs,
    plan: Annotated[str | None, typer.Option(help="Preset (w4a4) or plan file; without one, float.")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    as_json: Json = False,
) -> None:
    """Count the bit operations and weight bytes of a model under a plan.

    Examples:  [cyan]qvit cost deit_tiny_patch16_224[/]    [cyan]qvit cost deit_tiny_patch16_224 --plan w3a3 --json[/]
    """
    from qvit.models.create import create_shapes
    from qvit.models.families import inspect_model
    from qvit.plan.cost import FLOAT_BITS
    from qvit.plan.quant_plan import plan_from

    costs = inspect_model(create_shapes(model, **model_arg))
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
        rows = [
            (
                row["site"],
                f"{row['macs'] / 1e6:.3f} M" if row["macs"] else "",
                bits(row["bit_width"], row.get("token_bit_width")),
                bops(row["bit_operations"]) if row["macs"] else "",
                size(row["weight_bytes"]) if row["weight_bytes"] else "",
            )
            for row in report["sites"]
        ]
        print_table(("site", "MACs", "bits", "bit operations", "weights"), rows)
    elif plan is None:
        uniform = {width: costs.uniform(width) for width in range(2, 9)}
        print_table(
            ("bits", "bit operations", "weights"),
            [(bits, bops(costs.bit_operations(own)), size(costs.weight_bytes(own))) for bits, own in uniform.items()],
            title="uniform budgets (8 bits in the first and the last layer)",
            align=">",
        )


@command("plan show", order=10)
def plan_show(
    plan: Annotated[str, typer.Argument(help="A run, a plan file, or a preset with --model.")],
    model_arg: ModelArgs,
    model: Annotated[str | None, typer.Option(help="Resolve rules or a preset for this model.")] = None,
    as_json: Json = False,
) -> None:
    """Show the widths of a plan, one line per site.

    Examples:  [cyan]qvit plan show runs/qvit[/]    [cyan]qvit plan show w3a3 --model deit_tiny_patch16_224[/]
    """
    resolved = _resolved_plan(plan, model, model_arg)
    if as_json:
        return print_json(resolved.to_json())
    title = f"plan {resolved.name}" + (f" of {resolved.model}" if resolved.model else "")
    rows = [(site, *_decision(spec)) for site, spec in resolved.sites.items()]
    print_table(("site", "bits", "grid", "scales"), rows, title=title, align="<")


def _decision(spec: TensorSpec | None) -> tuple[str, str, str]:
    """Bits, grid and granularity of a tensor."""
    if spec is None:
        return "float", "", ""
    grid = "signed" if spec.signed else "unsigned" if spec.symmetric else "unsigned + offset"
    split = spec.token_bit_width
    return bits(list(spec.widths), None if split is None else split.to_json()), grid, spec.to_json()["granularity"]


@command("plan diff", order=11)
def plan_diff(
    here: Annotated[str, typer.Argument(help="A run, a plan file, or a preset with --model.")],
    there: Annotated[str, typer.Argument(help="Another one.")],
    model_arg: ModelArgs,
    model: Annotated[str | None, typer.Option(help="Resolve rules or presets for this model.")] = None,
    as_json: Json = False,
) -> None:
    """Show where two plans differ.

    Example:  [cyan]qvit plan diff runs/qvit-seed0 runs/qvit-seed1[/]
    """
    first, second = (_resolved_plan(name, model, model_arg) for name in (here, there))
    rows = first.diff(second)
    if as_json:
        return print_json(rows)
    print_table(
        ("site", "key", first.name, second.name),
        [(row["site"], row["key"], row["here"], row["there"]) for row in rows],
        title=f"{len({row['site'] for row in rows})} of {len(first.sites)} sites differ",
        align="<",
    )


def _resolved_plan(name: str, model: str | None, model_arg: dict[str, Any]) -> Any:
    from qvit.plan.quant_plan import QuantPlan, plan_from

    plan = QuantPlan.load(name) if Path(name).exists() else plan_from(name)
    if model is not None:
        from qvit.models.create import create_shapes
        from qvit.models.families import inspect_model

        return plan.resolve(inspect_model(create_shapes(model, **model_arg)).sites, model)
    if plan.rules:
        raise UsageError(f"'{name}' consists of rules: add --model to see what they mean for a model")
    return plan
