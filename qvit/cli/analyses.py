"""Commands that measure without training: how robust the parts of a model are, and patch-wise widths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.console import Json, bops, integers, pairs, print_json, print_table, progress_bar, say, size
from qvit.cli.options import Fields, Given, command
from qvit.errors import UsageError
from qvit.runs.requests import Request
from qvit.training.config import validated

Subject = Annotated[Given, Fields(Request, help={"data": "training images, for calibration: as for `qvit train`"})]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start over, whatever --out holds.")]


@command("analyze", order=13)
def analyze(
    subject: Subject,
    run: Annotated[Path, typer.Option("--out", help="Where analysis.json and analysis.html go.")],
    what: Annotated[str, typer.Option(help="widths, parts, heads, several with commas, or all.")] = "all",
    widths: Annotated[str, typer.Option(help="Widths of `widths` and `parts`.")] = "2,3,4,5,6,7,8",
    part: Annotated[list[str] | None, typer.Option(help="gelu, fc or msa. Repeatable. Default: all.")] = None,
    layer: Annotated[
        str, typer.Option("--layer", "--layers", help="Attention layers of `heads`: 0, 0,3 or all.")
    ] = "0",
    low_bits: Annotated[int, typer.Option(help="Width of the one head.")] = 2,
    high_bits: Annotated[int, typer.Option(help="Width of everything else.")] = 8,
    finetune: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="EPOCHS",
            help="Train every point with LSQ+ for so many epochs before it is judged, as the paper does for `widths` "
            "and `parts`.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Of --finetune: a setting of `qvit train`, such as lr=1e-3. Repeatable."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure how robust a model and its parts are against quantization (Q-ViT, Figures 1 and 2).

    A call that was stopped resumes where it was; one that asks for more adds to the points that are there.

    Examples:
    [cyan]qvit analyze deit_tiny_patch16_224 --pretrained --data imagenet/train --eval-data imagenet/val --what widths
    --out runs/analysis[/]

    [cyan]qvit analyze vit_digits --weights runs/float --data digits --what heads --layers all --out runs/heads[/]

    [cyan]qvit analyze vit_digits --weights runs/float --data digits --what parts --finetune 20 --set lr=1e-3
    --out runs/tuned[/]
    """
    from qvit.report.analysis import write_analysis_page
    from qvit.runs.analysis import ANALYSIS, KINDS
    from qvit.runs.analysis import analyze as measure

    request = validated(Request, subject)
    if setting and finetune is None:
        raise UsageError("--set is for --finetune: without it nothing is trained")
    with progress_bar(hidden=as_json) as progress:
        record = measure(
            request,
            run,
            what=KINDS if what == "all" else [kind.strip() for kind in what.split(",")],
            widths=integers(widths, "--widths"),
            parts=part,
            layers=None if layer == "all" else integers(layer, "--layers"),
            low_bits=low_bits,
            high_bits=high_bits,
            training=None if finetune is None else pairs(setting) | {"epochs": finetune},
            overwrite=overwrite,
            progress=progress,
        )
    page = write_analysis_page(run / ANALYSIS, run / "analysis.html")
    if as_json:
        return print_json(record | {"page": str(page.absolute())})
    rows = []
    for row in record["points"]:
        named = [row["what"], row["part"], row["layer"], None if row["head"] is None else f"head {row['head']}"]
        rows.append(
            (
                " ".join(value for value in named if value),
                row["bit_width"],
                f"{row['top1']:.2f}",
                f"{row['standard_error']:.2f}",
                f"{0.0 - row['drop']:+.2f}",
                f"{row['agreement']:.1f}",
            )
        )
    title = f"{request.model} on {record['settings']['images']} images, float {record['float']['top1']:.2f} %"
    print_table(("what", "bits", "top-1 %", "± se", "vs float", "agrees %"), rows, title=title)
    say(f"page: {page.absolute()}")
    return None


@command("patchwise", order=5)
def patchwise(
    subject: Subject,
    run: Annotated[Path, typer.Option("--out", help="Where plan, costs, result and picture go.")],
    budget: Annotated[str, typer.Option(help="4bit (= BOPs of the uniform model), 21.455G, or a share: 0.25.")],
    share: Annotated[
        float | None, typer.Option(help="Share of important tokens. Default: 0.5; allocated: best of 0.25, 0.5, 0.75.")
    ] = None,
    allocate: Annotated[
        str, typer.Option(help="same split in all blocks, the best of equal average, or free within the budget.")
    ] = "same",
    plan: Annotated[
        str | None, typer.Option(help="Plain plan to split, or one that is split already. Default: uniform.")
    ] = None,
    key: Annotated[bool, typer.Option("--key", help="Split the keys, too.")] = False,
    score_images: Annotated[int, typer.Option(help="Training images that splits are allocated by.")] = 32,
    picture: Annotated[int, typer.Option(help="How many judged images to draw.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Give important patches more bits than others, at equal bit operations, and judge that beside the plain plan.

    Example:
    [cyan]qvit patchwise deit_tiny_patch16_224 --pretrained --data imagenet/train --eval-data imagenet/val --budget 4bit
    --picture 4 --out runs/patchwise[/]
    """
    from qvit.report.patches import write_patches_page
    from qvit.runs.patchwise import PATCHES
    from qvit.runs.patchwise import patchwise as measure

    request = validated(Request, subject)
    with progress_bar(hidden=as_json) as progress:
        result = measure(
            request, run, budget=budget, share=share, allocation=allocate, plan=plan, key=key,
            score_images=score_images, picture=picture, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    page = write_patches_page(run / PATCHES, run / "patches.html") if picture else None
    if as_json:
        return print_json(result | ({"page": str(page.absolute())} if page else {}))
    rows = [("float", f"{result['top1_float']:.2f}", "", "")]
    for name, prefix in (("plain", "uniform_"), ("patch-wise", "")):
        found = [result[prefix + key] for key in ("top1", "agreement", "bit_operations")]
        rows.append((name, f"{found[0]:.2f}", f"{found[1]:.2f}", bops(found[2])))
    title = f"{request.model} on {result['settings']['images']} images"
    print_table(("", "top-1 %", "agrees %", "bit operations"), rows, title=title)
    say(
        f"right in one of the two only: patch-wise {result['only_patchwise_right']}, plain "
        f"{result['only_uniform_right']} images"
    )
    say(f"budget {bops(result['budget'])} bit operations, weights {size(result['weight_bytes'])}")
    if page:
        say(f"page: {page.absolute()}")
    return None
