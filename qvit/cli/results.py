"""Commands about what was trained: the demonstration, scores on other images, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import (
    Json,
    Quiet,
    bops,
    features_in_words,
    kept_beside,
    notifier,
    print_json,
    print_table,
    progress_bar,
    say,
    size,
    spread,
)
from qvit.cli.options import ClassMap, Device, Workers, command
from qvit.errors import UsageError
from qvit.files import write_json

#: Tokens that a table of features shows; JSON has all.
_WORST_TOKENS = 5


@command("demo", order=1)
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Where runs, results.json and report.html go.")] = Path(
        "demo-output"
    ),
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    processes: Annotated[int | None, typer.Option(help="Runs side by side; by default one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run everything again.")] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Two epochs per run: tries the machinery, the numbers mean nothing.")
    ] = False,
    try_it: Annotated[
        bool,
        typer.Option(help="Also put the models of Q-ViT into the page, to try them there; needs npm the first time."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Train a small ViT on real handwritten digits and compare LSQ+ with Q-ViT at equal bit operations.

    A demo that was stopped resumes where it was.

    Examples:  [cyan]qvit demo --out demo-output[/]    [cyan]qvit demo --seeds 1 --out quick[/]
    """
    from qvit.runs.demo import REPORT, packed_in_words, run_demo, verdict

    results = run_demo(out_dir, seeds=seeds, workers=processes, overwrite=overwrite, short=short, try_it=try_it)
    if as_json:
        return print_json(results)
    of_float = spread(results["float_accuracy_mean"], results["float_accuracy_std"])
    rows = [
        (
            row["method"],
            row["budget"],
            spread(row["accuracy_mean"], row["accuracy_std"]),
            "" if row["train_loss_mean"] is None else f"{row['train_loss_mean']:.3f}",
            bops(row["bit_operations"]),
            size(row["weight_bytes"]),
            len(row["seeds"]),
        )
        for row in results["rows"]
    ]
    print_table(
        ("method", "budget", "accuracy %", "training loss", "bit operations", "weights", "seeds"),
        [("float", "32 bit", of_float, "", "", "", seeds), *rows],
        title="vit_digits on 597 test images, first and last layer counted",
        align="<<>",
    )
    for sentence in [*verdict(results), *packed_in_words(results)]:
        say(sentence)
    say(f"page: {(out_dir / REPORT).absolute()}")


@command("evaluate", order=6)
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run's directory, or a packed model.")],
    data: Annotated[str, typer.Option(help="Images, as for `qvit train`.")],
    class_map: ClassMap,
    device: Device,
    workers: Workers,
    engine: Annotated[
        str | None, typer.Option(help="What runs a packed model: openvino, onnxruntime, torch, reference, native.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that the model sees at a time.")] = 64,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Of a packed model: the size of the images, such as 224x320, to which a position embedding is "
            "resampled. Default: that of the model.",
        ),
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            help="Judge features beside the float model's, without labels: cosine, relative error, nearest neighbours. "
            "Always so for a model without classes.",
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="With features: weights of the float model; a run knows where its own were."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="With features of a packed model: take them from timm's hub.")
    ] = False,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Also write the scores here, as JSON; an interrupted call with --out goes on where it was."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model on images: top-1 and top-5. A run is simulated in float, a packed model runs on integers.

    With --features, or where a model has no classes, its features are judged beside those of the float model.

    Examples:  [cyan]qvit evaluate runs/deit --data imagenet/val --class-map classes.txt --json[/]
    [cyan]qvit evaluate runs/deit/packed.safetensors --data imagenet/val --engine onnxruntime --out scores.json[/]
    [cyan]qvit evaluate runs/dino/packed.safetensors --data photos --weights dinov2-small --features[/]
    """
    if engine is not None and model.is_dir():
        raise UsageError(f"--engine is for packed models: `qvit pack {model}` makes one")
    if pretrained and model.is_dir():
        raise UsageError("--pretrained is for packed models: a run knows its float model")
    if image_size is not None and model.is_dir():
        raise UsageError(f"--image-size is for packed models: `qvit pack {model}` makes one")
    if target is not None and (target.is_dir() or target.resolve() == model.resolve()):
        raise UsageError(f"{target} is {'a folder' if target.is_dir() else 'the model'}: name a file with --out")
    common: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers}
    common |= {"features": features, "weights": weights}
    images = 0

    def begin(count: int) -> None:
        nonlocal images
        images = count

    with kept_beside(target) as partial, progress_bar(hidden=as_json) as show:
        common |= {"start": begin, "progress": lambda done: show("images", done, images), "partial": partial}
        if model.is_file():
            from qvit.models.sizes import parse_size
            from qvit.runs.packed import evaluate_packed

            own = {
                "engine": engine,
                "pretrained": pretrained,
                "image_size": parse_size(image_size) if image_size else None,
            }
            scores = evaluate_packed(model, data, **own, **common)
        else:
            from qvit.runs.finished import evaluate_run

            scores = evaluate_run(model, data, device=device, **common)
        if target is not None:
            write_json(target, scores)
    if as_json:
        return print_json(scores)
    if "cosine" in scores:
        _show_features(scores)
    else:
        say(f"top-1 {scores['top1']:.2f} %   top-5 {scores['top5']:.2f} %   ({scores['images']} images)")
    if "engine" in scores:
        say(f"engine {scores['engine']}: {scores['arithmetic']}")


def _show_features(scores: dict[str, Any]) -> None:
    """The scores of features, and the tokens that are furthest from the float model's."""
    if scores["tokens"] > 1:
        worst = sorted(scores["by_token"], key=lambda row: row["cosine"])[:_WORST_TOKENS]
        print_table(
            ("token", "index", "cosine", "relative error"),
            [(row["name"], row["index"], f"{row['cosine']:.4f}", f"{row['relative_error']:.3g}") for row in worst],
            title=f"the worst of {scores['tokens']} tokens, means over {scores['images']} images",
        )
    say(f"features: {features_in_words(scores)}   ({scores['images']} images)")


@command("report", order=16)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or a demo's directory.")],
    page: Annotated[
        Path | None,
        typer.Option("--out", help="The HTML page. Default: report.html in the run, or in this directory for several."),
    ] = None,
    title: Annotated[str | None, typer.Option()] = None,
    try_it: Annotated[
        bool,
        typer.Option(
            "--try-it",
            help="Also put the packed models into the page, beside the float one: they answer to an image or a drawing "
            "in the browser, by ONNX Runtime Web, which npm fetches once. For models of 32 MB in all.",
        ),
    ] = False,
    runtime: Annotated[
        Path | None,
        typer.Option(help="Folder that has ONNX Runtime Web for --try-it (`dist` of its package); nothing is fetched."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page about a run, or a comparison of several.

    Examples:  [cyan]qvit report runs/qvit[/]    [cyan]qvit report runs/* --out comparison.html[/]
    [cyan]qvit report runs/qvit --try-it[/]
    """
    from qvit.report import display_table, load_runs, results_table, write_page

    if runtime is not None and not try_it:
        raise UsageError("--runtime is for --try-it: give both")
    loaded = load_runs(runs)
    target = page or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    trial = None
    if try_it:
        from qvit.runs.trial import trial_of

        trial = trial_of(loaded, runtime, notifier(quiet or as_json))
    write_page(loaded, target, title=title, trial=trial)
    rows = results_table(loaded)
    if as_json:
        return print_json({"page": str(target.absolute()), "rows": rows})
    print_table(*display_table(rows), align="<")
    say(f"page: {target.absolute()}")
