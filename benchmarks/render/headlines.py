"""Results in a sentence each, for the README: learned widths, 8 to 3 bits without training, training, speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evidence_data import paired, reference_of, rows_of
from rendering import TABLES, WRONG, Data, RenderError, kinds_of, read

from qvit.report.units import difference


def learned_widths(data: Data) -> str:
    """Q-ViT beside LSQ+ at equal bit operations, by budget."""
    rows = [row for row in rows_of(data, "budgets") if row["row"] == "qvit"]
    gains = [(row["budget"], paired(row, reference_of(row, data, "lsq+"))) for row in rows]
    said = ", ".join(f"{difference(gain[0])} ± {gain[1]:.2f} at {budget}" for budget, gain in gains if gain is not None)
    return (
        f"**Learned widths** (DeiT-T on 64 pixels, short training, {len(rows[0]['seeds'])} seeds): top-1 less that of "
        f"uniform LSQ+ at equal bit operations, in points: {said}. {_measured(data, 'evidence.md')}"
    )


def post_training(data: Data) -> str:
    """What uniform grids of 8 to 3 bits lose without training, and how much of that a quick reconstruction leaves."""
    uniform = [row for row in data["rows"] if row["plan"].startswith("w")]
    rows = [row for row in uniform if row["effort"] is None]
    fast = {row["plan"]: f" ({row['drop']:.1f} with `--effort fast`)" for row in uniform if row["effort"] == "fast"}
    said = ", ".join(f"{row['drop']:.1f} at {row['plan']}{fast.get(row['plan'], '')}" for row in rows)
    return (
        f"**Without training** (DeiT-T, {sum(rows[0]['images'])} photographs): points lost: {said}. "
        f"{_measured(data, 'results.md')}"
    )


def training(data: Data) -> str:
    """What a training step costs on a CPU, by kind of processor."""
    said = []
    for kind, rows in kinds_of(data).items():
        own = {row["method"]: row["time_ratio"] for row in rows if (row["mode"], row["precision"]) == ("eager", "fp32")}
        said.append(f"{own['lsq+']:.2f} (LSQ+) and {own['qvit']:.2f} (search)" + (f" with {kind}" if kind else ""))
    return (
        f"**Training on a CPU** (DeiT-T, float32): a step's time over the float step's is {', '.join(said)}. "
        f"{_measured(data, 'training-speed.md')}"
    )


def speed(data: Data) -> str:
    """The native engine at 8 bits beside PyTorch and the fastest peer that answers right, one image at a time."""
    rows = {(row["engine"], row["precision"]): row for row in data["runs"][0]["rows"] if row["batch"] == 1}
    own = rows["qvit-native", "w8a8"]
    return (
        f"**Integers** (DeiT-T, w8a8, {data['threads']} threads, VNNI): {own['milliseconds_median']:.1f} ms an image "
        f"from {own['file_bytes'] / 1e6:.1f} MB, {own['ratio_to_pytorch_fp32']:.2f} of PyTorch's time in float32, "
        f"{own['ratio_to_right_peer']:.2f} of the best right peer's. {_measured(data, 'deployment.md')}"
    )


def _measured(data: Data, page: str) -> str:
    return f"[Measured on {data['date']}](docs/{page})."


SENTENCES: tuple[tuple[str, Callable[[Data], str]], ...] = (
    ("evidence_tiny-imagenet.json", learned_widths),
    ("ptq_halves.json", post_training),
    ("train_step.json", training),
    ("deploy_native.json", speed),
)


def headlines(results: Path) -> str:
    """The sentences as a list; a file that is not there is left out."""
    lines = []
    for name, sentence in SENTENCES:
        if not (results / name).is_file():
            continue
        try:
            lines.append(f"- {sentence(read(results / name))}")
        except WRONG as error:
            raise RenderError(f"{results / name} is not what the benchmark writes: {type(error).__name__}") from None
    return "\n".join(lines) or "Not measured yet: `make bench`."


TABLES["headlines"] = headlines
