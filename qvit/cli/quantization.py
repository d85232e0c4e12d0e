"""`qvit ptq`: a float model to a quantized one, without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    ClassMap,
    Debug,
    Device,
    Json,
    ModelArgs,
    Pretrained,
    Quiet,
    Weights,
    Workers,
    bops,
    boundary_width,
    err,
    notifier,
    pairs,
    print_json,
    say,
    size,
)


def ptq(
    model: Annotated[str, typer.Argument(help="timm's name, or vit_digits.")],
    run: Annotated[Path, typer.Option("--out", help="The run's directory.", show_default=False)],
    budget: Annotated[
        str | None,
        typer.Option(help="w8a8: that plan. 6bit, 21.455G or 0.25: bit operations, for mixed widths with --metric."),
    ] = None,
    plan: Annotated[str | None, typer.Option(help="A plan file in place of a budget.")] = None,
    metric: Annotated[str | None, typer.Option(help="Mixed widths by sensitivity: fisher, kl or hessian.")] = None,
    sensitivity: Annotated[
        str | None, typer.Option(help="Mixed widths by a measured sensitivity, such as RUN/sensitivity.json.")
    ] = None,
    sensitivity_images: Annotated[
        int | None, typer.Option(help="Images of a sensitivity. Default: the calibration images.", show_default=False)
    ] = None,
    min_width: Annotated[
        int | None, typer.Option(help="Narrowest of the mixed widths. Default: 3 if the budget allows, else 2.")
    ] = None,
    boundary: Annotated[str, typer.Option(help="Width of the first and the last layer, or free, if mixed.")] = "8",
    data: Annotated[str, typer.Option(help="Calibration images, as for `qvit train`; labels are not used.")] = "digits",
    eval_data: Annotated[
        str | None, typer.Option(help="Test images. Default: the data's own test split, or a share set aside.")
    ] = None,
    class_map: ClassMap = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    calibration_images: Annotated[int, typer.Option(help="Images for ranges, sensitivities and biases.")] = 128,
    observer: Annotated[str, typer.Option(help="Ranges of activations: mse, percentile or minmax.")] = "mse",
    granularity: Annotated[
        str, typer.Option("--weight-scales", help="Scales of weights: per-channel or per-head.")
    ] = "per-channel",
    probs: Annotated[str, typer.Option(help="Grid of attention probabilities: auto, uniform, log2 or log-sqrt2.")] = (
        "auto"
    ),
    heads: Annotated[
        str,
        typer.Option("--head-scales", help="Scales of q, k, v, probabilities, outputs: auto, per-head, per-tensor."),
    ] = "auto",
    reparameterize: Annotated[
        bool, typer.Option("--reparameterize/--no-reparameterize", help="Even out the channels of LayerNorm outputs.")
    ] = True,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction/--no-bias-correction", help="Take mean errors back in the biases.")
    ] = True,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct/--no-reconstruct", help="Train each block to answer like its float original.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps per block of the reconstruction.")] = 2000,
    recon_images: Annotated[int, typer.Option(help="Images of the reconstruction.")] = 1024,
    recon_batch: Annotated[int, typer.Option(help="Images per step of the reconstruction.")] = 16,
    fisher: Annotated[bool, typer.Option("--fisher", help="Weight the reconstruction error by Fisher.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch of the evaluation.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "auto",
    workers: Workers = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default=False)] = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a trained float model without training, and score it beside the float model.

    Examples:
    [cyan]qvit ptq vit_digits --weights runs/float --budget w8a8 --out runs/ptq[/]

    [cyan]qvit ptq deit_tiny_patch16_224 --pretrained --data imagenet/train --eval-data imagenet/val --budget w4a4
    --reconstruct --out runs/deit-w4a4[/]

    [cyan]qvit ptq deit_tiny_patch16_224 --pretrained --data imagenet --budget 6bit --metric fisher --out runs/mixed[/]
    """
    from qvit.runs.ptq import ptq as quantize_after_training
    from qvit.training.config import TrainConfig

    options = {
        "observer": observer, "weights": granularity, "probs": probs, "heads": heads,
        "reparameterize": reparameterize,
        "bias_correction": bias_correction, "reconstruct": reconstruct, "steps": steps, "recon_images": recon_images,
        "recon_batch": recon_batch,
        "fisher": fisher, "metric": metric, "sensitivity": sensitivity, "sensitivity_images": sensitivity_images,
        "min_width": min_width, "boundary": boundary_width(boundary) or "free",
    }  # fmt: skip
    config = TrainConfig.create(
        model=model, model_kwargs=pairs(model_arg), weights=weights, pretrained=pretrained, method="ptq",
        method_options=options, budget=budget, plan=plan, data=data, eval_data=eval_data, class_map=class_map,
        calibration_images=calibration_images, batch_size=batch_size, seed=seed, device=device, workers=workers or 0,
        threads=threads,
    )  # fmt: skip
    silent = quiet or as_json
    with _bar(silent) as progress:
        result = quantize_after_training(config, run, overwrite=overwrite, notify=notifier(silent), progress=progress)
    if as_json:
        return print_json(result)
    say(
        f"top-1 {result['top1']:.2f} % (float {result['top1_float']:.2f} %), "
        f"same answer on {result['agreement']:.2f} % of {result['images']} images, "
        f"{bops(result['bit_operations'])} bit operations, weights {size(result['weight_bytes'])}, "
        f"{result['seconds_total']:.0f} s"
    )
    say(f"run: {run.absolute()}   (`qvit report {run}` draws it)")


@contextmanager
def _bar(silent: bool) -> Iterator[Any]:
    """A progress bar over the steps of a block, with the block's name and the loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    loss = TextColumn("error {task.fields[loss]:.4f}")
    with Progress(*columns, loss, TimeElapsedColumn(), console=err, transient=True, disable=silent) as bar:
        task = bar.add_task("", total=None, visible=False, loss=0.0)
        yield lambda block, step, steps, loss: bar.update(
            task, description=block, completed=step, total=steps, loss=loss, visible=True
        )
