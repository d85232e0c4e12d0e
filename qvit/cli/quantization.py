"""`qvit ptq` and `qvit pmq`: a float model to a quantized one, without training."""

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
from qvit.methods.ptq.options import PMQOptions, PTQOptions
from qvit.training.config import TrainConfig, validated

#: What the command line calls options of both.
_FLAGS = {
    "image_sizes": ["--image-size"],
    "weights": ["--weight-scales"],
    "heads": ["--head-scales"],
    "positions": ["--position-scales"],
}
_HELP = {
    "data": "calibration images, as for `qvit train`; labels are not used and need not be there",
    "calibration_images": "images for ranges, sensitivities and biases",
    "batch_size": "images per batch of the evaluation",
}
Out = Annotated[Path, typer.Option("--out", help="The run's directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]


@command("ptq", order=4)
def ptq(
    subject: Annotated[
        Given,
        Fields(
            TrainConfig,
            "model budget plan data eval_data class_map unlabelled on_bad_image weights pretrained calibration_images "
            "batch_size seed device workers threads model_kwargs nonlinear",
            help={
                "budget": "`w8a8`: that plan. `6bit`: the uniform plan; with `--metric`, mixed widths of at most its "
                "bit operations. `21.455G`, `0.25`: bit operations, with `--metric` only",
                "plan": "a plan file in place of a budget",
                **_HELP,
            },
            defaults={"calibration_images": 128},
        ),
    ],
    options: Annotated[
        Given,
        Fields(PTQOptions, flags=_FLAGS),
    ],
    run: Out,
    overwrite: Overwrite = False,
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
    result = _quantized("ptq", PTQOptions, subject, options, run, overwrite=overwrite, silent=quiet or as_json)
    if as_json:
        return print_json(result)
    _show(result)
    if gate := result.get("gate"):
        say(_of_gate(gate))
    say(f"run: {run.absolute()}   (`qvit report {run}` draws it)")


@command("pmq", order=4.5)
def pmq(
    subject: Annotated[
        Given,
        Fields(
            TrainConfig,
            "model budget data eval_data class_map unlabelled on_bad_image weights pretrained calibration_images "
            "batch_size seed device workers threads model_kwargs nonlinear",
            help={
                "budget": "bit operations of the whole model: `4bit` (those of the uniform model), `21.455G`, `0.25`",
                **_HELP,
            },
            defaults={"calibration_images": 128},
        ),
    ],
    options: Annotated[
        Given,
        Fields(
            PMQOptions,
            "metric sensitivity sensitivity_images class_token patches shares key min_width boundary solver points "
            "picture observer weights probs heads positions reparameterize rotate rounding bias_correction "
            "effort reconstruct steps recon_images recon_batch",
            flags=_FLAGS | {"shares": ["--share"]},
            help={
                "metric": "the sensitivity that all is chosen by: `fisher` (the default), `kl`, `hessian`, ...",
            },
        ),
    ],
    run: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose widths of components, of the class token and of patches along one Pareto frontier (PMQ), and quantize.

    An interrupted call continues with `qvit train --resume RUN`: what was measured is kept.

    Examples:
    [cyan]qvit pmq vit_digits --weights runs/float --budget 4bit --out runs/pmq[/]

    [cyan]qvit pmq deit_tiny_patch16_224 --pretrained --data imagenet/train --eval-data imagenet/val --budget 3bit
    --picture 8 --out runs/deit-pmq3[/]

    [cyan]qvit pmq deit_tiny_patch16_224 --pretrained --data imagenet --budget 6bit --no-patches
    --out runs/class-token[/]
    """
    result = _quantized("pmq", PMQOptions, subject, options, run, overwrite=overwrite, silent=quiet or as_json)
    if as_json:
        return print_json(result)
    _show(result)
    search = result["search"]
    seconds = sum(search["seconds"].values())
    say(
        f"widths chosen by {search['metric']} on {search['images']} images in {seconds:.1f} s: "
        f"{search['chosen']['class_token']} activations with a width for the class token alone, "
        f"{search['chosen']['split']} with patches of two widths"
    )
    say(f"run: {run.absolute()}   (`qvit report {run}` draws the frontier and the patches)")
    return None


def _quantized(
    method: str, cls: type[PTQOptions], subject: Given, options: Given, run: Path, *, overwrite: bool, silent: bool
) -> dict[str, Any]:
    """The result of a run of this method with the options of a command."""
    from qvit.runs.run import train

    if "boundary" in options:
        options["boundary"] = boundary_width(options["boundary"]) or "free"
    config = TrainConfig.create(method=method, method_options=validated(cls, options).model_dump(), **subject)
    with progress_bar(hidden=silent) as progress:
        return train(config, run, overwrite=overwrite, quiet=silent, notify=notifier(silent), progress=progress)


def _show(result: dict[str, Any]) -> None:
    """Accuracy, costs and time in a line."""
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
