"""The report, from run directories that are made up here: what is read, grouped, drawn and written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LAYERS, HEADS, EPOCHS, STEPS = 4, 4, 6, 20
PER_HEAD = (
    "attn.qkv.query_weight", "attn.qkv.key_weight", "attn.qkv.value_weight",
    "attn.query", "attn.key", "attn.value", "attn.probs", "attn.output", "attn.proj.weight",
)  # fmt: skip
SINGLE = ("attn.qkv.input", "mlp.fc1.input", "mlp.fc1.weight", "mlp.fc2.input", "mlp.fc2.weight")
BOUNDARY = ("patch_embed.proj.input", "patch_embed.proj.weight", "head.input", "head.weight")
MACS = 4_000_000


def site_heads(layers: int = LAYERS, heads: int = HEADS) -> dict[str, int]:
    """Every site of a small ViT, with its number of widths."""
    blocks = {f"blocks.{i}.{name}": heads if name in PER_HEAD else 1 for i in range(layers) for name in PER_HEAD + SINGLE}
    return {"patch_embed.proj.input": 1, "patch_embed.proj.weight": 1, **blocks, "head.input": 1, "head.weight": 1}


def made_up_widths(method: str, bits: int, seed: int, sizes: dict[str, int]) -> dict[str, list[int]]:
    """Widths of a plan: uniform with 8 bits at the ends, or (method qvit) drawn around the budget."""
    rng = random.Random(f"{method} {bits} {seed}")
    widths = {}
    for site, size in sizes.items():
        learned = [min(8, max(2, bits + rng.choice((-1, 0, 0, 0, 1, 2)) + ("fc2.input" in site))) for _ in range(size)]
        widths[site] = [8] * size if site in BOUNDARY else learned if method == "qvit" else [bits] * size
    return widths


def write_run(
    directory: Path,
    method: str = "qvit",
    budget: str | None = "3bit",
    seed: int = 0,
    accuracy: float = 90.0,
    *,
    sizes: dict[str, int] | None = None,
    epochs: int = EPOCHS,
    steps: int = STEPS,
    model: str = "vit_small",
    killed: bool = False,
    **config: Any,
) -> Path:
    """Writes a run directory; `killed` leaves it without result and with half a last line in the log."""
    directory.mkdir(parents=True)
    sizes = sizes or site_heads()
    bits = int((budget or "32bit").removesuffix("bit"))
    widths = made_up_widths(method, bits, seed, sizes)
    learned = method == "qvit"
    uniform = {str(width): 2 * MACS * width * width for width in range(2, 9)}
    cost_sites = [
        {
            "site": site,
            "macs": MACS // len(sizes),
            "bit_width": width if len(width) > 1 else width[0],
            "bit_operations": MACS // len(sizes) * sum(width) ** 2 // len(width) ** 2 * (not site.endswith(".input")),
            "weight_bytes": 96 * sum(width) // len(width) if "weight" in site else 0,
        }
        for site, width in widths.items()
    ]
    total, size = (sum(row[key] for row in cost_sites) for key in ("bit_operations", "weight_bytes"))
    if method == "float":
        total, size = MACS * 1024, 80_000
    write(directory / "config.json", {
        "model": model, "model_kwargs": {"depth": 4}, "method": method, "budget": budget, "data": "digits", "seed": seed,
        "epochs": epochs, "lr": 2e-4, "versions": {"qvit": "0.1.0", "torch": "2.15.0", "timm": "1.0.31", "python": "3.11"},
        "hardware": "2 CPU cores", "command": ["qvit", "train", "--method", method, "--seed", str(seed)], **config,
    })  # fmt: skip
    if method != "float":
        write(directory / "plan.json", {
            "format": "qvit-plan", "version": 1, "name": f"{method}-{budget}", "model": model,
            "sites": {
                site: {"bit_width": width if len(width) > 1 else width[0], "bit_width_range": [2, 8], "learn_bit_width": False}
                for site, width in widths.items()
            },
        })  # fmt: skip
    write(directory / "cost.json", {
        "model": model, "plan": "x", "macs": MACS, "bit_operations": total, "weight_bytes": size, "sites": cost_sites,
    })  # fmt: skip
    lines = made_up_log(method, bits, seed, widths, total, uniform, epochs, steps)
    if killed:
        lines = [*lines[: len(lines) // 2], lines[len(lines) // 2][:20]]
    else:
        write(directory / "result.json", {
            "model": model, "method": method, "accuracy": accuracy, "float_accuracy": 96.0, "budget": budget,
            "bit_operations": total, "weight_bytes": size, "seconds": 100.0 + seed, "seed": seed, "epochs": epochs,
        })  # fmt: skip
    (directory / "log.jsonl").write_text("\n".join(lines) + ("" if killed else "\n"), encoding="utf-8")
    return directory


def made_up_log(method, bits, seed, widths, total, uniform, epochs, steps) -> list[str]:
    """The lines of a log: two thirds of searching, the freeze, the rest with fixed widths."""
    rng = random.Random(seed)
    budget = None if method == "float" else total * 1.02
    events: list[dict[str, Any]] = [{
        "event": "start", "step": 0, "time": 1.7e9 + seed * 1000, "epochs": epochs, "steps_per_epoch": steps,
        "budget_bit_operations": budget, "uniform_bit_operations": uniform,
    }]  # fmt: skip
    freeze, last = epochs * 2 // 3, epochs * steps
    for epoch in range(epochs):
        share = min(1.0, (epoch + 1) / max(freeze, 1))
        for step in range(epoch * steps + 5, (epoch + 1) * steps + 1, 5):
            done = min(1.0, step / (freeze * steps))
            bops = total * (1.6 - 0.6 * done + rng.uniform(-0.01, 0.01) * (done < 1)) if method == "qvit" else total
            loss = 2.3 * (1 - step / last) ** 2 + 0.3 + rng.uniform(0, 0.2)
            events.append({
                "event": "step", "step": step, "epoch": epoch, "loss": loss, "task_loss": loss - 0.01, "penalty": 0.01,
                "bit_operations": bops, "lr": 2e-4 * (1 - step / last), "images_per_second": 1000.0,
            })  # fmt: skip
        real = {
            site: [(bits + 1) * (1 - share) + (width + 0.3 * (share < 1)) * share for width in own]
            for site, own in widths.items()
        }
        events.append({
            "event": "epoch", "epoch": epoch, "step": (epoch + 1) * steps, "train_loss": 2.0 / (epoch + 1),
            "accuracy": 50.0 + 40.0 * share + rng.uniform(0, 3), "bit_operations": total, "bit_widths": real, "seconds": 1.0,
        })  # fmt: skip
        if epoch + 1 == freeze and method == "qvit":
            changes = [
                {"site": site, "head": head if len(own) > 1 else None, "learned": width + 0.37 - (head == 1),
                 "rounded": width - (head == 1), "final": width}
                for site, own in widths.items() for head, width in enumerate(own)
            ]  # fmt: skip
            events.append({
                "event": "freeze", "step": (epoch + 1) * steps, "epoch": epoch, "budget_bit_operations": budget,
                "bit_operations_learned": total * 1.04, "bit_operations_rounded": int(total * 0.97),
                "bit_operations": total, "changes": changes,
            })  # fmt: skip
    events.append({"event": "end", "step": last, "accuracy": 90.0, "seconds": 100.0})
    return [json.dumps(event) for event in events]


def write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data), encoding="utf-8")


ACCURACIES = {
    ("lsq+", "3bit"): (93.0, 94.0, 95.0), ("qvit", "3bit"): (95.0, 95.5, 94.9),
    ("lsq+", "2bit"): (80.0, 82.0, 84.0), ("qvit", "2bit"): (88.0, 89.0, 90.0),
}  # fmt: skip


def write_demo(directory: Path, **options: Any) -> Path:
    """A demo directory: float, and two methods at two budgets, three seeds each."""
    for (method, budget), accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(directory / "runs" / f"{method}-{budget}-seed{seed}", method, budget, seed, accuracy, **options)
    for seed in range(3):
        write_run(directory / "runs" / f"float-seed{seed}", "float", None, seed, 95.5 + seed * 0.5, **options)
    write(directory / "results.json", {"float_accuracy_mean": 96.0, "rows": []})
    return directory
