"""The page of a benchmark, from its JSON file alone: how long a batch takes in each engine, and who computed what.

It draws the plain data of `qvit bench`: format "qvit-bench" with `rows` (engine, precision, plan, batch,
milliseconds_median and its quartiles, ratios, agreements, kernels) and `skipped`. Bars are grouped by batch size,
quartiles are whiskers, and each bar carries its time over that of the fastest right peer, or of OpenVINO's int8 where
answers do not tell who is right. Our engines are set in bold, and named by their plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from qvit.documents.bench import Bench
from qvit.errors import UsageError
from qvit.report.figures import COLOURS, label, marks, new_figure
from qvit.report.markup import Canvas, escape, lead, log_axis, table, table_of
from qvit.report.shell import document, write_page_of
from qvit.report.units import bytes_text, fixed, significant

FORMAT, VERSION = "qvit-bench", 1
#: Errors of logits above which an answer is doubted: ours beside their simulation, those of peers beside float.
OUR_ERROR, PEER_ERROR = 0.1, 0.8
FOOTER = (
    "Times are medians over calls; engines took turns in rounds, so that what disturbs the machine hits all alike. "
    "Ratios are the time of an engine over that of the other: below 1 is faster. Quartiles are of the single calls. "
    "1 MB = 10<sup>6</sup> bytes."
)


def write_bench_page(data: str | Path, out: str | Path, *, title: str | None = None) -> Path:
    """Writes the page of a benchmark's JSON file.

    Raises:
        UsageError: If the file is no benchmark.
        QvitError: If it cannot be read, or the page cannot be written.
    """
    return write_page_of(data, out, lambda record: render_bench(record, title=title), Bench, "benchmark")


def render_bench(record: Mapping[str, Any], *, title: str | None = None) -> str:
    """The page as text; see `write_bench_page`."""
    if record.get("format") != FORMAT or record.get("version") != VERSION or not record.get("rows"):
        raise UsageError(f'not a benchmark: it is an object with "format": "{FORMAT}", version {VERSION} and rows')
    canvas = Canvas()
    heading = title or f"Speed: {record['model']}, {record['plan']}"
    parts = [
        ("times", "Milliseconds per batch", _times(record, canvas)),
        ("numbers", "All numbers", _numbers(record)),
        ("kernels", "Where the time goes", _kernels(record)),
        ("arithmetic", "What is computed in which format", _arithmetic(record)),
        ("skipped", "Left out", _skipped(record)),
    ]
    return document(heading, _header(record), parts, canvas, footer=FOOTER)


def _header(record: Mapping[str, Any]) -> str:
    said = [*verdict(record), *doubts(record)]
    if record["speed_only"]:
        said.append(
            f"Speed only: images are {record['images']}, float weights {record['float_weights']}; "
            "how the answers agree says little."
        )
    instructions = record.get("instructions")
    found = {
        "Model": f"{record['model']}, plan {record['plan']}; float weights: {record['float_weights']}",
        "Threads": record["threads"],
        "Images": f"{record['images']}; {record['calibration_images']} to calibrate, {record['compared_images']} to "
        "compare answers on",
        "Hardware": record["hardware"],
        "Instructions": "not known" if instructions is None else ", ".join(instructions) or "none that matter here",
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "Date": record["date"],
    }
    return lead(said, found, record["command"])


def verdict(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each batch size: our fastest engine beside its peers; one of doubtful answers does not count."""
    sentences = []
    for batch in batches_of(record):
        rows = [row for row in record["rows"] if row["batch"] == batch]
        ours = [row for row in rows if row["ours"] and not _doubted(row)]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["milliseconds_median"])
        peer = right_peer(rows)
        names = {"ratio_to_openvino_int8": "OpenVINO int8", "ratio_to_pytorch_fp32": "PyTorch fp32"}
        if peer is not None:
            names = {"ratio_to_right_peer": f"the fastest right peer, {name_of(peer)}"}
        beside = [f"{significant(best[key], 3)} × the time of {name}" for key, name in names.items() if best.get(key)]
        text = f"Batch {batch}: {name_of(best)} takes {significant(best['milliseconds_median'], 3)} ms"
        sentences.append(text + (f", {' and '.join(beside)}." if beside else "."))
    return sentences


