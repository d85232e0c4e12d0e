"""Writes the tables of README.md and of the documentation from the files in benchmarks/results, not by hand.

A table stands between two markers, `<!-- results:NAME:begin -->` and `<!-- results:NAME:end -->`:

    demo          demo.json           what `qvit demo` measured: its results.json with command, date, hardware, versions
    train_step    train_step*.json    what `benchmarks/train_step.py` measured, one table per file
    ptq           ptq.json            what `benchmarks/ptq.py` measured
    patchwise     patchwise*.json     what `benchmarks/patchwise.py` measured, one table per budget
    sensitivity   sensitivity.json    what `benchmarks/sensitivity.py` measured: search times and rank correlations

    python benchmarks/render.py                       writes the tables
    python benchmarks/render.py --check               writes nothing; exit code 1 if a table is out of date
    python benchmarks/render.py --demo demo-output    first takes a demo's results over into demo.json

Where a file is missing, "Not measured yet" and the command to measure it stand in the table's place.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/results.md", "docs/patchwise.md")
_BLOCK = re.compile(r"<!-- results:(\w+):begin -->\n(.*?)<!-- results:(\w+):end -->", re.DOTALL)
_MARKER = re.compile(r"<!-- results:\w+:(?:begin|end) -->")


class RenderError(Exception):
    """A file that cannot be rendered, or a document with broken markers."""


def demo_tables(results: Path) -> str:
    """Accuracy of the demo's methods at equal bit operations."""
    file = results / "demo.json"
    if not file.is_file():
        return "Not measured yet: `make demo`, then `python benchmarks/render.py --demo demo-output`."
    data = _read(file)
    try:
        unit, factor = _unit([row["bit_operations"] for row in data["rows"]], (("G", 1e9), ("M", 1e6)), 1e8)
        seeds = sorted({seed for row in data["rows"] for seed in row["seeds"]})
        rows = [
            [
                "float",
                "32 bit",
                _spread(data["float_accuracy_mean"], data["float_accuracy_std"], len(seeds)),
                "",
                "",
                "",
            ]
        ]
        rows += [
            [
                row["method"],
                row["budget"],
                _spread(row["accuracy_mean"], row["accuracy_std"], len(row["seeds"])),
                f"{row['train_loss_mean']:.3f}" if row.get("train_loss_mean") else "",
                f"{row['bit_operations'] / factor:.3f}",
                f"{row['weight_bytes'] / 1e3:.1f}",
            ]
            for row in data["rows"]
        ]
        header = [
            "method",
            "budget",
            "accuracy (%)",
            "training loss",
            f"bit operations ({unit})",
            "weights (kB, packed)",
        ]
        spread = "Mean ± standard deviation over seeds" if len(seeds) > 1 else "Seed"
        note = "Training loss: cross-entropy with the float model's soft labels, mean of the last five epochs."
        over = f"{note} {spread} {', '.join(map(str, seeds))}."
        took = f" All runs together took {data['seconds'] / 60:.1f} minutes." if data.get("seconds") else ""
        return "\n\n".join([_table(header, rows, left=2), " ".join(_verdict(data)), f"{over} {_origin(data)}{took}"])
    except (KeyError, TypeError, ValueError) as error:
        raise RenderError(f"{file} is not what a demo writes: {type(error).__name__} {error}") from None


def train_step_tables(results: Path) -> str:
    """Time and memory of a training step over the float step, a table for each file."""
    files = sorted(results.glob("train_step*.json"))
    if not files:
        return "Not measured yet: `python benchmarks/train_step.py`."
    parts = []
    for file in files:
        data = _read(file)
        try:
            rows = [
                [
                    row["method"],
                    f"{row['milliseconds']:.1f}",
                    f"{row['time_ratio']:.2f}",
                    f"{row['memory_mib']:.0f}",
                    f"{row['memory_ratio']:.2f}",
                ]
                for row in data["rows"]
            ]
            header = ["method", "time (ms)", "time / float", "memory (MiB)", "memory / float"]
            kinds = dict.fromkeys(f"{row['precision']}, {row['mode']}" for row in data["rows"])
            title = f"`{data['model']}`, batch {data['batch']}, {'; '.join(kinds)}:"
            parts += [title, _table(header, rows, left=1), _origin(data)]
        except (KeyError, TypeError, ValueError) as error:
            raise RenderError(f"{file} is not what the benchmark writes: {type(error).__name__} {error}") from None
    return "\n\n".join(parts)


