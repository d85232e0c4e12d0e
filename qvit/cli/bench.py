"""`qvit bench`: how fast our engines are beside their peers, in one run."""

from __future__ import annotations

from collections.abc import Callable
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
            "model plans batches engines peers weights pretrained model_kwargs data eval_data class_map unlabelled "
            "calibration_images images threads rounds seconds max_seconds profile on_bad_image workers seed",
            flags={"plans": ["--plan"], "batches": ["--batch"], "engines": ["--engine"], "profile": ["--profile"]},
        ),
    ],
    page: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE.html", help="Write a page with the plot, and PAGE.json.")
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Measure an engine of ours at pairs of widths, for qvit allocate --unit."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the speed of our engines beside PyTorch, ONNX Runtime and OpenVINO, all in one run on the same threads.

    Engines take turns in rounds; the table shows medians, quartiles and ratios of medians. Engines that are not
    installed are left out and named: pip install "qvit[bench]" installs all of them.

    With --latency-table nothing is compared: one engine of ours (qvit-native, or that of --engine) runs plans of one
    width for weights and one for activations, and the file says what each product takes at each pair of widths.

    Examples:
    [cyan]qvit bench deit_tiny_patch16_224 --plan w8a8 --plan w4a4 --batch 1 --batch 8 --out bench.html[/]

    [cyan]qvit bench model.safetensors --data imagenet/val --threads 2[/]

    [cyan]qvit bench vit_digits --engine qvit --engine openvino-int8 --json[/]

    [cyan]qvit bench deit_tiny_patch16_224 --threads 2 --latency-table latency.json[/]
    """
    if page is not None and page.suffix != ".html":
        raise UsageError(f"--out names the page, such as bench.html, not {page}")
    request = validated(BenchRequest, given)
    silent = quiet or as_json
    if latency_table is not None:
        if page is not None:
            raise UsageError("--latency-table has no page: leave --out out")
        return _latency(request, latency_table, silent, as_json)
    from qvit.runs.bench import bench as measure

    with progress_bar(hidden=silent) as progress:
        result = measure(request, notify=notifier(silent), progress=progress)
    if page is not None:
        from qvit.files import write_json
        from qvit.report.bench import write_bench_page

        write_json(page.with_suffix(".json"), result)
        write_bench_page(page.with_suffix(".json"), page)
    if as_json:
        return print_json(result)
    _show(result, profile=request.profile)
    if page is not None:
        say(f"page: {page.absolute()}")
    return None


def _show(result: dict[str, Any], *, profile: bool) -> None:
    from qvit.report.bench import as_float, as_simulated, doubts, has_features, name_of, right_peer

    judged = any(row["right"] is not None for row in result["rows"])
    for batch in dict.fromkeys(row["batch"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        percent = "" if has_features(result) else " %"
        columns = {name: cell for name, cell in _COLUMNS.items() if judged or name != _RIGHT}
        columns |= {f"as float{percent}": as_float, "error": _error, f"as simulated{percent}": as_simulated}
        print_table(
            ("engine", *columns),
            [[name_of(row), *(cell(row) for cell in columns.values())] for row in rows],
            title=f"{result['model']}, batch {batch}, threads: {result['threads']}",
            whole=True,
            wide=True,
            bold=[number for number, row in enumerate(rows) if row["ours"]],
        )
        if judged:
            peer = right_peer(rows)
            found = "none" if peer is None else f"{name_of(peer)}, {peer['milliseconds_median']:.2f} ms"
            say(f"fastest right peer at batch {batch}: {found}")
    say("×: time over that of the other, so below 1 is faster. Medians of calls; engines took turns in rounds.")
    if judged:
        images = f"{result['compared_images']} images; wrong: one with"
        if has_features(result):
            least = f"a mean cosine of at least {result['right_cosine']:g} with the float features of {images} less"
        else:
            least = f"at least {result['right_percent']:g} % of the float model's answers to {images} fewer"
        say(f"right: a peer with {least}")
    for sentence in doubts(result):
        say(sentence)
    if profile:
        _show_kernels(result)
    plans: dict[tuple[str, str], dict[str, None]] = {}
    for row in result["rows"]:
        if row["ours"]:
            plans.setdefault((row["engine"], row["arithmetic"]), {})[row["plan"]] = None
    several = len({row["plan"] for row in result["rows"] if row["ours"]}) > 1
    for (engine, arithmetic), own in plans.items():
        say(f"{engine}{' ' * several}{', '.join(own) * several}: {arithmetic}")
    if result["speed_only"]:
        say(f"speed only, answers mean little: images {result['images']}, float weights {result['float_weights']}")
    for row in result["skipped"]:
        say(f"left out: {name_of(row)}: {row['reason']}")


def _latency(request: BenchRequest, file: Path, silent: bool, as_json: bool) -> None:
    from qvit.allocate.latency import widths_of
    from qvit.files import write_json
    from qvit.locks import writing_file
    from qvit.report.units import significant
    from qvit.runs.latency import latency_table

    with writing_file(file), progress_bar(hidden=silent) as progress:
        table = latency_table(request, notify=notifier(silent), progress=progress)
        write_json(file, table)
    if as_json:
        return print_json(table)
    rows = sorted(table["plans"], key=lambda row: row["milliseconds"])
    print_table(
        ("plan", "ms", "quartiles", "ms by products"),
        [
            (
                row["plan"],
                significant(row["milliseconds"], 3),
                "–".join(significant(value, 3) for value in row["milliseconds_quartiles"]),
                significant(row["predicted_milliseconds"], 3),
            )
            for row in rows
        ],
        title=f"{table['model']}, {table['engine']}, batch {table['batch']}, threads: {table['threads']}",
        whole=True,
    )
    how = {
        "profile": "the engine's own account of its kernels",
        "macs": "MACs, as the engine has no account of its kernels",
    }
    say(f"divided over {len(table['products'])} products by {how[table['divided_by']]}")
    say(f"ms by products: their sum; it differs from the measured time by {100 * table['largest_error']:.0f} % at most")
    widest = max(rows, key=lambda row: sum(widths_of(row["precision"])))
    if widest["milliseconds_quartiles"][0] <= rows[0]["milliseconds_quartiles"][1]:
        say(
            f"no plan is faster than {widest['plan']} by more than the times scatter: fewer bits save memory here, "
            "not time"
        )
    for row in table["skipped"]:
        say(f"left out: {row['plan']}: {row['reason']}")
    say(f"table: {file.absolute()}   (`qvit allocate SENSITIVITY.json --unit {file} --budget 90% --out plan.json`)")
    return None


def _show_kernels(result: dict[str, Any]) -> None:
    from qvit.report.bench import kernel_text, name_of

    rows = [row for row in result["rows"] if row["kernels"]]
    if not rows:
        say("no engine of these tells where its time goes")
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        kinds = dict.fromkeys(kind for row in own for kind in row["kernels"])
        print_table(
            ("kernel", *map(name_of, own)),
            [[kind, *(kernel_text(row["kernels"], kind) for row in own)] for kind in kinds],
            title=f"ms by kind of kernel (share), batch {batch}",
            whole=True,
            wide=True,
        )


def _ratio(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row[key] is None else f"{row[key]:.2f}"


def _error(row: dict[str, Any]) -> str:
    return f"{row['error_to_float']:.2g}"


_RIGHT = "× right peer"
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms": lambda row: f"{row['milliseconds_median']:.2f}",
    "quartiles": lambda row: "–".join(f"{value:.2f}" for value in row["milliseconds_quartiles"]),
    _RIGHT: _ratio("ratio_to_right_peer"),
    "× openvino int8": _ratio("ratio_to_openvino_int8"),
    "× pytorch fp32": _ratio("ratio_to_pytorch_fp32"),
}
