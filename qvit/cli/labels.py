"""`qvit labels`: a teacher's soft labels for many crops of each training image, written once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.console import Json, Quiet, notifier, print_json, progress_bar, say, size
from qvit.cli.options import Fields, Given, command
from qvit.errors import UsageError
from qvit.runs.requests import LabelRequest


@command("labels", order=3)
def labels(
    given: Annotated[Given, Fields(LabelRequest, required=False)],
    store: Annotated[Path | None, typer.Option("--out", help="The store's directory.")] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Compare a store with its checksums, and do nothing else.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a teacher's soft labels for random crops of the training images, to train from without the teacher.

    A call that was stopped resumes where it was; a finished one only checks the store.

    Examples:
    [cyan]qvit labels vit_digits --teacher runs/float --data digits --crops 20 --scale 0.5 1 --out labels/digits[/]

    [cyan]qvit labels deit_tiny_patch16_224 --teacher tf_efficientnet_l2.ns_jft_in1k_475 --data imagenet --crops 500
    --scale 0.08 0.936 --workers 8 --out labels/imagenet[/]

    [cyan]qvit train deit_tiny_patch16_224 --set labels=labels/imagenet --set single_crop_epochs=4 --data imagenet
    --out runs/deit[/]

    [cyan]qvit labels --verify labels/imagenet[/]
    """
    if verify is not None:
        if "model" in given or store is not None:
            raise UsageError("--verify takes everything from the store: give nothing else")
        return _verify(verify, as_json)
    if store is None or not {"model", "teacher", "crops"} <= given.keys():
        raise UsageError("give a MODEL, --teacher T, --crops M and --out STORE, or --verify STORE")
    from qvit.runs.labels import write_labels

    request = LabelRequest.create(**given)
    silent = quiet or as_json
    with progress_bar(hidden=silent) as show:
        result = write_labels(request, store, notify=notifier(silent), progress=partial(show, "crops"))
    if as_json:
        return print_json(result)
    speed = "" if result["crops_per_second"] is None else f", {result['crops_per_second']:.0f} crops per second"
    left_out = f" ({result['unlabelled']} could not be read)" if result["unlabelled"] else ""
    say(
        f"{result['crops']} crops of {result['images']} images{left_out}: {size(result['bytes'])}, "
        f"{result['bytes_per_crop']:.1f} bytes per crop, {result['written']} written in "
        f"{result['seconds']:.0f} s{speed}"
    )
    say(f"labels: {result['store']}   (`qvit train ... --set labels={store}` learns from them)")


def _verify(folder: Path, as_json: bool) -> None:
    from qvit.data.labels import SoftLabelStore

    opened = SoftLabelStore(folder)
    opened.verify()
    if as_json:
        return print_json({"store": str(folder.absolute()), "unlabelled": opened.unlabelled, **opened.describe()})
    call = opened.call
    say(f"{folder} is whole: {call.images} images with {call.crops} crops each, labelled by {call.teacher}")
