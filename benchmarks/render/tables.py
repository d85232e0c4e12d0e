"""The tables of the documentation: one function for each kind of file in benchmarks/results, text out.

    demo          demo.json           what `qvit demo` measured: its results.json with command, date, hardware, versions
    train_step    train_step*.json    what `benchmarks/measure/train_step.py` measured, one table per file
    ptq           ptq.json            what `benchmarks/measure/ptq.py` measured
    ptq_halves    ptq_halves.json     what `benchmarks/measure/ptq_halves.py` measured
    ptq_peers     ptq_peers.json      what `benchmarks/measure/ptq_peers.py` measured
    patchwise     patchwise*.json     what `benchmarks/measure/patchwise.py` measured, one table per budget
    sensitivity   sensitivity.json    what `benchmarks/measure/sensitivity.py` measured: search times, correlations
    solvers       solvers.json        what `benchmarks/measure/solvers.py` measured: greedy descent against the program
    nested        nested.json         what `benchmarks/measure/nested.py` measured: 4-bit channels in an 8-bit model
    two_bits      two_bits*.json      what `benchmarks/measure/two_bits.py` measured, one table per file
    steps         steps*.json         what `benchmarks/measure/steps.py` measured, one table per file
    regularizer   regularizer.json    what `benchmarks/measure/regularizer.py` measured
    labels        labels.json         what `benchmarks/measure/labels.py` measured
    deploy        deploy.json         what `benchmarks/measure/deploy.py` measured: a table per model and batch size
    packed        packed.json         what `benchmarks/measure/packed.py` measured: sizes, and agreement of every engine
    model_table   model_table.json    what `benchmarks/measure/model_table.py` tried: every step, every kind of model

Those of bits_ms*.json, evidence_*.json and fragile.json are in `bits.py`, `evidence_tables.py` and
`evidence_fragile.py`. Where a file is missing, "Not measured yet" and the command to measure it stand in the table's
place.
"""

from __future__ import annotations

import re
import statistics
from typing import Any

from rendering import kinds_of, origin, spread, table, table_of, unit


@table_of("demo.json", "`make demo`, then `python benchmarks/render --demo demo-output`")
def demo_tables(data: dict[str, Any]) -> str:
    """Accuracy of the demo's methods at equal bit operations."""
    prefix, factor = unit([row["bit_operations"] for row in data["rows"]], (("G", 1e9), ("M", 1e6)), 1e8)
    seeds = sorted({seed for row in data["rows"] for seed in row["seeds"]})
    rows = [
        [
            "float",
            "32 bit",
            spread(data["float_accuracy_mean"], data["float_accuracy_std"], len(seeds)),
            "",
            "",
            "",
        ]
    ]
    rows += [
        [
            row["method"],
            row["budget"],
            spread(row["accuracy_mean"], row["accuracy_std"], len(row["seeds"])),
            f"{row['train_loss_mean']:.3f}" if row.get("train_loss_mean") else "",
            f"{row['bit_operations'] / factor:.3f}",
            f"{row['weight_bytes'] / 1e3:.1f}",
            *_packed_cells(data, row),
        ]
        for row in data["rows"]
    ]
    header = [
        "method",
        "budget",
        "accuracy (%)",
        "training loss",
        f"bit operations ({prefix})",
        "weights (kB, packed)",
    ]
    if "packed" in data:
        header += ["file (kB)", "on integers (%)", "equal answers (%)"]
        rows[0] += [f"{statistics.mean(row['float_bytes'] for row in data['packed']) / 1e3:.1f}", "", ""]
    seed_word = "Mean ± standard deviation over seeds" if len(seeds) > 1 else "Seed"
    note = "Training loss: cross-entropy with the float model's soft labels, mean of the last five epochs."
    over = f"{note} {seed_word} {', '.join(map(str, seeds))}."
    took = f" All runs together took {data['seconds'] / 60:.1f} minutes." if data.get("seconds") else ""
    return "\n\n".join([table(header, rows, left=2), " ".join(_verdict(data)), f"{over} {origin(data)}{took}"])


