"""What each product takes at each pair of widths: the run behind `qvit bench --latency-table`.

    plans w2a2 ... w8a8  →  one engine for each, timed in turns  →  milliseconds of the whole model by pair of widths
                         →  divided over its products            →  a file for `qvit allocate --unit`

A product alone, timed in a loop, has its operands in the cache and nothing to wait for; the whole model is what someone
waits for. So the whole model is measured, and its time divided:

    profile   By the engine's own account (`profile`), scaled to the measured time. Kernels have their share; within a
              kernel, products have the shares of their MACs. Kernels without a product (LayerNorm) do not depend on the
              widths, but for noise: their mean over all plans is spread over all products by MACs, the same at every
              pair, so that the products of a plan add up to the model and none is preferred for it.
    macs      Where an engine has no profile: all products by their MACs, which takes from those that are slow for their
              size (attention) and gives to the others.

Products of two activations know one width of a plan: their time at a width is the mean over all plans that have it.
Where the products of a plan do not add up to what was measured of it, the file says by how much at most
(`largest_error`, a share), and so does the command.
"""

from __future__ import annotations

import logging
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qvit.allocate.latency import FORMAT, VERSION, Rates
from qvit.allocate.units import MILLISECONDS, Unit
from qvit.deploy.bench.lineup import PREFIX, Lineup, Packed, chosen
from qvit.deploy.bench.peers import Material
from qvit.deploy.bench.timing import Progress, batch_of, digits, measure, profiles, quartiles
from qvit.errors import QvitError, UsageError
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel, Matmul, Widths
from qvit.runs.bench import check, how_measured, open_bench
from qvit.runs.requests import BenchRequest

_log = logging.getLogger(__name__)
#: Widths of weights and of activations whose pairs are measured by default; others take the time of the next wider one.
WIDTHS = (2, 3, 4, 6, 8)
ENGINE = f"{PREFIX}native"
#: Layers that profiles call by other names.
_LAYERS = {"reduction": "patch merging"}
_UNIFORM = re.compile(r"w(\d+)a(\d+)")


@dataclass(frozen=True)
class Measured:
    """The whole model by a plan of one pair of widths.

    Attributes:
        widths: By site; in the blocks the same for all weights, and for all activations.
        milliseconds: The median.
        kernels: Milliseconds by kind of kernel, as the engine counts them; None if it does not.
    """

    widths: Widths
    milliseconds: float
    kernels: Mapping[str, float] | None = None


def latency_table(
    request: BenchRequest,
    *,
    notify: Callable[[str], None] = _log.info,
    progress: Progress = lambda text, done, total: None,
) -> dict[str, Any]:
    """Measures one engine of ours at pairs of widths.

    Args:
        request: The options of a benchmark: a float model, at most one engine, one batch size; plans of one width for
            weights and one for activations, by default all pairs of `WIDTHS`.
        notify: Receives one line per stage.
        progress: Called with a text, what is done and the total.

    Returns:
        The content of the file, see `qvit.allocate.latency`.

    Raises:
        UsageError: An invalid option.
        QvitError: A model that cannot be read, or that the engine does not run.
    """
    plans = request.plans or [f"w{weight}a{activation}" for weight in WIDTHS for activation in WIDTHS]
    request = request.model_copy(update={"plans": plans, "engines": request.engines or [ENGINE], "peers": False})
    names = _check(request)
    before = torch.get_num_threads()
    threads = request.threads or before
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="qvit-bench-") as folder:
            subject = open_bench(request, Path(folder), notify, progress)
            _check_pairs(subject.packed)
            lineup = Lineup(names, subject.packed, Material(subject.model, subject.calibration, threads, Path(folder)))
            images = batch_of(subject.judged, request.batches[0])
            started = lineup.start(images)
            if not started:
                raise QvitError(f"{names[0]} runs none of the plans: {lineup.skipped[0]['reason']}")
            limits = {name: getattr(request, name) for name in ("rounds", "seconds", "max_seconds")}
            report = lambda done, total: progress(f"{names[0]}, batch {len(images)}", done, total)  # noqa: E731
            times = measure({one.name: one.run for one in started}, images, **limits, progress=report)
            kernels = profiles(started, images, rounds=request.rounds)
    finally:
        torch.set_num_threads(before)
    plans = {packed.plan: packed.artifact.plan.widths() for packed in subject.packed}
    measured = [
        Measured(plans[str(one.plan)], 1000 * statistics.median(times.seconds[one.name]), kernels.get(one.name))
        for one in started
    ]
    cost = inspect_model(subject.model)
    divided_by, products = divided(cost, measured)
    unit = Unit(MILLISECONDS, products=products)
    rows = [
        {
            "plan": one.plan,
            "precision": one.precision,
            "milliseconds": digits(found.milliseconds),
            "milliseconds_quartiles": [digits(1000 * value) for value in quartiles(times.seconds[one.name])],
            "predicted_milliseconds": digits(unit.total(cost, found.widths)),
            "kernels": found.kernels,
        }
        for one, found in zip(started, measured, strict=True)
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": subject.name,
        "macs": cost.macs,
        "engine": names[0],
        "arithmetic": started[0].arithmetic,
        "threads": threads,
        "batch": len(images),
        "divided_by": divided_by,
        "largest_error": digits(max(abs(row["predicted_milliseconds"] / row["milliseconds"] - 1) for row in rows)),
        "plans": rows,
        "products": [
            {
                "left": matmul.left,
                "right": matmul.right,
                "milliseconds": {f"w{right}a{left}": digits(value) for (left, right), value in rates.items()},
            }
            for matmul, rates in products.items()
        ],
        "skipped": lineup.skipped,
        "images": subject.note,
        **how_measured(request),
    }


