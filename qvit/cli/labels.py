"""`qvit labels`: a teacher's soft labels for many crops of each training image, written once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.console import (
    ClassMap,
    Debug,
    Device,
    Json,
    ModelArgs,
    Quiet,
    Workers,
    notifier,
    pairs,
    print_json,
    progress_bar,
    say,
    size,
)
from qvit.errors import UsageError


def labels(
    model: Annotated[
        str | None, typer.Argument(help="The student: timm's name, or vit_digits.", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Who labels: timm's name, or a finished run.", show_default=False)
    ] = None,
    teacher_weights: Annotated[
        str | None, typer.Option(help="File of the teacher's weights. Default: from timm's hub.", show_default=False)
    ] = None,
    teacher_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Argument of the teacher for timm.create_model. Repeatable."),
    ] = None,
    data: Annotated[str, typer.Option(help="Images, as for `qvit train`; those it would train on are labelled.")] = (
        "digits"
    ),
    eval_data: Annotated[str | None, typer.Option(help="Test images, as for `qvit train`.")] = None,
    class_map: ClassMap = None,
    test_share: Annotated[float, typer.Option(help="As the setting of `qvit train`.")] = 0.2,
    monitor_share: Annotated[float, typer.Option(help="As the setting of `qvit train`.")] = 0.0,
    on_bad_image: Annotated[str, typer.Option(help="fatal or skip: what an unreadable image does.")] = "fatal",
    crops: Annotated[int | None, typer.Option(help="Crops of each image.", show_default=False)] = None,
    top_k: Annotated[str, typer.Option(help="Classes to keep of each crop: 5, 10, ... or full.")] = "5",
    scale: Annotated[tuple[float, float], typer.Option(help="Share of the area of a crop, from and to.")] = (0.08, 1.0),
    ratio: Annotated[tuple[float, float], typer.Option(help="Width over height of a crop, from and to.")] = (
        0.75,
        4 / 3,
    ),
    interpolation: Annotated[str, typer.Option(help="nearest, bilinear, bicubic or lanczos.")] = "bicubic",
    flip: Annotated[
        float | None, typer.Option(help="Probability of mirroring. Default: 0.5, and 0 for digits.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the crops, and a monitor share as in training.")] = 0,
    images_per_shard: Annotated[
        int | None, typer.Option(help="Images in a file. Default: about 260 thousand crops.", show_default=False)
    ] = None,
    store: Annotated[Path | None, typer.Option("--out", help="The store's directory.", show_default=False)] = None,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="Compare a store with its checksums, and do nothing else."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Crops that the teacher sees at a time.")] = 64,
    device: Device = "auto",
    workers: Workers = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a teacher's soft labels for random crops of the training images, to train from without the teacher.

    A call that was stopped goes on where it was; one that is finished only checks what is there.

    Examples:
    [cyan]qvit labels vit_digits --teacher runs/float --data digits --crops 20 --scale 0.5 1 --out labels/digits[/]

    [cyan]qvit labels deit_tiny_patch16_224 --teacher tf_efficientnet_l2.ns_jft_in1k_475 --data imagenet --crops 500
    --scale 0.08 0.936 --workers 8 --out labels/imagenet[/]

    [cyan]qvit train deit_tiny_patch16_224 --set labels=labels/imagenet --set single_crop_epochs=4 --data imagenet
    --out runs/deit[/]

    [cyan]qvit labels --verify labels/imagenet[/]
    """
    if verify is not None:
        if model is not None or store is not None:
            raise UsageError("--verify takes everything from the store: give nothing else")
        return _verify(verify, as_json)
    if model is None or teacher is None or crops is None or store is None:
        raise UsageError("give a MODEL, --teacher T, --crops M and --out STORE, or --verify STORE")
    from qvit.runs.labels import LabelRequest, write_labels

    request = LabelRequest.create(
        model=model, model_kwargs=pairs(model_arg), teacher=teacher, teacher_weights=teacher_weights,
        teacher_kwargs=pairs(teacher_arg), data=data, eval_data=eval_data, class_map=class_map, test_share=test_share,
        monitor_share=monitor_share, on_bad_image=on_bad_image, crops=crops,
        top_k=int(top_k) if top_k.isdecimal() else top_k, scale=scale, ratio=ratio, interpolation=interpolation,
        flip=flip, seed=seed, images_per_shard=images_per_shard, batch_size=batch_size, workers=workers or 0,
        device=device,
    )  # fmt: skip
    silent = quiet or as_json
    with progress_bar(hidden=silent) as show:
        result = write_labels(
            request,
            store,
            notify=notifier(silent),
            progress=partial(show, "crops"),
        )
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
