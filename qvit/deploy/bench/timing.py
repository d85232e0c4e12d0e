"""How fast engines are beside each other: measured in one run, on the same images, with the same threads.

A machine slows down and speeds up while it is measured: its clock changes, others use it. So engines are not measured
one after the other but in rounds. In each round every engine has a turn of a few calls, and every other round goes
backwards, so that each engine follows each of its neighbours. A turn begins with a call that is not counted: the caches
are filled, and the threads of the engine before, which spin for a moment, come to rest. An engine whose single call is
longer than a turn is left without it.

Reported are the median and the quartiles of all counted calls, and ratios of medians. Since a fast engine may be wrong,
every row also says how its answers agree with those of the float model. A peer is *right* where at least `RIGHT`
percent of them are the same, or where features have a mean cosine of at least `RIGHT_COSINE` with the float model's;
the fastest right peer is what an engine of ours has to be compared with. Of answers to noise, or of untrained weights,
nothing like that is said.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qvit.deploy.bench.peers.base import Runner
from qvit.errors import UsageError
from qvit.measure.features import cosine_distances

#: What ratios are relative to: key of the row → name of the engine.
REFERENCES = {"ratio_to_openvino_int8": "openvino-int8", "ratio_to_pytorch_fp32": "pytorch-fp32"}
#: From this share of first classes that are the float model's, in percent, a peer counts as right.
RIGHT = 95.0
#: From this mean cosine with the float model's features on, for models that answer with features.
RIGHT_COSINE = 0.99
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Contender:
    """An engine that is started for one batch size.

    Attributes:
        engine: `openvino`, `qvit-torch`.
        precision: `int8`, `w8a8`.
        arithmetic: What is computed in which format, in words.
        run: Answers a batch of images (B, channels, height, width) with logits (B, classes), or with features.
        file_bytes: Size of its model's files; None if unknown.
        ours: Whether it runs the quantized model of qvit.
        plan: Name of that model's plan.
        profile: From a batch to milliseconds by kind of kernel, for engines that can tell.
    """

    engine: str
    precision: str
    arithmetic: str
    run: Runner
    file_bytes: int | None = None
    ours: bool = False
    plan: str | None = None
    profile: Callable[[Tensor], Mapping[str, float]] | None = None

    @property
    def name(self) -> str:
        """`openvino-int8`; ours are `qvit-native w4a4`, by their plan."""
        return f"{self.engine} {self.plan}" if self.ours else f"{self.engine}-{self.precision}"


@dataclass
class Times:
    """What `measure` found.

    Attributes:
        seconds: Of each counted call, by name.
        rounds: How many rounds were begun and finished.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0


