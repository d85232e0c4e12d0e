"""Made-up run directories for the tests of the report: valid files, numbers that mean nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

LAYERS, HEADS, EPOCHS, STEPS = 4, 4, 6, 20
WEIGHTS = ("attn.qkv.query_weight", "attn.qkv.key_weight", "attn.qkv.value_weight", "attn.proj.weight")
PER_HEAD = (*WEIGHTS, "attn.query", "attn.key", "attn.value", "attn.probs", "attn.output")
SINGLE = ("attn.qkv.input", "mlp.fc1.input", "mlp.fc1.weight", "mlp.fc2.input", "mlp.fc2.weight")
MACS = 4_000_000
FLOAT_BYTES = 80_000
ACCURACIES = {
    ("lsq+", "3bit"): (93.0, 94.0, 95.0),
    ("qvit", "3bit"): (95.0, 95.5, 94.9),
    ("lsq+", "2bit"): (80.0, 82.0, 84.0),
    ("qvit", "2bit"): (88.0, 89.0, 90.0),
}


def vit_sites(layers: int = LAYERS, heads: int = HEADS) -> dict[str, int]:
    """Every site of a small ViT, with its number of widths."""
    blocks = {
        f"blocks.{i}.{name}": heads if name in PER_HEAD else 1 for i in range(layers) for name in PER_HEAD + SINGLE
    }
    return {"patch_embed.proj.input": 1, "patch_embed.proj.weight": 1, **blocks, "head.input": 1, "head.weight": 1}


def made_up_widths(method: str, bits: int, seed: int, sites: dict[str, int]) -> dict[str, list[int]]:
    """Widths of a plan: uniform with 8 bits at the ends, or (method qvit) drawn around the budget."""
    rng = random.Random(f"{method} {bits} {seed}")
    widths = {}
    for site, size in sites.items():
        drawn = [bits + rng.choice((-1, 0, 0, 0, 1, 2)) + ("fc2.input" in site) for _ in range(size)]
        learned = [min(8, max(2, width)) for width in drawn]
        outside = site.startswith(("patch_embed", "head"))
        widths[site] = [8] * size if outside else learned if method == "qvit" else [bits] * size
    return widths


def made_up_cost(model: str, widths: dict[str, list[int]]) -> dict[str, Any]:
    """Costs with the totals they should have: products are counted at weights, keys and values."""
    rows = []
    for site, own in widths.items():
        counted = site.endswith(("weight", "attn.key", "attn.value"))
        macs = MACS // len(widths) if counted else 0
        size = int(96 * fmean(own)) if site.endswith("weight") else 0
        width = own if len(own) > 1 else own[0]
        bops = int(macs * fmean(own) ** 2)
        rows.append({"site": site, "macs": macs, "bit_width": width, "bit_operations": bops, "weight_bytes": size})
    totals = {key: sum(row[key] for row in rows) for key in ("macs", "bit_operations", "weight_bytes")}
    return {"model": model, "plan": "made up", **totals, "sites": rows}


def write_run(
    directory: Path,
    method: str = "qvit",
    budget: str | None = "3bit",
    seed: int = 0,
    accuracy: float = 90.0,
    *,
    sites: dict[str, int] | None = None,
    epochs: int = EPOCHS,
    steps: int = STEPS,
    model: str = "vit_small",
    killed: bool = False,
    **config: Any,
) -> Path:
    """Writes a run directory; `killed` leaves it without a result, and half a last line in the log."""
    directory.mkdir(parents=True)
    sites = sites or vit_sites()
    bits = int((budget or "3bit").removesuffix("bit"))
    widths = made_up_widths(method, bits, seed, sites)
    cost = made_up_cost(model, widths)
    if method == "float":
        cost = {**cost, "bit_operations": cost["macs"] * 1024, "weight_bytes": FLOAT_BYTES, "sites": []}
    total = cost["bit_operations"]
    options = {
        "model": model,
        "model_kwargs": {"depth": LAYERS},
        "method": method,
        "budget": budget,
        "data": "digits",
        "seed": seed,
        "epochs": epochs,
        "lr": 2e-4,
        "versions": {"qvit": "0.1.0", "torch": "2.15.0", "timm": "1.0.31", "python": "3.11"},
        "hardware": "2 CPU cores",
        "command": ["qvit", "train", "--method", method, "--seed", str(seed)],
    }
    write(directory / "config.json", {**options, **config})
    write(directory / "cost.json", cost)
    if method != "float":
        learning = method == "qvit" and killed
        specs = {
            site: {"bit_width": own if len(own) > 1 else own[0], "learn_bit_width": learning}
            for site, own in widths.items()
        }
        plan = {"format": "qvit-plan", "version": 1, "name": f"{method}-{budget}", "model": model, "sites": specs}
        write(directory / "plan.json", plan)
    lines = [json.dumps(event) for event in made_up_log(method, bits, seed, widths, total, epochs, steps)]
    if killed:
        half = len(lines) // 2
        lines = [*lines[:half], lines[half][:20]]
    else:
        result = {"version": 2, "accuracy": accuracy, "float_accuracy": 96.0, "bit_operations": total}
        result["seconds"] = {"train": 90.0, "total": 100.0 + seed}
        named = {key: options[key] for key in ("model", "method", "budget", "seed", "epochs")}
        write(directory / "result.json", {**named, **result, "weight_bytes": cost["weight_bytes"]})
    (directory / "log.jsonl").write_text("\n".join(lines) + ("" if killed else "\n"), encoding="utf-8")
    return directory


def made_up_log(
    method: str, bits: int, seed: int, widths: dict[str, list[int]], total: int, epochs: int, steps: int
) -> list[dict[str, Any]]:
    """The events of a run: two thirds of searching, the freeze, the rest with fixed widths."""
    rng = random.Random(seed)
    learned = method == "qvit"
    budget = None if method == "float" else int(total * 1.02)
    freeze, last = epochs * 2 // 3, epochs * steps
    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "time": 1.7e9 + seed * 1000, "epochs": epochs, "steps_per_epoch": steps}
        | {"budget_bit_operations": budget, "uniform_bit_operations": {str(b): b * b * 10 for b in range(2, 9)}}
    ]
    for epoch in range(epochs):
        for step in range(epoch * steps + 5, (epoch + 1) * steps + 1, 5):
            searched = min(1.0, step / (freeze * steps)) if learned else 1.0
            bops = total * (1.6 - 0.6 * searched + rng.uniform(-0.01, 0.01) * (searched < 1))
            loss = 2.3 * (1 - step / last) ** 2 + 0.3 + rng.uniform(0, 0.2)
            events.append(
                {"event": "step", "step": step, "epoch": epoch, "loss": loss, "task_loss": loss, "penalty": 0.0}
                | {"bit_operations": bops, "lr": 2e-4 * (1 - step / last), "images_per_second": 1000.0}
            )
        share = min(1.0, (epoch + 1) / freeze)
        now = {
            s: [(bits + 1) * (1 - share) + (w + 0.3 * (share < 1)) * share for w in own] for s, own in widths.items()
        }
        events.append(
            {"event": "epoch", "epoch": epoch, "step": (epoch + 1) * steps, "train_loss": 2.0 / (epoch + 1)}
            | {"accuracy": 50 + 40 * share + rng.uniform(0, 3), "bit_operations": total, "seconds": 1.0}
            | {"bit_widths": now if learned else {}}
        )
        if learned and epoch + 1 == freeze:
            changes = [
                {"site": site, "head": head if len(own) > 1 else None}
                | {"learned": width + 0.37 - (head == 1), "rounded": width - (head == 1), "final": width}
                for site, own in widths.items()
                for head, width in enumerate(own)
            ]
            events.append(
                {"event": "freeze", "step": freeze * steps, "epoch": epoch, "budget_bit_operations": budget}
                | {"bit_operations_learned": total * 1.04, "bit_operations_rounded": int(total * 0.97)}
                | {"bit_operations": total, "changes": changes}
            )
    return [*events, {"event": "end", "step": last, "accuracy": 90.0, "seconds": 100.0}]


def write_demo(directory: Path, **options: Any) -> Path:
    """A demo directory: the float model, and two methods at two budgets, three seeds each."""
    for (method, budget), accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(directory / "runs" / f"{method}-{budget}-seed{seed}", method, budget, seed, accuracy, **options)
    for seed in range(3):
        write_run(directory / "runs" / f"float-seed{seed}", "float", None, seed, 95.5 + seed * 0.5, **options)
    write(directory / "results.json", {"float_accuracy_mean": 96.0, "rows": []})
    return directory


def write(file: Path, data: Any) -> None:
    """Writes JSON."""
    file.write_text(json.dumps(data), encoding="utf-8")