def right_peer(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest peer of those that answer as the float model does; None if there is none, or nothing tells."""
    right = [row for row in rows if row.get("right")]
    return min(right, key=lambda row: row["milliseconds_median"], default=None)


def name_of(row: Mapping[str, Any]) -> str:
    """`openvino int8`, `qvit-native w4a4`, `qvit-native learned (mixed)`: an engine and what it runs."""
    plan = row.get("plan")
    if plan is None or plan == row["precision"]:
        return f"{row['engine']} {row['precision']}"
    return f"{row['engine']} {plan} ({row['precision']})"


def doubts(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each engine that answers unlike what it should: the simulation for ours, the float model else."""
    sentences = []
    for row in filter(_doubted, record["rows"]):
        what = "float" if row["error_to_simulated"] is None else "simulated"
        error = row[f"error_to_{what}"]
        sentences.append(
            f"{name_of(row)} at batch {row['batch']} answers unlike the {what} model: "
            f"error {significant(error, 2)} (0: equal, 1: no relation)."
        )
    return sentences


def _doubted(row: Mapping[str, Any]) -> bool:
    if row["error_to_simulated"] is not None:
        return row["error_to_simulated"] > OUR_ERROR
    return row["error_to_float"] > PEER_ERROR


def batches_of(record: Mapping[str, Any]) -> list[int]:
    """The batch sizes, in the order in which they were measured."""
    return list(dict.fromkeys(row["batch"] for row in record["rows"]))


def _name(row: Mapping[str, Any], *, plot: bool, wrong: bool = False) -> str:
    text = (label if plot else escape)(name_of(row) + (" (wrong)" if wrong else ""))
    return f"<b>{text}</b>" if row["ours"] else text


def _times(record: Mapping[str, Any], canvas: Canvas) -> str:
    caption = (
        "Bars end at the median, whiskers at the quartiles. The number beside a bar is its time over that of "
        f"{_reference(record)[1]} at the same batch size. Bold: ours."
    )
    return log_axis("logarithmic axis", ["times"]) + canvas.plot("times", [_figure(record)], caption)


def _reference(record: Mapping[str, Any]) -> tuple[str, str]:
    """What numbers beside bars are relative to: the key, and in words."""
    if right_peer(record["rows"]):
        return "ratio_to_right_peer", "the fastest peer that answers as the float model does"
    return "ratio_to_openvino_int8", "OpenVINO's int8"


def _figure(record: Mapping[str, Any]) -> go.Figure:
    rows, batches, reference = record["rows"], batches_of(record), _reference(record)[0]
    wrong = {name_of(row) for row in rows if row.get("right") is False}
    name = lambda row: _name(row, plot=True, wrong=name_of(row) in wrong)  # noqa: E731
    names = list(dict.fromkeys(map(name, rows)))
    alt = f"Milliseconds per batch of {len(names)} engines; the table below has the numbers."
    height = 90 + len(names) * (18 + 18 * len(batches))
    figure = new_figure(alt, "milliseconds per batch", "", height=height, min_width=520)
    figure.update_yaxes(categoryorder="array", categoryarray=names, autorange="reversed", showgrid=False)
    figure.update_layout(barmode="group", bargap=0.3, scattermode="group", scattergap=0.3)
    for position, batch in enumerate(batches):
        own = [row for row in rows if row["batch"] == batch]
        axis = list(map(name, own))
        medians = [row["milliseconds_median"] for row in own]
        low, high = zip(*(row["milliseconds_quartiles"] for row in own), strict=True)
        figure.add_bar(
            y=axis, x=medians, orientation="h", name=f"batch {batch}", offsetgroup=str(batch),
            marker={"color": COLOURS[position % len(COLOURS)]},
            error_x={
                "symmetric": False, "thickness": 1.2, "width": 4, "color": "rgba(128,128,128,0.9)",
                "array": [end - median for end, median in zip(high, medians, strict=True)],
                "arrayminus": [median - end for end, median in zip(low, medians, strict=True)],
            },
            customdata=[[row["images_per_second"], _in_words(row), label(row["arithmetic"])] for row in own],
            hovertemplate="%{y}<br>%{x:.4~g} ms, %{customdata[0]:.4~g} images per second<br>"
            "%{customdata[1]}<br>%{customdata[2]}<extra></extra>",
        )  # fmt: skip
        ends = [max(end, median) for end, median in zip(high, medians, strict=True)]
        ratios = [significant(row.get(reference), 3) for row in own]
        marks(
            figure, zip(ends, axis, strict=True), orientation="h", offsetgroup=str(batch), mode="text",
            text=[f" × {ratio}" if ratio else " " for ratio in ratios], textposition="middle right",
            textfont={"size": 11}, cliponaxis=False,
        )  # fmt: skip
    return figure


def has_features(record: Mapping[str, Any]) -> bool:
    """Whether the engines answer with features."""
    return any(row.get("cosine_to_float") is not None for row in record["rows"])


def as_float(row: Mapping[str, Any]) -> str:
    """How a row's answers agree with the float model's: percent of the first classes, or the cosine of features."""
    cosine = row.get("cosine_to_float")
    number = fixed(row["top1_agreement"], 1) if cosine is None else fixed(cosine, 4)
    return number + (" wrong" if row.get("right") is False else "")


def as_simulated(row: Mapping[str, Any]) -> str:
    """Likewise with those of the simulated model."""
    cosine = row.get("cosine_to_simulated")
    return fixed(row["agreement_with_simulated"], 1) if cosine is None else fixed(cosine, 4)


def _in_words(row: Mapping[str, Any]) -> str:
    if row.get("cosine_to_float") is not None:
        return f"cosine with float: {row['cosine_to_float']:.4f}"
    return f"same first class as float: {row['top1_agreement']:.1f} %"


#: The columns of the table of all numbers.
NUMBERS: dict[str, Callable[[Any], str]] = {
    "": lambda row: _name(row, plot=False),
    "batch": lambda row: str(row["batch"]),
    "ms": lambda row: significant(row["milliseconds_median"]),
    "quartiles": lambda row: " – ".join(map(significant, row["milliseconds_quartiles"])),
    "images/s": lambda row: significant(row["images_per_second"]),
    "× right peer": lambda row: significant(row.get("ratio_to_right_peer"), 3),
    "× OpenVINO int8": lambda row: significant(row["ratio_to_openvino_int8"], 3),
    "× PyTorch fp32": lambda row: significant(row["ratio_to_pytorch_fp32"], 3),
    "as float (%)": as_float,
    "error": lambda row: significant(row["error_to_float"], 2),
    "as simulated (%)": as_simulated,
    "file": lambda row: bytes_text(row["file_bytes"]),
    "calls": lambda row: str(row["calls"]),
}


def _numbers(record: Mapping[str, Any]) -> str:
    note = (
        "<p>As float, as simulated: share of images with the same first class as the float model, or as the "
        "fake-quantized model in PyTorch. Error: root mean square of the difference of the logits to those of the "
        "float model, over that of the float logits around their mean.</p>"
    )
    if has_features(record):
        note = (
            "<p>As float, as simulated: mean cosine of the features with those of the float model, or of the "
            "fake-quantized model in PyTorch. Error: root mean square of the difference to the float model's features, "
            "over that of these.</p>"
        )
    judged = any(row.get("right") is not None for row in record["rows"])
    if judged:
        least = (
            f"a mean cosine below {record['right_cosine']:g} with the float model's features"
            if has_features(record)
            else f"fewer than {record['right_percent']:g} % of the float model's answers"
        )
        note += f"<p>A peer with {least} is marked as wrong; right peer: the fastest of the others.</p>"
    columns = {
        name.removesuffix(" (%)") if has_features(record) else name: cell
        for name, cell in NUMBERS.items()
        if judged or name != "× right peer"
    }
    return note + table_of(columns, record["rows"], bold=[row["ours"] for row in record["rows"]])


def _kernels(record: Mapping[str, Any]) -> str:
    """Time by kind of kernel, a column for each engine that can tell: milliseconds, and the share."""
    rows = [row for row in record["rows"] if row.get("kernels")]
    kinds = dict.fromkeys(kind for row in rows for kind in row["kernels"])
    cells = [[escape(kind), *(kernel_text(row["kernels"], kind) for row in rows)] for kind in kinds]
    heads = [f"{_name(row, plot=False)}, batch {row['batch']}" for row in rows]
    note = "<p>Milliseconds of a batch by kind of kernel, as the engine itself counts them, and their share.</p>"
    return note + table(["", *heads], cells) if rows else ""


def kernel_text(kernels: Mapping[str, float], kind: str) -> str:
    """Milliseconds of a kind of kernel, and its share of all: `0.812 (23 %)`."""
    if kind not in kernels:
        return ""
    return f"{significant(kernels[kind], 3)} ({100 * kernels[kind] / max(sum(kernels.values()), 1e-12):.0f} %)"


def _arithmetic(record: Mapping[str, Any]) -> str:
    found = {_name(row, plot=False): escape(row["arithmetic"]) for row in record["rows"]}
    return table(["", "arithmetic"], [[name, text] for name, text in found.items()], text=2)


def _skipped(record: Mapping[str, Any]) -> str:
    names = {"": lambda row: escape(name_of(row)), "why": lambda row: escape(row["reason"])}
    return table_of(names, rows, text=2) if (rows := record.get("skipped")) else ""