def _check(request: BenchRequest) -> list[str]:
    """The engine's name, in a list. Raises UsageError."""
    check(request)
    if Path(request.model).is_file():
        raise UsageError(f"a latency table is of plans of a float model: give its name, not the file {request.model}")
    if len(request.batches) != 1:
        raise UsageError("a latency table is for one batch size: give one --batch")
    if request.device != "cpu":
        raise UsageError("a latency table is measured on the CPU: leave --device out")
    if request.data or request.profile:
        raise UsageError("a latency table takes noise, and profiles of itself: leave --data and --profile out")
    names = chosen(request.engines)
    if len(names) != 1 or not names[0].startswith(PREFIX):
        raise UsageError(f"a latency table is of one engine of ours, such as {ENGINE}, not {', '.join(names)}")
    return names


def _check_pairs(packed: Sequence[Packed]) -> None:
    """Raises UsageError for plans that no table can be made of."""
    pairs = set()
    for one in packed:
        match = _UNIFORM.fullmatch(one.precision)
        if match is None:
            raise UsageError(
                f"plan {one.plan} is mixed: a latency table takes one width for weights, one for activations"
            )
        pairs.add((int(match[1]), int(match[2])))
    widest = tuple(map(max, zip(*pairs, strict=True)))
    if widest not in pairs:
        raise UsageError("a latency table needs the widest pair: add --plan w{}a{}".format(*widest))


def divided(cost: CostModel, measured: Sequence[Measured]) -> tuple[str, dict[Matmul, Rates]]:
    """The time of the whole model as that of its products.

    Args:
        cost: The model's costs.
        measured: At different pairs of widths.

    Returns:
        `profile` or `macs`, and milliseconds of every product by its two widths.
    """
    kernels = {matmul: kernel_of(matmul, cost) for matmul in cost.matmuls}
    needed = {kernels[matmul] for matmul in cost.matmuls if cost.sites[matmul.right].position == "block"}
    by_profile = all(needed <= {_first(kind) for kind in one.kernels or ()} for one in measured)
    if not by_profile:
        kernels = dict.fromkeys(cost.matmuls, "")
    macs: Counter[str] = Counter()
    for matmul, kernel in kernels.items():
        macs[kernel] += matmul.macs
    parts = [_parts(one, set(macs), by_profile) for one in measured]
    rest = statistics.fmean(part[None] for part in parts)
    products: dict[Matmul, Rates] = {}
    for matmul, kernel in kernels.items():
        share, spread = matmul.macs / macs[kernel], rest * matmul.macs / cost.macs
        times: dict[tuple[int, int], list[float]] = {}
        for one, part in zip(measured, parts, strict=True):
            pair = max(one.widths[matmul.left]), max(one.widths[matmul.right])
            times.setdefault(pair, []).append(part[kernel] * share + spread)
        products[matmul] = {pair: statistics.fmean(own) for pair, own in times.items()}
    return ("profile" if by_profile else "macs"), products


def _parts(one: Measured, kernels: set[str], by_profile: bool) -> dict[str | None, float]:
    """Milliseconds of the kernels that have products, and by None of all others; they add up to what was measured."""
    if not by_profile or one.kernels is None:
        return {"": one.milliseconds, None: 0.0}
    found: dict[str | None, float] = {**dict.fromkeys(kernels, 0.0), None: 0.0}
    scale = one.milliseconds / max(sum(one.kernels.values()), 1e-12)
    for kind, value in one.kernels.items():
        found[_first(kind) if _first(kind) in kernels else None] += scale * value
    return found


def kernel_of(matmul: Matmul, cost: CostModel) -> str:
    """The kind of kernel that computes a product, in the words of profiles."""
    site = cost.sites[matmul.right]
    if site.position != "block":
        return {"first": "patch embedding", "last": "head"}[site.position]
    layer = matmul.right.split(".")[-2]
    return "attention" if site.role == "activation" else _LAYERS.get(layer, layer)


def _first(kind: str) -> str:
    """`fc1` of `fc1+gelu`: what a fused kernel begins with."""
    return kind.split("+")[0]
