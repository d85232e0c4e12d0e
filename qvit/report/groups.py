"""Runs grouped over seeds: what the tables have a row for, and the figures a colour.

A group is what differs in nothing but the seed: data, model, method, and budget (runs without a budget are told apart
by the name of their plan). Only finished runs count.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qvit.documents.run import Result
from qvit.report.runs import Run

METHODS = ("float", "lsq", "lsq+")
#: Options in which runs of one setting may differ: their float weights belong to a seed, the rest changes no result.
NO_SETTING = frozenset(
    "weights method_options started data_note class_names threads workers device log_every checkpoint_every".split()
)
LONGEST_OPTION = 2000
#: What a page says elsewhere.
NO_OPTION = frozenset("versions hardware command seed out output resume model method budget data".split())


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        runs: The runs, by seed; unfinished ones too.
        label: Short name, with the model or the data only where the report has several.
        index: Position among the groups that are not float (the colour of the group); -1 for float.
        peers: What must be equal for a comparison of methods: data, model, budget.
        setting: Options that tell the group from others of the same method, such as `head_wise=false`; else empty.
    """

    runs: tuple[Run, ...]
    label: str
    index: int
    peers: tuple[str, ...]
    setting: str = ""

    @property
    def first(self) -> Run:
        """A run that stands for what all have in common."""
        return self.runs[0]

    @property
    def is_float(self) -> bool:
        """Whether these are runs of the float model."""
        return self.first.method == "float"

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def results(self) -> tuple[Result, ...]:
        """The results of the runs that count."""
        return tuple(run.result for run in self.runs if run.result is not None)

    @property
    def accuracies(self) -> list[float]:
        """Those of the runs that count; none where a run was judged without labels."""
        found = [result.accuracy for result in self.results if result.accuracy is not None]
        return found if len(found) == len(self.results) else []

    @property
    def with_widths(self) -> tuple[Run, ...]:
        """The runs whose widths mean something: finished ones if there are any."""
        return tuple(run for run in self.finished if run.plan) or tuple(run for run in self.runs if run.plan)

    def name_of(self, run: Run) -> str:
        """The name of one of the runs: that of the group, and the seed."""
        return self.label + ("" if run.seed is None else f" · seed {run.seed}")


def runs_of(groups: Iterable[Group]) -> list[tuple[Group, Run]]:
    """All runs, each with its group."""
    return [(group, run) for group in groups for run in group.runs]


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is 0.0. Raises on an empty sequence."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs over seeds: by model, float first, then from the largest budget to the smallest, then by method."""
    keys: dict[tuple[str, ...], list[Run]] = {}
    costs: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        keys.setdefault((*_peers(run), run.method), []).append(run)
        cost = run.result.bit_operations if run.result else run.log.budget_bit_operations
        costs.setdefault(_peers(run), []).append(cost or 0.0)
    split: dict[tuple[str, ...], list[Run]] = {}
    for key, members in keys.items():
        for run, setting in zip(members, _settings(members), strict=True):
            split.setdefault((*key, setting), []).append(run)

    def order(key: tuple[str, ...]) -> tuple[Any, ...]:
        data, model, constraint, method, setting = key
        rank = METHODS.index(method) if method in METHODS else len(METHODS) + (method == "qvit")
        return data, model, method != "float", -statistics.fmean(costs[key[:3]]), constraint, rank, method, setting

    names = short_names(runs)
    groups, index = [], 0
    for key in sorted(split, key=order):
        members = sorted(split[key], key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
        is_float = key[3] == "float"
        label = " · ".join(part for part in (names[key[:2]], key[3], key[2], key[4]) if part)
        groups.append(Group(tuple(members), label, -1 if is_float else index, key[:3], key[4]))
        index += not is_float
    return groups


def common_options(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The options that all runs share, and those that differ (the values by run); seeds are no options."""
    shared, differing = {}, {}
    for key in dict.fromkeys(key for run in runs for key in run.config if key not in NO_OPTION):
        texts = [_option_text(run.config.get(key)) for run in runs]
        if len(set(texts)) == 1:
            shared[key] = texts[0]
        else:
            differing[key] = texts
    return shared, differing


def _option_text(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_OPTION else f"{text[:LONGEST_OPTION]}…"


def _settings(runs: Sequence[Run]) -> list[str]:
    """For each run of one method what tells it from the others, such as `head_wise=false`; else empty."""
    _, differing = common_options(runs)
    options = [run.config.get("method_options") or {} for run in runs]
    for key in dict.fromkeys(key for own in options for key in own):
        differing[key] = [_option_text(own.get(key)) for own in options]
    told = {key: texts for key, texts in differing.items() if key not in NO_SETTING and len(set(texts)) > 1}
    return [", ".join(f"{key}={texts[position]}" for key, texts in told.items()) for position in range(len(runs))]


def _peers(run: Run) -> tuple[str, ...]:
    kwargs = run.config.get("model_kwargs")
    model = run.model + (" " + json.dumps(kwargs, sort_keys=True) if kwargs else "")
    constraint = "" if run.method == "float" else run.budget or run.plan_name or ""
    return str(run.config.get("data") or ""), model, constraint


def short_names(runs: Sequence[Run]) -> dict[tuple[str, ...], str]:
    """What must precede a label so that models and data sets are told apart."""
    pairs = list(dict.fromkeys(_peers(run)[:2] for run in runs))
    data, models = ({pair[position] for pair in pairs} for position in (0, 1))
    return {
        pair: " · ".join(part for part, differs in zip(pair, (len(data) > 1, len(models) > 1), strict=True) if differs)
        for pair in pairs
    }
