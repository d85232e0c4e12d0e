"""`qvit ptq`: a float model to a quantized one, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    Json,
    Quiet,
    bops,
    boundary_width,
    notifier,
    print_json,
    progress_bar,
    say,
    size,
    without_labels,
)
from qvit.cli.options import Fields, Given, command
from qvit.methods.ptq.options import PTQOptions
from qvit.training.config import TrainConfig, validated


@command("ptq", order=4)
def ptq(
    subject: Annotated[
        Given,
        Fields(
            TrainConfig,
            "model budget plan data eval_data class_map unlabelled on_bad_image weights pretrained calibration_images "
            "batch_size seed device workers threads model_kwargs",
            help={
                "budget": "`w8a8`: that plan. `6bit`: the uniform plan; with `--metric`, mixed widths of at most its "
                "bit operations. `21.455G`, `0.25`: bit operations, with `--metric` only",
                "plan": "a plan file in place of a budget",
                "data": "calibration images, as for `qvit train`; labels are not used and need not be there",
                "calibration_images": "images for ranges, sensitivities and biases",
                "batch_size": "images per batch of the evaluation",
            },
            defaults={"calibration_images": 128},
        ),
    ],
    options: Annotated[
        Given,
        Fields(
            PTQOptions,
            flags={
                "image_sizes": ["--image-size"],
                "weights": ["--weight-scales"],
                "heads": ["--head-scales"],
                "positions": ["--position-scales"],
            },
        ),
    ],
    run: Annotated[Path, typer.Option("--out", help="The run's directory.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a trained float model without training, and score it beside the float model.

    Examples:
    [cyan]qvit ptq vit_digits --weights runs/float --budget w8a8 --out runs/ptq[/]

    [cyan]qvit ptq deit_tiny_patch16_224 --pretrained --data imagenet/train --eval-data imagenet/val --budget w4a4
    --effort standard --out runs/deit-w4a4[/]

    [cyan]qvit ptq deit_tiny_patch16_224 --pretrained --data imagenet --budget 6bit --metric fisher --out runs/mixed[/]

    [cyan]qvit ptq deit_tiny_patch16_224 --pretrained --data photos --budget w8a8 --out runs/photos[/]

    [cyan]qvit ptq deit_tiny_patch16_224 --pretrained --data imagenet --max-drop 0.5 --objective bytes --out
    runs/gate[/]
    """
    from qvit.runs.run import train

    if "boundary" in options:
        options["boundary"] = boundary_width(options["boundary"]) or "free"
    config = TrainConfig.create(method="ptq", method_options=validated(PTQOptions, options).model_dump(), **subject)
    silent = quiet or as_json
    with progress_bar(hidden=silent) as progress:
        result = train(config, run, overwrite=overwrite, quiet=silent, notify=notifier(silent), progress=progress)
    if as_json:
        return print_json(result)
    found = without_labels(result)
    if result["accuracy"] is not None:
        found = (
            f"top-1 {result['accuracy']:.2f} % (float {result['float_accuracy']:.2f} %), "
            f"same answer on {result['agreement']:.2f} % of {result['images']} images"
        )
    say(
        f"{found}, {bops(result['bit_operations'])} bit operations, weights {size(result['weight_bytes'])}, "
        f"{result['seconds']['total']:.0f} s"
    )
    if gate := result.get("gate"):
        say(_of_gate(gate))
    say(f"run: {run.absolute()}   (`qvit report {run}` draws it)")


def _of_gate(gate: dict[str, Any]) -> str:
    """What an accuracy gate found, and how sure that is."""
    plan = next(trial["plan"] for trial in reversed(gate["trials"]) if trial["within"])
    lost = f"loses {gate['drop']:.2f} points of top-1"
    if gate["measure"] == "agreement":
        lost = f"changes {gate['drop']:.2f} % of the answers"
    if gate["measure"] == "features":
        lost = f"moves features by {gate['drop']:.2f} points (100 · (1 - cosine))"
    return (
        f"gate: {plan} {lost} on {gate['images']} images that neither calibrated nor chose it; on more images of their "
        f"kind at most {gate['max_drop']:g} with {100 * gate['confidence']:.0f} % confidence, at most "
        f"{gate['drop_at_most']:.2f} with 95 %"
    )