def ptq_tables(results: Path) -> str:
    """Accuracy after training, plain and reconstructed."""
    file = results / "ptq.json"
    if not file.is_file():
        return "Not measured yet: `python benchmarks/ptq.py`, see its `--help`."
    data = _read(file)
    try:
        rows = []
        for row in data["rows"]:
            quantized, recon = "bit_operations" in row, row.get("reconstruction")
            rows.append(
                [
                    row["budget"] + (f", {row['metric']}" if row.get("metric") else ""),
                    "{steps} × {batch_size} of {images} images".format(**recon) if recon else "",
                    f"{row['top1']:.1f}",
                    f"{row['agreement']:.1f}",
                    f"{row['bit_operations'] / 1e9:.3f}" if quantized else "",
                    f"{sum(row['seconds'].values()):.0f}" if quantized else "",
                ]
            )
        header = ["budget", "reconstruction", "top-1 (%)", "same answer as float (%)", "bit operations (G)", "time (s)"]
        images = next(row["images"] for row in data["rows"] if "images" in row)
        note = f"{data['model']} on {images} images of {data['eval_data']}; calibrated on {data['calibration_images']} "
        note += f"images of {data['data']}. Reconstruction: steps × images per step, for each block. "
        note += f"Time is without scoring, threads: {data['threads']}."
        return "\n\n".join([_table(header, rows, left=2), f"{note} {_origin(data)}"])
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise RenderError(f"{file} is not what the benchmark writes: {type(error).__name__} {error}") from None


def ptq_peer_tables(results: Path) -> str:
    """The 8-bit quantization of deployment tools, beside the row of `qvit ptq` at w8a8."""
    file = results / "ptq_peers.json"
    if not file.is_file():
        return "Not measured yet: `python benchmarks/ptq_peers.py`, see its `--help`."
    data, own = _read(file), _read(results / "ptq.json")
    try:
        ours = next(row for row in own["rows"] if row["budget"] == "w8a8")
        same = all(own[key] == data[key] for key in ("weights", "data", "eval_data", "calibration_images", "seed"))
        if not same or ours["images"] != data["rows"][0]["images"]:
            raise ValueError("ptq.json is about other images")
        rows = [["qvit ptq, w8a8", f"{ours['top1']:.1f}", f"{ours['agreement']:.1f}"]]
        rows += [[row["engine"], f"{row['top1']:.1f}", f"{row['agreement']:.1f}"] for row in data["rows"]]
        table = _table(["8 bits", "top-1 (%)", "same answer as float (%)"], rows, left=1)
        note = f"The same weights, calibration images and {ours['images']} scored images; "
        note += f"float {data['rows'][0]['top1_float']:.1f} %."
        return "\n\n".join([table, f"{note} {_origin(data)}"])
    except (KeyError, TypeError, ValueError, StopIteration, IndexError) as error:
        raise RenderError(f"{file} is not what the benchmark writes: {type(error).__name__} {error}") from None


def patchwise_tables(results: Path) -> str:
    """Patch-wise plans beside the uniform one, a table for each budget of each file."""
    files = sorted(results.glob("patchwise*.json"))
    if not files:
        return "Not measured yet: `python benchmarks/patchwise.py --data DIR`."
    return "\n\n".join(_patchwise_file(file) for file in files)


def _patchwise_file(file: Path) -> str:
    data = _read(file)
    try:
        parts = [
            f"{data['model']}, {data['images']} images, {data['calibration_images']} calibration images, "
            f"{data['score_images']} images to choose splits by, seed {data['seed']}; float {data['top1_float']:.2f} %."
        ]
        for one in data["budgets"]:
            rows = [
                [
                    row["variant"],
                    f"{row['top1']:.2f}",
                    f"{row['agreement']:.1f}",
                    f"{row['only_this_right']} / {row['only_uniform_right']}",
                    f"{row['p_value']:.2g}",
                    f"{row['divergence_on_training_images']:.4f}",
                    f"{row['bit_operations'] / 1e9:.3f}",
                ]
                for row in one["variants"]
            ]
            header = ["variant", "top-1 (%)", "agrees with float (%)", "only this / only uniform right", "p-value"]
            header += ["KL on training images", "bit operations (G)"]
            parts += [f"Budget `{one['budget']}`:", _table(header, rows, left=1), _patchwise_verdict(one)]
        return "\n\n".join(
            [*parts, f"{_origin(data)} It took {data['cpu_seconds'] / 60:.1f} minutes of processor time."]
        )
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise RenderError(f"{file} is not what the benchmark writes: {type(error).__name__} {error}") from None


