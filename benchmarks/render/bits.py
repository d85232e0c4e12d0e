"""Bits against milliseconds: tables and figures of bits_ms*.json, one file for each kind of processor.

Written by `benchmarks/measure/bits_ms.py`. The native engine's rows stand beside the fastest peer that answers as the
float model does; peers that do not are drawn, too, and named as wrong. `forms.py` has the engine's instruction sets
beside each other.
"""

from __future__ import annotations

import re
from typing import Any

import plotly.graph_objects as go
from rendering import Data, figures_of, origin, place, table, table_of

from qvit.report.figures import COLOURS, line, marks, new_figure

ENGINE = "qvit-native"
#: The instructions that decide how fast products of bytes are, the fastest first.
PROCESSORS = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx2": "AVX2", "asimddp": "Arm with sdot"}
Row = dict[str, Any]


@table_of("bits_ms*.json", "`python benchmarks/measure/bits_ms.py`, see its `--help`")
def bits_ms_tables(data: Data) -> str:
    """A row for each plan and batch size, and the figure of each batch size."""
    (run,) = data["runs"]
    parts = []
    for batch in batches_of(run):
        rows = [row for row in run["rows"] if row["batch"] == batch]
        peer = right_peer(rows)
        beside = "no peer was judged" if peer is None else f"the fastest right peer is {title(peer)}, {ms(peer)} ms"
        parts.append(f"`{run['model']}` on {kind_of(data)}, batch {batch}; {beside}:")
        parts += [_table(rows), place(figure_name(data, batch))]
    wrong = dict.fromkeys(
        f"{title(row)} ({row['top1_agreement']:.0f} %)" for row in run["rows"] if row["right"] is False
    )
    notes = [
        "÷ right peer: time over that of the fastest peer of whose answers at least "
        f"{run['right_percent']:g} % are the float model's. Answers are to {run['compared_images']} images. "
        + (f"Wrong: {'; '.join(wrong)}." if wrong else "No peer is wrong.")
        if any(row["right"] is not None for row in run["rows"])
        else f"Speed alone: images are {run['images']}, so nothing tells which peer answers right."
    ]
    notes.append(f"Threads: {data['threads']}. {ENGINE}: {_arithmetic(run['rows'])}. Instructions of the processor:")
    notes.append(f"{', '.join(f'`{name}`' for name in data['instructions'] or ['not known'])}. {origin(data)}")
    return "\n\n".join([*parts, " ".join(notes)])


@table_of("native_forms.json", "`python benchmarks/measure/forms.py`")
def native_forms_tables(data: Data) -> str:
    """Milliseconds by instruction set and plan, and over those of the first plan."""
    found = {(row["batch"], row["form"], row["plan"]): row for row in data["rows"]}
    cells = [
        [
            form,
            str(batch),
            *(
                f"{row['milliseconds_median']:.2f} ({row['ratio_to_first']:.2f})"
                for plan in data["plans"]
                for row in [found[batch, form, plan]]
            ),
        ]
        for batch, form in dict.fromkeys(key[:2] for key in found)
    ]
    header = ["instructions", "batch", *(f"{plan}, ms (÷ {data['plans'][0]})" for plan in data["plans"])]
    return f"`{data['model']}`:\n\n{table(header, cells, left=1)}\n\n{origin(data)}"


def _table(rows: list[Row]) -> str:
    own = ours(rows)
    widest = next((row["milliseconds_median"] for row in own if row["plan"] == "w8a8"), None)
    cells = [
        [
            row["plan"],
            ms(row),
            " – ".join(f"{value:.2f}" for value in row["milliseconds_quartiles"]),
            "" if widest is None else f"{row['milliseconds_median'] / widest:.2f}",
            *(
                "" if row[key] is None else f"{row[key]:.2f}"
                for key in ("ratio_to_right_peer", "ratio_to_pytorch_fp32")
            ),
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['top1_agreement']:.0f}",
            f"{row['agreement_with_simulated']:.0f}",
        ]
        for row in own
    ]
    header = ["plan", "median (ms)", "quartiles (ms)", "÷ w8a8", "÷ right peer", "÷ PyTorch fp32", "file (MB)"]
    return table([*header, "same answer as float (%)", "as simulated (%)"], cells, left=1)


