"""`qvit export`: a packed model as a file of ONNX Runtime, OpenVINO, torch.export or ExecuTorch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import Json, Quiet, notifier, print_json, progress_bar, say, size
from qvit.cli.options import command
from qvit.errors import UsageError


@command("export", order=15)
def export(
    source: Annotated[
        Path, typer.Argument(metavar="FILE|RUN", help="A packed file, or the directory of a run that has one.")
    ],
    to: Annotated[str, typer.Option(help="onnx, openvino, torch (a program of torch.export) or executorch.")] = "onnx",
    target: Annotated[
        Path | None,
        typer.Option("--out", help="The file. Default: beside FILE, as .onnx, .xml with its .bin, .pt2 or .pte."),
    ] = None,
    containers: Annotated[
        str | None,
        typer.Option(
            help="Of an ONNX file's weights. small: 4 and 2 bits where they suffice, a small file that ONNX Runtime "
            "multiplies in float. 8bit: products in integers. Default: small."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a call. Default: any number; of executorch 1.")] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Size of the images, such as 224x320, to which a position embedding is resampled. Default: that of "
            "the packed model.",
        ),
    ] = None,
    any_size: Annotated[
        bool,
        typer.Option("--any-size", help="Leave height and width open, for a model made with -m dynamic_img_size=true."),
    ] = False,
    no_vnni: Annotated[
        bool,
        typer.Option(
            "--no-vnni",
            help="For OpenVINO on x86 processors without VNNI, where sums of int8 products saturate: products that "
            "could are computed in float32.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the written file with the reference engine.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a packed model for another runtime: ONNX Runtime, OpenVINO, PyTorch without qvit, ExecuTorch.

    The written file is compared with the reference engine on random images, if its runtime is installed.

    Examples:
    [cyan]qvit export model.safetensors --to onnx --containers 8bit[/]

    [cyan]qvit export model.safetensors --to openvino --out model.xml --batch 1[/]

    [cyan]qvit export model.safetensors --to torch[/]

    [cyan]qvit export model.safetensors --image-size 224x320 --out model-224x320.onnx[/]
    """
    from qvit.deploy.export.write import export as write
    from qvit.models.sizes import parse_size

    if source.is_dir() and not (source / "packed.safetensors").is_file():
        raise UsageError(f"{source} has no packed.safetensors: pack the run first, then export that file")
    with progress_bar(hidden=quiet or as_json) as show:
        result = write(
            source / "packed.safetensors" if source.is_dir() else source, to, target, containers=containers,
            batch=batch, image_size=parse_size(image_size) if image_size else None, any_size=any_size,
            vnni=not no_vnni, overwrite=overwrite, check=not no_check, notify=notifier(quiet or as_json),
            progress=partial(show, "steps of the export"),
        )  # fmt: skip
    if as_json:
        return print_json(result)
    say(f"{result['file']}: {size(result['bytes'])}")
    if not quiet:
        for line in _words(result["check"]):
            say(line)
    return None


def _words(check: dict[str, Any]) -> list[str]:
    if "skipped" in check:
        return [f"not run: {check['skipped']}"]
    largest, difference = (f"{check[key]:.2g}" for key in ("largest_logit", "largest_difference"))
    near = f"the features have a cosine of {check['cosine']:.4f} and" if "cosine" in check else ""
    near = near or f"the same class in {check['agreement']:.0f} %, logits"
    lines = [
        f"beside the reference on {check['images']} random images: {near} differ by {difference} at most (largest "
        f"{'value' if 'cosine' in check else 'logit'} {largest})"
    ]
    if check["saturates"]:
        lines.append(
            "this processor has no VNNI: OpenVINO's int8 products saturate here, and the answers above show it. On "
            "processors with VNNI they are exact; a model for this one is written with --no-vnni"
        )
    return lines
