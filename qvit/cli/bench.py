"""`qvit bench`: how fast our engines are beside their peers, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import Json, Quiet, notifier, print_json, print_table, progress_bar, say
from qvit.cli.options import Fields, Given, command
from qvit.errors import UsageError
from qvit.runs.requests import BenchRequest
from qvit.training.config import validated


@command("bench", order=14)
def bench(
    given: Annotated[
        Given,
        Fields(
            BenchRequest,
            "model plan batches engines peers weights pretrained model_kwargs data eval_data class_map unlabelled "
            "calibration_images images threads rounds seconds max_seconds on_bad_image workers seed",
            flags={"batches": ["--batch"], "engines": ["--engine"]},
        ),
    ],
    page: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE.html", help="Write a page with the plot, and PAGE.json.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the speed of our engines beside PyTorch, ONNX Runtime and OpenVINO, all in one run on the same threads.

    Engines take turns in rounds; the table shows medians, quartiles and ratios of medians. Engines that are not
    installed are left out and named: pip install "qvit[bench]" installs all of them.

    Examples:
    [cyan]qvit bench deit_tiny_patch16_224 --plan w8a8 --batch 1 --batch 8 --out bench.html[/]

    [cyan]qvit bench model.safetensors --data imagenet/val --threads 2[/]

    [cyan]qvit bench vit_digits --engine qvit --engine openvino-int8 --json[/]
    """
    if page is not None and page.suffix != ".html":
        raise UsageError(f"--out names the page, such as bench.html, not {page}")
    from qvit.runs.bench import bench as measure

    request = validated(BenchRequest, given)
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