def _patchwise_verdict(one: dict[str, Any]) -> str:
    """What the variant that training images choose gains on the judged ones."""
    uniform, chosen = (next(r for r in one["variants"] if r["variant"] == v) for v in ("uniform", one["chosen"]))
    controls = {
        "random": "the split of `same` with patches ranked by chance",
        "reversed": "the same with the least attended patches first",
        "class": "8 bits for the class token alone, all patches plain",
    }
    named = [f"`{row['variant']}`: {controls[row['variant']]}" for row in one["variants"] if row["variant"] in controls]
    if named:
        return f"Controls. {'; '.join(named)}."
    if chosen is uniform:
        return "Training images choose the uniform plan: no split diverges less from the float model on them."
    gain = chosen["top1"] - uniform["top1"]
    relation = "above" if gain > 0 else "below"
    amount = f"{abs(gain):.2f} points {relation}" if round(abs(gain), 2) else "level with"
    return f"Training images choose `{chosen['variant']}`, which is {amount} uniform (p = {chosen['p_value']:.2g})."


def sensitivity_tables(results: Path) -> str:
    """Search times, and how predictions of single sites agree with measurements."""
    file = results / "sensitivity.json"
    if not file.is_file():
        return "Not measured yet: `QVIT_DATA=FOLDER python benchmarks/sensitivity.py`."
    data = _read(file)
    try:
        fisher, exhaustive = data["searches"]["fisher"], data["exhaustive_kl"]
        search = (
            f"`fisher` for all {exhaustive['heads']} heads and tensors of {data['model']} at {len(fisher['widths'])} "
            f"widths, from {fisher['images']} images: {fisher['seconds']:.0f} s "
            f"({fisher['processor_seconds']:.0f} s of processor time). The exact plan for the 4-bit budget from it: "
            f"{fisher['seconds_of_exact_allocation_at_4bit']:.1f} s. "
            f"One at a time by `kl`, the same takes {exhaustive['passes_of_all']} passes over the images, about "
            f"{exhaustive['seconds_of_all_extrapolated'] / 3600:.1f} hours: extrapolated by number from "
            f"{exhaustive['passes_measured']} passes over {exhaustive['images_measured']} images in "
            f"{exhaustive['seconds_measured']:.0f} s."
        )
        agreements = data["agreement"]
        widths = list(dict.fromkeys(width for own in agreements.values() for width in own["spearman_by_width"]))
        rows = [
            [name.replace("_", " "), f"{own['spearman']:.3f}"]
            + [f"{own['spearman_by_width'][width]:.3f}" for width in widths]
            + [f"{own['median_ratio_by_width'][width]:.2f}" for width in (widths[0], widths[-1])]
            for name, own in agreements.items()
        ]
        header = ["prediction", "all", *(f"{width} bit" for width in widths)]
        header += [f"ratio, {width} bit" for width in (widths[0], widths[-1])]
        note = (
            f"Spearman's rank correlation with the measured divergence of {exhaustive['heads_measured']} heads and "
            f"tensors drawn at random, in all and by width, and the median of predicted over measured."
        )
        return "\n\n".join([search, _table(header, rows, left=1), f"{note} {_origin(data)}"])
    except (KeyError, TypeError, ValueError) as error:
        raise RenderError(f"{file} is not what the benchmark writes: {type(error).__name__} {error}") from None


TABLES: dict[str, Callable[[Path], str]] = {
    "demo": demo_tables,
    "train_step": train_step_tables,
    "ptq": ptq_tables,
    "ptq_peers": ptq_peer_tables,
    "patchwise": patchwise_tables,
    "sensitivity": sensitivity_tables,
}


