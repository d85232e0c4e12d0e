"""`qvit bench`: how fast our engines are beside their peers, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    ClassMap,
    Debug,
    Json,
    ModelArgs,
    Pretrained,
    Quiet,
    Weights,
    Workers,
    notifier,
    pairs,
    print_json,
    print_table,
    progress_bar,
    say,
)
from qvit.errors import UsageError


def bench(
    model: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="An artifact's file, or timm's name.")],
    plan: Annotated[
        str | None, typer.Option(help="Preset or plan file for a MODEL. Default: w8a8.", show_default=False)
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at a time. Repeatable. Default: 1.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure this one: qvit (all of ours), qvit-torch, openvino, openvino-int8, ... Repeatable. "
            "Default: all that are installed."
        ),
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Only our engines.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads of every engine. Default: as PyTorch.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often every engine has its turn.")] = 10,
    seconds: Annotated[float, typer.Option(help="Least time of each engine and batch size, over all rounds.")] = 2.0,
    max_seconds: Annotated[float, typer.Option(help="Most time for all measuring; the first round is whole.")] = 300.0,
    weights: Weights = None,
    pretrained: Pretrained = False,
    data: Annotated[
        str | None,
        typer.Option(help="Images to calibrate with and to compare answers on. Default: noise, for speed alone."),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Images to compare answers on.")] = None,
    class_map: ClassMap = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="How many images to calibrate with. Default: 64, or 8 of noise.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many images to compare answers on.")] = 32,
    seed: Annotated[int, typer.Option()] = 0,
    workers: Workers = None,
    model_arg: ModelArgs = None,
    page: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE.html", help="Write a page with the plot, and PAGE.json.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the speed of our engines beside PyTorch, ONNX Runtime and OpenVINO, all in one run on the same threads.

    Engines take turns in rounds; shown are medians, quartiles and ratios of medians. What is not installed is left
    out, and said: pip install "qvit[bench]" brings all of it.

    Examples:
    [cyan]qvit bench deit_tiny_patch16_224 --plan w8a8 --batch 1 --batch 8 --out bench.html[/]

    [cyan]qvit bench model.safetensors --data imagenet/val --threads 2[/]

    [cyan]qvit bench vit_digits --engine qvit --engine openvino-int8 --json[/]
    """
    if page is not None and page.suffix != ".html":
        raise UsageError(f"--out names the page, such as bench.html, not {page}")
    from qvit.runs.bench import BenchRequest
    from qvit.runs.bench import bench as measure

    request = BenchRequest(
        model, plan=plan, batches=tuple(batch or [1]), engines=engine, peers=not no_peers, weights=weights,
        pretrained=pretrained, model_kwargs=pairs(model_arg), data=data, eval_data=eval_data, class_map=class_map,
        calibration_images=calibration_images, images=images, threads=threads, rounds=rounds, seconds=seconds,
        max_seconds=max_seconds, workers=workers or 0, seed=seed,
    )  # fmt: skip
    silent = quiet or as_json
    with progress_bar(hidden=silent) as progress:
        result = measure(request, notify=notifier(silent), progress=progress)
    if page is not None:
        from qvit.files import write_json
        from qvit.report.bench import write_bench_page

        write_json(page.with_suffix(".json"), result)
        write_bench_page(page.with_suffix(".json"), page)
    if as_json:
        return print_json(result)
    _show(result)
    if page is not None:
        say(f"page: {page.absolute()}")
    return None


def _show(result: dict[str, Any]) -> None:
    from qvit.report.bench import doubts

    for batch in dict.fromkeys(row["batch"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        print_table(
            ("engine", "ms", "quartiles", "× openvino int8", "× pytorch fp32", "as float %", "error", "as simulated %"),
            map(_cells, rows),
            title=f"{result['model']}, {result['plan']}, batch {batch}, threads: {result['threads']}",
            whole=True,
            bold=[number for number, row in enumerate(rows) if row["ours"]],
        )
    say("×: time over that of the other, so below 1 is faster. Medians of calls; engines took turns in rounds.")
    for sentence in doubts(result):
        say(sentence)
    for row in {row["engine"]: row for row in result["rows"] if row["ours"]}.values():
        say(f"{row['engine']}: {row['arithmetic']}")
    if result["speed_only"]:
        say(f"speed only, answers mean little: images {result['images']}, float weights {result['float_weights']}")
    for row in result["skipped"]:
        say(f"left out: {row['engine']} {row['precision']}: {row['reason']}")


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["milliseconds_quartiles"]
    cells = [f"{row['engine']} {row['precision']}", f"{row['milliseconds_median']:.2f}", f"{low:.2f}–{high:.2f}"]
    cells += [_or_nothing(row[f"ratio_to_{name}"], "{:.2f}") for name in ("openvino_int8", "pytorch_fp32")]
    cells += [f"{row['top1_agreement']:.1f}", f"{row['error_to_float']:.2g}"]
    return [*cells, _or_nothing(row["agreement_with_simulated"], "{:.1f}")]


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