def measure(
    runners: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor,
    *,
    rounds: int = 10,
    seconds: float = 2.0,
    max_seconds: float = 300.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> Times:
    """Times every runner on the images, interleaved in rounds.

    Args:
        runners: What is timed, by name. They are started and warm: the first call of each is not treated otherwise.
        images: A batch, the same in each call.
        rounds: How many rounds, unless the time is over before.
        seconds: Least time of the counted calls of each runner, over all rounds.
        max_seconds: No further round begins if it is likely to end after this time. The first one always takes place.
        clock: Says the time, in seconds.
        progress: Called after each turn with the number of turns done and planned.

    Raises:
        UsageError: No runners, or limits that are not positive.
    """
    if not runners:
        raise UsageError("there is no engine to measure")
    if rounds < 1 or seconds <= 0 or max_seconds <= 0:
        raise UsageError(f"rounds and seconds must be positive, not {rounds}, {seconds} and at most {max_seconds}")
    turn, started, longest = seconds / rounds, clock(), 0.0
    times = Times({name: [] for name in runners})
    while times.rounds < rounds:
        begun = clock()
        if times.rounds and begun - started + longest > max_seconds:
            break
        order = list(runners)[:: 1 if times.rounds % 2 == 0 else -1]
        for position, name in enumerate(order, 1):
            _take_turn(runners[name], images, turn, times.seconds[name], clock)
            if progress is not None:
                progress(times.rounds * len(runners) + position, rounds * len(runners))
        longest = max(longest, clock() - begun)
        times.rounds += 1
    return times


def _take_turn(
    runner: Callable[[Tensor], Any], images: Tensor, turn: float, found: list[float], clock: Callable[[], float]
) -> None:
    """Calls the runner until `turn` seconds are counted, once at least, and appends the seconds of each call."""
    if not found or found[-1] < turn:
        runner(images)
    spent = 0.0
    while spent < turn:
        before = clock()
        runner(images)
        found.append(clock() - before)
        spent += max(found[-1], 1e-9)


def answers(run: Runner, images: Tensor, batch: int) -> Tensor:
    """Logits (N, classes) or features, fp32, of N images in batches of exactly `batch`; the last one is padded."""
    found = []
    for part in images.split(batch):
        padded = part if len(part) == batch else _filled(part, batch)
        found.append(run(padded)[: len(part)].detach().float().clone())
    return torch.cat(found)


def batch_of(images: Tensor, batch: int) -> Tensor:
    """A batch of that size from the images, repeated where there are too few."""
    return _filled(images, batch).clone()


def compare(found: Tensor, reference: Tensor) -> dict[str, float]:
    """How two sets of logits (N, classes) agree.

    Returns:
        `top1`: images with the same first class, in percent. `error`: root mean square of the difference, divided by
        that of the reference around its mean over classes; 0 is equal, 1 is as far off as an answer without content.
        Infinite or undefined logits count as error 1e9, and as wrong.
    """
    finite = torch.isfinite(found).all(dim=-1)
    same = (found.argmax(-1) == reference.argmax(-1)) & finite
    if not bool(finite.all()):
        return {"top1": 100.0 * float(same.double().mean()), "error": 1e9}
    spread = (reference - reference.mean(dim=-1, keepdim=True)).double().norm()
    error = (found - reference).double().norm() / spread.clamp_min(1e-12)
    return {"top1": 100.0 * float(same.double().mean()), "error": float(error)}


def compare_features(found: Tensor, reference: Tensor) -> dict[str, float]:
    """How two sets of features (N, ..., C) agree: the mean `cosine` over images and tokens, and the relative `error`.

    Infinite or undefined features count as cosine -1 and error 1e9.
    """
    if not bool(torch.isfinite(found).all()):
        return {"cosine": -1.0, "error": 1e9}
    error = (found - reference).double().norm() / reference.double().norm().clamp_min(1e-12)
    return {"cosine": 1 - float(cosine_distances(reference, found).mean()), "error": float(error)}


def profiles(contenders: Sequence[Contender], images: Tensor, *, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by kind of kernel, medians over rounds, of those who can tell, by name.

    Every round asks each of them once. A kind that is missing in a round took no time in it.
    """
    asked = {one.name: one.profile for one in contenders if one.profile is not None}
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, profile in asked.items():
            found[name].append(profile(images))
    kinds = {name: dict.fromkeys(kind for one in own for kind in one) for name, own in found.items()}
    return {
        name: {kind: digits(statistics.median(one.get(kind, 0.0) for one in own)) for kind in kinds[name]}
        for name, own in found.items()
    }


def rows_of(
    contenders: Sequence[Contender], times: Times, batch: int, logits: Mapping[str, Tensor], floats: Tensor,
    simulated: Mapping[str, Tensor], *, judged: bool, kernels: Mapping[str, Mapping[str, float]],
    features: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one batch size, as plain data.

    Args:
        contenders: In the order of the rows.
        times: What `measure` found for them.
        batch: The batch size.
        logits: What each answered to the same images, by name (N, classes), or features (N, ..., C).
        floats: What the float model answered.
        simulated: What the fake-quantized model of each plan answered, by the plan's name.
        judged: Whether answers tell which peer is right: images and weights are real.
        kernels: Milliseconds by kind of kernel, by name, see `profiles`.
        features: Whether answers are features.
    """
    compared, key, least = (compare_features, "cosine", RIGHT_COSINE) if features else (compare, "top1", RIGHT)
    medians = {one.name: statistics.median(times.seconds[one.name]) for one in contenders}
    agreements = {one.name: compared(logits[one.name], floats) for one in contenders}
    right = {one.name: agreements[one.name][key] >= least for one in contenders if judged and not one.ours}
    fastest = min((medians[name] for name, is_right in right.items() if is_right), default=None)
    rows = []
    for one in contenders:
        seconds, median = times.seconds[one.name], medians[one.name]
        to_float = agreements[one.name]
        fake = simulated.get(one.plan) if one.plan is not None else None
        to_ours = None if fake is None else compared(logits[one.name], fake)
        ratios = {
            key: digits(median / medians[reference]) if reference in medians else None
            for key, reference in REFERENCES.items()
        }
        rows.append(
            {
                "engine": one.engine,
                "precision": one.precision,
                "plan": one.plan,
                "batch": batch,
                "milliseconds_median": digits(1000 * median),
                "milliseconds_quartiles": [digits(1000 * value) for value in quartiles(seconds)],
                **ratios,
                "ratio_to_right_peer": None if fastest is None else digits(median / fastest),
                "images_per_second": digits(batch / median),
                "calls": len(seconds),
                "rounds": times.rounds,
                "top1_agreement": None if features else round(to_float["top1"], 2),
                "right": right.get(one.name),
                "error_to_float": digits(to_float["error"]),
                "agreement_with_simulated": None if features or to_ours is None else round(to_ours["top1"], 2),
                "error_to_simulated": None if to_ours is None else digits(to_ours["error"]),
                "arithmetic": one.arithmetic,
                "file_bytes": one.file_bytes,
                "ours": one.ours,
                "kernels": kernels.get(one.name),
                **({"cosine_to_float": digits(to_float["cosine"])} if features else {}),
                **({"cosine_to_simulated": digits(to_ours["cosine"])} if features and to_ours else {}),
            }
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile, interpolated."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _filled(images: Tensor, batch: int) -> Tensor:
    """The first `batch` of the images, taken again from the beginning where there are too few."""
    return images[torch.arange(batch) % len(images)]


def digits(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")