def _arithmetic(rows: list[Row]) -> str:
    plans: dict[str, dict[str, None]] = {}
    for row in ours(rows):
        plans.setdefault(row["arithmetic"], {})[row["plan"]] = None
    if len(plans) == 1:
        return next(iter(plans))
    return "; ".join(f"{', '.join(own)}: {text}" for text, own in plans.items())


@figures_of("bits_ms*.json")
def bits_ms_figures(data: Data) -> dict[str, go.Figure]:
    """Milliseconds of the plans over their width, peers as lines across; a figure for each batch size."""
    (run,) = data["runs"]
    return {figure_name(data, batch): _figure(run, batch) for batch in batches_of(run)}


def _figure(run: Data, batch: int) -> go.Figure:
    rows = [row for row in run["rows"] if row["batch"] == batch]
    uniform = sorted((width, row["milliseconds_median"]) for row in ours(rows) if (width := width_of(row["plan"])))
    mixed = [row for row in ours(rows) if width_of(row["plan"]) is None]
    peers = [row for row in rows if not row["ours"]]
    alt = f"Milliseconds of {run['model']} at batch {batch} against bits; the table above has the numbers."
    figure = new_figure(alt, "bits of weights and activations", "milliseconds", height=420)
    figure.update_xaxes(dtick=1, range=[1.6, 8.4])
    figure.update_yaxes(rangemode="tozero")
    hover = "%{x} bits: %{y:.3~g} ms"
    line(figure, uniform, ENGINE, hover, COLOURS[0], width=2.5, mode="lines+markers")
    for row in mixed:
        point = [(bits_in(row["plan"]), row["milliseconds_median"])]
        mark = {"symbol": "diamond", "size": 11, "color": COLOURS[1]}
        marks(figure, point, f"{ENGINE}, {row['plan']}", hover, marker=mark)
    for number, row in enumerate(peers, 2):
        across = [(width, row["milliseconds_median"]) for width in (1.6, 8.4)]
        wrong = row["right"] is False
        name = title(row) + (" (wrong)" if wrong else "")
        line(figure, across, name, "%{y:.3~g} ms", COLOURS[number], dash="dot" if wrong else "dash")
    return figure


def ours(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["engine"] == ENGINE]


def right_peer(rows: list[Row]) -> Row | None:
    right = [row for row in rows if row["right"]]
    return min(right, key=lambda row: row["milliseconds_median"], default=None)


def batches_of(run: Data) -> list[int]:
    return list(dict.fromkeys(row["batch"] for row in run["rows"]))


def title(row: Row) -> str:
    return f"{row['engine']} {row['precision']}"


def ms(row: Row) -> str:
    return f"{row['milliseconds_median']:.2f}"


def width_of(plan: str) -> int | None:
    """4 of `w4a4`; None for plans of other widths."""
    match = re.fullmatch(r"w(\d)a\1", plan)
    return int(match[1]) if match else None


def bits_in(plan: str) -> int:
    """3 of `mixed-3bit`: where a mixed plan stands, by the budget in its name."""
    return int(re.search(r"(\d)bit", plan)[1])  # type: ignore[index]


def kind_of(data: Data) -> str:
    """The kind of processor: the first of `PROCESSORS` that it has."""
    kind = next((title for name, title in PROCESSORS.items() if name in (data["instructions"] or ())), "any processor")
    return f"{kind}, {data['processor']}" if "processor" in data else kind


def figure_name(data: Data, batch: int) -> str:
    return f"bits-ms-{kind_of(data).lower().replace(',', '').replace(' ', '-')}-batch-{batch}"