def fill(text: str, results: Path) -> str:
    """`text` with every marked section written anew. Raises RenderError for unknown, unpaired or missing markers."""

    def write(match: re.Match[str]) -> str:
        name, end = match[1], match[3]
        if name != end or name not in TABLES or _MARKER.search(match[2]):
            raise RenderError(f"the section 'results:{name}' ends as '{end}', or is none of {', '.join(TABLES)}")
        return f"<!-- results:{name}:begin -->\n\n{TABLES[name](results)}\n\n<!-- results:{name}:end -->"

    filled, sections = _BLOCK.subn(write, text)
    if sections == 0 or len(_MARKER.findall(text)) != 2 * sections:
        raise RenderError("markers of a section are missing or come singly")
    return filled


def take_over(demo: Path, results: Path) -> Path:
    """Writes demo.json from a demo's directory; command, date, hardware and versions are those its runs recorded."""
    data = _read(demo / "results.json")
    configs = [_read(file) for file in sorted(demo.glob("runs/*/config.json"))]
    if not configs:
        raise RenderError(f"{demo} has no runs: give the directory that `qvit demo --out` was told to write to")
    try:
        versions = {json.dumps(config["versions"]) for config in configs}
        hardware = dict.fromkeys(config["hardware"] for config in configs)
        if len(versions) > 1:
            raise RenderError(f"the runs in {demo} were made with different versions: run the demo anew (--overwrite)")
        last = max(configs, key=lambda config: config["started"])
        data |= {
            "command": shlex.join(last["command"]),
            "date": last["started"][:10],
            "hardware": "; ".join(hardware),
            "versions": last["versions"],
        }
    except (KeyError, TypeError) as error:
        raise RenderError(f"a config.json in {demo} lacks {error}") from None
    target = results / "demo.json"
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    parser.add_argument("--demo", type=Path, metavar="DIR", help="take the results of this demo over first")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.demo and not options.check:
            take_over(options.demo, options.results)
        stale = []
        for name in DOCUMENTS:
            document = options.root / name
            before = document.read_text(encoding="utf-8")
            try:
                after = fill(before, options.results)
            except RenderError as error:
                raise RenderError(f"{name}: {error}") from None
            if after != before:
                stale.append(name)
                if not options.check:
                    document.write_text(after, encoding="utf-8")
    except (RenderError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.check and stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run `python benchmarks/render.py`\n")
        return 1
    return 0


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RenderError(f"cannot read {file}: {error}") from None
    if not isinstance(data, dict):
        raise RenderError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return data


def _origin(data: dict[str, Any]) -> str:
    """Where a measurement comes from, in a sentence."""
    seeds = f", seeds {', '.join(map(str, data['seeds']))}" if data.get("seeds") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (data.get("versions") or {}).items())
    where = f"{data['hardware']}{seeds}, {data['date']}" + (f" ({versions})" if versions else "")
    return f"Measured with `{data['command'].strip()}` on {where}."


def _verdict(data: dict[str, Any]) -> list[str]:
    """A sentence for each budget that compares Q-ViT with LSQ+, from the numbers alone."""
    sentences = []
    for budget in dict.fromkeys(row["budget"] for row in data["rows"]):
        pair = {row["method"]: row for row in data["rows"] if row["budget"] == budget}
        if not {"lsq+", "qvit"} <= pair.keys():
            continue
        gain = pair["qvit"]["accuracy_mean"] - pair["lsq+"]["accuracy_mean"]
        relation = "above" if gain > 0 else "below"
        amount = f"{abs(gain):.2f} points {relation}" if round(abs(gain), 2) else "level with"
        if min(len(row["seeds"]) for row in pair.values()) < 2:
            certainty = "from one seed, which says nothing about the deviation"
        else:
            deviation = max(row["accuracy_std"] for row in pair.values())
            within = "more than" if abs(gain) > deviation else "within"
            certainty = f"{within} the larger standard deviation over seeds ({deviation:.2f})"
        sentences.append(f"At the budget {budget}, `qvit` is {amount} `lsq+`, {certainty}.")
    return sentences


def _spread(mean: float, deviation: float, seeds: int) -> str:
    return f"{mean:.2f} ± {deviation:.2f}" if seeds > 1 else f"{mean:.2f}"


def _unit(values: Sequence[float], units: Sequence[tuple[str, float]], threshold: float) -> tuple[str, float]:
    """The first unit if a value reaches the threshold, else the second."""
    return units[0] if max(values) >= threshold else units[1]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A markdown table; the first `left` columns are text, the others numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


if __name__ == "__main__":
    sys.exit(main())