def _packed_cells(data: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """True bytes of the files of a row, accuracy of the integer engine, agreement with the simulated model: means."""
    own = [p for p in data.get("packed", []) if (p["method"], p["budget"]) == (row["method"], row["budget"])]
    if not own:
        return []
    size, top1, equal = (statistics.mean(p[key] for p in own) for key in ("file_bytes", "top1", "agreement"))
    return [f"{size / 1e3:.1f}", f"{top1:.2f}", f"{equal:.2f}"]


@table_of("train_step*.json", "`python benchmarks/measure/train_step.py`")
def train_step_tables(data: dict[str, Any]) -> str:
    """Time and memory of a training step over the float step, a table for each precision and mode of a file.

    Columns are repeated for each kind of processor.
    """
    parts = []
    for precision, mode in dict.fromkeys((row["precision"], row["mode"]) for row in data["rows"]):
        kinds = {
            kind: {row["method"]: row for row in rows if (row["precision"], row["mode"]) == (precision, mode)}
            for kind, rows in kinds_of(data).items()
        }
        kinds = {kind: rows for kind, rows in kinds.items() if rows}
        columns = ("time (ms)", "time / float", "memory (MiB)", "memory / float")
        header = [column + (f", {kind}" if kind else "") for kind in kinds for column in columns]
        methods = dict.fromkeys(method for rows in kinds.values() for method in rows)
        cells = [[method, *(cell for rows in kinds.values() for cell in _step(rows.get(method)))] for method in methods]
        title = f"`{data['model']}`, batch {data['batch']}, {precision}, {mode}:"
        parts += [title, table(["method", *header], cells, left=1)]
    selected = "AVX2" in kinds_of(data) and "avx512f" in (data.get("instructions") or ())
    note = "AVX2 was selected on a processor that has AVX-512, too. " if selected else ""
    return "\n\n".join([*parts, note + origin(data)])


def _step(row: dict[str, Any] | None) -> list[str]:
    """Time and memory of a step; a row that a kind of processor does not have is empty."""
    if row is None:
        return [""] * 4
    return [
        f"{row['milliseconds']:.1f}",
        f"{row['time_ratio']:.2f}",
        f"{row['memory_mib']:.0f}",
        f"{row['memory_ratio']:.2f}",
    ]


@table_of("ptq.json", "`python benchmarks/measure/ptq.py`, see its `--help`")
def ptq_tables(data: dict[str, Any]) -> str:
    """Accuracy after training, plain and reconstructed."""
    rows = []
    for row in data["rows"]:
        quantized, recon = "bit_operations" in row, row.get("reconstruction")
        seconds = sum(took for stage, took in row.get("seconds", {}).items() if stage not in ("evaluate", "total"))
        rows.append(
            [
                row["budget"] + (f", {row['metric']}" if row.get("metric") else ""),
                "{steps} × {batch_size} of {images} images".format(**recon) if recon else "",
                f"{row['top1']:.1f}",
                f"{row['agreement']:.1f}",
                f"{row['bit_operations'] / 1e9:.3f}" if quantized else "",
                f"{seconds:.0f}" if quantized else "",
            ]
        )
    header = ["budget", "reconstruction", "top-1 (%)", "same answer as float (%)", "bit operations (G)", "time (s)"]
    images = next(row["images"] for row in data["rows"] if "images" in row)
    note = f"{data['model']} on {images} images of {data['eval_data']}; calibrated on {data['calibration_images']} "
    note += f"images of {data['data']}. Reconstruction: steps × images per step, for each block. "
    note += f"Time is without scoring, threads: {data['threads']}{data.get('times', '')}."
    return "\n\n".join([table(header, rows, left=2), f"{note} {origin(data)}"])


@table_of("ptq_halves.json", "`python benchmarks/measure/ptq_halves.py`, see its `--help`")
def ptq_halves_tables(data: dict[str, Any]) -> str:
    """Accuracy after training, calibrated on one half of some images and judged on the other."""
    rows = []
    for row in data["rows"]:
        recon = row["reconstruction"]
        about = "{steps} × {batch_size} of {images} images".format(**recon) if recon else ""
        each = " / ".join(f"{way['top1_float'] - way['top1']:.1f}" for way in row["ways"])
        numbers = (row["top1_float"], row["top1"], row["drop"])
        cells = [f"{number:.1f}" for number in numbers] + [each, f"{row['agreement']:.1f}"]
        rows.append([row["plan"], row["effort"] or "", about, *cells, f"{row['processor_seconds']:.0f}"])
    header = ["plan", "effort", "reconstruction", "float (%)", "top-1 (%)", "loss", "each way", "same answer (%)"]
    cells = table([*header, "processor time (s)"], rows, left=3)
    note = f"{data['model']} on {data['images']}, cut into two halves by class (seed {data['split_seed']}): calibrated "
    note += f"on {data['calibration_images']} images of one, judged on the other. Means of both ways; "
    note += "a row with one number in `each way` was measured one way alone. Processor time is that of all threads, "
    note += "scoring included. "
    return "\n\n".join([cells, f"{note}{origin(data)}"])


@table_of("ptq_peers.json", "`python benchmarks/measure/ptq_peers.py`, see its `--help`")
def ptq_peers_tables(data: dict[str, Any]) -> str:
    """The 8-bit quantization of deployment tools, beside our own."""
    rows = [[row["engine"], f"{row['top1']:.1f}", f"{row['agreement']:.1f}"] for row in data["rows"]]
    cells = table(["8 bits", "top-1 (%)", "same answer as float (%)"], rows, left=1)
    note = f"The same weights, calibration images and {data['rows'][0]['images']} scored images; "
    note += f"float {data['rows'][0]['top1_float']:.1f} %."
    return "\n\n".join([cells, f"{note} {origin(data)}"])


@table_of("patchwise*.json", "`python benchmarks/measure/patchwise.py --data DIR`")
def patchwise_tables(data: dict[str, Any]) -> str:
    """Patch-wise plans beside the uniform one, a table for each budget of each file."""
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
        parts += [f"Budget `{one['budget']}`:", table(header, rows, left=1), _patchwise_verdict(one)]
    return "\n\n".join([*parts, f"{origin(data)} It took {data['cpu_seconds'] / 60:.1f} minutes of processor time."])


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


@table_of("two_bits*.json", "`python benchmarks/measure/two_bits.py --help`")
def two_bits_tables(data: dict[str, Any]) -> str:
    """Parts of VVTQ and its rivals, a table for each file."""
    rows = []
    for row in data["rows"]:
        seeds = len(row["seeds"])
        rows.append(
            [
                row["budget"],
                row["row"],
                "soft" if row["soft_labels"] else "hard",
                spread(row["accuracy_mean"], row["accuracy_std"], seeds),
                f"{row['oscillating_middle_mean']:.1f}",
                f"{row['oscillating_end_mean']:.1f}",
            ]
        )
    first = data["rows"][0]
    floats, teachers = (values for values in (first["float_accuracies"], data["teacher_accuracies"]))
    header = ["budget", "method", "labels", "top-1 (%)", "oscillating, middle (%)", "at the end (%)"]
    note = (
        f"`{data['set']}`: {data['train_images']} training and {first['images']} test images; float "
        f"{sum(floats) / len(floats):.2f} %, teacher {sum(teachers) / len(teachers):.2f} %. Mean ± standard "
        f"deviation over seeds {', '.join(map(str, first['seeds']))}. Oscillating: share of the blocks' weights in "
        "the middle of the training and at its end."
    )
    return "\n\n".join([table(header, rows, left=3), f"{note} {origin(data)}"])


@table_of("steps*.json", "`python benchmarks/measure/steps.py --help`")
def steps_tables(data: dict[str, Any]) -> str:
    """Chains of runs at fewer and fewer bits beside direct training, a table for each file."""
    rows = []
    for row in data["rows"]:
        seeds = len(row["seeds"])
        chained = len(row["steps"]) > 1
        rows.append(
            [
                row["widths"],
                ", ".join(row["steps"]) if chained else "direct",
                spread(row["accuracy_mean"], row["accuracy_std"], seeds),
                spread(row["above_direct_mean"], row["above_direct_std"], seeds) if chained else "",
            ]
        )
    first = data["rows"][0]
    floats = first["float_accuracies"]
    header = ["widths", "steps", "top-1 (%)", "above direct (points)"]
    note = (
        f"`{data['set']}`, `{data['method']}`, soft labels alone, {first['epochs']} epochs in all: {first['images']} "
        f"test images, float {sum(floats) / len(floats):.2f} %. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, first['seeds']))}, of the difference seed by seed."
    )
    return "\n\n".join([table(header, rows, left=2), f"{note} {origin(data)}"])


@table_of("regularizer.json", "`python benchmarks/measure/regularizer.py`")
def regularizer_tables(data: dict[str, Any]) -> str:
    """Shares of a training step that the remedies against oscillation and the diagnostics take."""
    rows = [
        [name, f"{data['milliseconds'][name]:.0f}", *(f"{100 * own[step]:.1f}" for step in ("float", "lsq+"))]
        for name, own in data["share_of_step"].items()
    ]
    header = ["part", "time (ms)", "of a float step (%)", "of an lsq+ step (%)"]
    note = f"{data['model']}, batch {data['batch']}, {data['bits']} bits; a float step takes "
    note += f"{data['milliseconds']['float']:.0f} ms here, an lsq+ step {data['milliseconds']['lsq+']:.0f} ms."
    return "\n\n".join([table(header, rows, left=1), f"{note} {origin(data)}"])


@table_of("labels.json", "`python benchmarks/measure/labels.py`")
def labels_tables(data: dict[str, Any]) -> str:
    """Bytes and speed of soft labels."""
    row = [
        f"{data['images']} × {data['crops_per_image']}",
        f"{data['bytes_per_crop']:.2f}",
        f"{data['labelled_per_second']:.0f}",
        f"{data['replayed_per_second_4']:.0f}",
        f"{data['replayed_per_second_1']:.0f}",
    ]
    header = ["images × crops", "bytes per crop", "labelled per second", "replayed, 4 of an image", "replayed, 1"]
    return "\n\n".join([table(header, [row], left=1), f"Teacher {data['teacher']}. {origin(data)}"])


@table_of("startup.json", "`python benchmarks/measure/startup.py`")
def startup_tables(data: dict[str, Any]) -> str:
    """Processor and wall-clock time of commands that compute next to nothing."""
    columns = ("processor_seconds_median", "processor_seconds_min", "seconds_median", "seconds_min")
    rows = [[f"`{row['command']}`", *(f"{row[column]:.2f}" for column in columns)] for row in data["rows"]]
    header = ["command", "processor time (s)", "least", "wall-clock time (s)", "least"]
    note = f"Medians and least values. Load of the machine at the start: {data['load_before']:.1f}."
    return "\n\n".join([table(header, rows, left=1), f"{note} {origin(data)}"])


@table_of("sensitivity.json", "`QVIT_DATA=FOLDER python benchmarks/measure/sensitivity.py`")
def sensitivity_tables(data: dict[str, Any]) -> str:
    """Search times, and how predictions of single sites agree with measurements."""
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
    return "\n\n".join([search, table(header, rows, left=1), f"{note} {origin(data)}"])


@table_of("solvers.json", "`QVIT_DATA=FOLDER python benchmarks/measure/solvers.py`")
def solvers_tables(data: dict[str, Any]) -> str:
    """Predicted loss of greedy answers over that of the integer program."""
    found = {(tuple(row["widths"]), row["budget"], row["solver"]): row for row in data["rows"]}
    rows = []
    for widths, budget in dict.fromkeys(key[:2] for key in found):
        least = found[widths, budget, "program"]
        cells = [", ".join(map(str, widths)), budget, f"{least['predicted_loss']:.4f}", f"{least['seconds']:.2f}"]
        for solver in ("greedy", "descent"):
            row = found[widths, budget, solver]
            cells.append(f"{100 * (row['predicted_loss'] / least['predicted_loss'] - 1):+.2f} %")
        rows.append([*cells, f"{found[widths, budget, 'greedy']['seconds']:.2f}"])
    header = ["widths", "budget", "program", "its seconds", "greedy", "descent alone", "greedy's seconds"]
    note = (
        f"Predicted loss (`fisher`, {data['images']} images) of {data['model']}, {data['units']} widths: the integer "
        "program's, and by how much greedy answers exceed it."
    )
    return "\n\n".join([table(header, rows, left=2), f"{note} {origin(data)}"])


@table_of("nested.json", "`python benchmarks/measure/nested.py --help`")
def nested_tables(data: dict[str, Any]) -> str:
    """Accuracy at each share of channels with 4-bit weights."""
    rows = [[f"{row['ratio']:g}", f"{row['accuracy']:.1f}", f"{row['agreement']:.1f}"] for row in data["rows"]]
    note = (
        f"{data['model']} at 8 bits after training, {data['images']} images that did not calibrate; in float "
        f"{data['float_accuracy']:.1f} % are right."
    )
    header = ["ratio", "top-1 (%)", "same answer as float (%)"]
    return "\n\n".join([table(header, rows, left=0), f"{note} {origin(data)}"])


@table_of("deploy_native.json", "`python benchmarks/measure/deploy.py --engines qvit-native ...`, see its `--help`")
def deploy_native_tables(data: dict[str, Any]) -> str:
    """The native engine beside every peer: a row for each model, plan and batch size."""
    peers = list(
        dict.fromkeys(
            (row["engine"], row["precision"]) for run in data["runs"] for row in run["rows"] if not row["ours"]
        )
    )
    header = ["model", "plan", "batch", "ms", *(f"÷ {engine} {precision}" for engine, precision in peers)]
    cells = []
    for run in data["runs"]:
        for native in (row for row in run["rows"] if row["engine"] == "qvit-native"):
            rows = {(row["engine"], row["precision"]): row for row in run["rows"] if row["batch"] == native["batch"]}
            own, plan = native["milliseconds_median"], native.get("plan") or run["plan"]
            ratios = [f"{own / rows[peer]['milliseconds_median']:.2f}" if peer in rows else "" for peer in peers]
            cells.append([f"`{run['model']}`", plan, str(native["batch"]), f"{own:.1f}", *ratios])
    trained = next(run for run in data["runs"] if not run["speed_only"])
    right = "; ".join(
        f"{row['engine']} {row['precision']} {row['top1_agreement']:.0f} %"
        for row in trained["rows"]
        if row["batch"] == trained["rows"][0]["batch"]
    )
    note = f"Milliseconds of a batch, and that time over each peer's. Same answers as float, `{trained['model']}`, "
    note += f"{trained['plan']}: {right}. Threads: {data['threads']}. Instructions of the processor: "
    note += f"{', '.join(f'`{name}`' for name in data['instructions'] or ())}. {origin(data)}"
    return "\n\n".join([table(header, cells, left=2), note])


@table_of("deploy.json", "`python benchmarks/measure/deploy.py`, see its `--help`")
def deploy_tables(data: dict[str, Any]) -> str:
    """Times of our engines and their peers, a table for each model and batch size."""
    parts = []
    for run in data["runs"]:
        for batch in dict.fromkeys(row["batch"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["batch"] == batch]
            parts += [f"`{run['model']}`, {run['plan']}, batch {batch}:", _deploy_table(rows), _deploy_verdict(rows)]
        skipped = [f"{row['engine']} {row['precision']} ({row['reason']})" for row in run["skipped"]]
        notes = [f"Float weights: {run['float_weights']}. Images: {run['images'].rstrip('.')}."]
        notes += ["Speed alone: how the answers agree says little here."] if run["speed_only"] else []
        notes += [f"Left out: {'; '.join(skipped)}."] if skipped else []
        parts.append(" ".join(notes))
    ours = {row["engine"]: row["arithmetic"] for run in data["runs"] for row in run["rows"] if row["ours"]}
    if ours:
        parts.append("What is computed: " + "; ".join(f"`{name}`: {text}" for name, text in ours.items()) + ".")
    known = data["instructions"]
    has = "not known" if known is None else ", ".join(f"`{name}`" for name in known) or "none of those that matter"
    return "\n\n".join([*parts, f"Threads: {data['threads']}. Instructions of the processor: {has}. {origin(data)}"])


def _deploy_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            f"**{row['engine']}**" if row["ours"] else row["engine"],
            row["precision"],
            f"{row['milliseconds_median']:.1f}",
            " – ".join(f"{value:.1f}" for value in row["milliseconds_quartiles"]),
            *(
                "" if row[key] is None else f"{row[key]:.2f}"
                for key in ("ratio_to_openvino_int8", "ratio_to_pytorch_fp32")
            ),
            f"{row['top1_agreement']:.0f}",
            "" if row["agreement_with_simulated"] is None else f"{row['agreement_with_simulated']:.0f}",
            "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    header = ["engine", "precision", "median (ms)", "quartiles (ms)", "× OpenVINO int8", "× PyTorch fp32"]
    header += ["same answer as float (%)", "as simulated (%)", "file (MB)"]
    return table(header, cells, left=2)


def _deploy_verdict(rows: list[dict[str, Any]]) -> str:
    """Our fastest engine beside the fastest peer, from the numbers alone."""
    ours, peers = ([row for row in rows if row["ours"] is own] for own in (True, False))
    if not ours or not peers:
        return "Nothing to compare."
    best, rival = (min(group, key=lambda row: row["milliseconds_median"]) for group in (ours, peers))
    ratio = best["milliseconds_median"] / rival["milliseconds_median"]
    relation = "faster than" if ratio < 1 else "not faster than"
    return (
        f"The fastest of these engines of ours, `{best['engine']}`, is {relation} the fastest peer, {rival['engine']} "
        f"{rival['precision']}: it takes {ratio:.2f} times as long."
    )


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


@table_of("packed.json", "`python benchmarks/measure/packed.py`, see its `--help`")
def packed_tables(data: dict[str, Any]) -> str:
    """True bytes of packed models, and how often each engine answers as the fake-quantized model."""
    sizes = [
        [
            row["model"],
            row["plan"],
            f"{row['file_bytes'] / 1e3:,.1f}",
            f"{row['theory_bytes'] / 1e3:,.1f}",
            f"{row['file_bytes'] / row['theory_bytes']:.3f}",
            f"{row['float_bytes'] / row['file_bytes']:.1f}",
        ]
        for row in data["rows"]
    ]
    answers = []
    for row in data["rows"]:
        fake = [f"{row['top1_simulated']:.1f}", "100", "", f"{row['images']}"]
        again = ["", f"{row['agreement_of_float64']:.1f}", f"{row['median_movement']:.3f}", ""]
        answers.append([row["model"], row["plan"], "fake quantization, float32", *fake])
        answers.append([row["model"], row["plan"], "fake quantization, float64", *again])
        answers += [
            [
                row["model"],
                row["plan"],
                f"`{own['engine']}`: {own['arithmetic']}",
                f"{own['top1']:.1f}",
                f"{own['agreement']:.1f}",
                f"{own['median_movement']:.3f}",
                "",
            ]
            for own in row["engines"]
        ]
    return "\n\n".join(
        [
            table(["model", "plan", "file (kB)", "theory (kB)", "file / theory", "float32 / file"], sizes, left=2),
            table(
                ["model", "plan", "computed by", "top-1 (%)", "equal answers (%)", "movement", "images"],
                answers,
                left=3,
            ),
            "Theory: bits of the weights plus tensors left in float. Equal answers: the first class is that of fake "
            "quantization in float32. Movement: median over images of the largest change of a logit. " + origin(data),
        ]
    )


@table_of("model_table.json", "`python benchmarks/measure/model_table.py`")
def model_table_tables(data: dict[str, Any]) -> str:
    """What works with which model, step by step, and why what is refused is refused."""
    steps = list(data["rows"][0]["steps"])
    parts = []
    for source, what in (("timm", "model of timm"), ("transformers", "class of transformers")):
        own = [row for row in data["rows"] if row["source"] == source]
        cells = [[_named(row), *(row["steps"][step]["outcome"] for step in steps), _why(row["steps"])] for row in own]
        parts.append(table([what, *steps, "why not"], cells, left=len(steps) + 2))
    return "\n\n".join([*parts, origin(data)])


def _named(row: dict[str, Any]) -> str:
    return f"`{row['name']}`" if row["title"] == row["name"] else f"{row['title']}: `{row['name']}`"


def _why(steps: dict[str, dict[str, str]]) -> str:
    """Each reason once, without what it says of other models; with the steps that it holds for, unless for all."""
    reasons: dict[str, list[str]] = {}
    for step, own in steps.items():
        if "why" in own:
            reason = re.split(r"\. Supported| \((?:supported|types that are):", own["why"])[0]
            reasons.setdefault(reason, []).append(step)
    told = []
    for reason, where in reasons.items():
        short = re.sub(r"^engine '\w+' does not run this model: ", "", reason).replace("|", "\\|")
        told.append(short if len(where) == len(steps) else f"{', '.join(where)}: {short}")
    return "; ".join(told)
