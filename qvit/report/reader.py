"""Run directories → plain data (`qvit.report.runs`): the only way in which the report learns anything.

A run directory holds `config.json` (what was asked), `plan.json` (the widths), `cost.json` (bit operations and
bytes), `log.jsonl` (one event a line) and, once the run has ended, `result.json`. Two kinds of trouble are told
apart:

- An interrupted run is normal. `result.json` is missing, the last line of the log is cut short, a resumed run has
  logged some steps twice: all of it loads, `Run.finished` is False, and of repeated lines the last per event and step
  counts.
- A directory that is no run, or a file that holds something else, is an error that names the file, the key and what
  belongs there.

Numbers of the log that are not finite become None, so a curve has a gap there; a result must be finite. What belongs
into each file says `qvit.documents`; a line of the log that is no such event is counted and left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qvit.documents import (
    EVENTS,
    Costs,
    Document,
    FreezeEvent,
    OtherEvent,
    Plan,
    Result,
    RunHead,
    StartEvent,
    read_document,
)
from qvit.errors import QvitError
from qvit.files import MissingFile, parse_json, read_text
from qvit.report.runs import (
    Change,
    Cost,
    Diagnostics,
    Epoch,
    Freeze,
    Log,
    Run,
    SiteCost,
    SitePlan,
    Step,
    WeightRecord,
)
from qvit.report.runs import Result as Outcome
from qvit.report.sites import problem_of

logger = logging.getLogger(__name__)

#: The largest log that is read, and the longest line that counts: hundreds of epochs of the largest models.
LOG_LIMIT, LINE_LIMIT = 128 << 20, 8 << 20
_BITS = re.compile("[0-9]{1,2}")
RUN_FILES = "config.json, plan.json, cost.json, log.jsonl and, once the run has ended, result.json"


def load_run(path: str | Path) -> Run:
    """Reads one run directory.

    Args:
        path: The directory that a training run was told to write to.

    Raises:
        QvitError: If it is not a run directory, or a file in it holds something else than it should.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise QvitError(f"no run directory at {directory}: a run directory holds {RUN_FILES}")
    config = _read(directory / "config.json", "config", RunHead)
    if config is None:
        raise QvitError(
            f"{directory} is not a run directory: config.json is missing; a run directory holds {RUN_FILES}"
        )
    result = _read(directory / "result.json", "result", Result)
    plan_name, plan = _read_plan(directory / "plan.json")
    said = config | {key: value for key, value in (result or {}).items() if value is not None}
    return Run(
        path=directory,
        model=config["model"],
        method=config["method"],
        budget=said.get("budget"),
        seed=said.get("seed"),
        config=config,
        plan_name=plan_name,
        plan=plan,
        cost=_read_cost(directory / "cost.json"),
        result=None if result is None else _parse_result(result),
        log=_read_log(directory / "log.jsonl"),
    )


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Reads several run directories, each once.

    Args:
        paths: Run directories, or directories with a `runs` folder full of them (the output of `qvit demo`).

    Raises:
        QvitError: If a path holds no run, or a run cannot be read.
    """
    directories: dict[Path, Path] = {}
    for path in map(Path, paths):
        found = [path]
        if not (path / "config.json").exists() and (path / "runs").is_dir():
            inside = sorted(entry for entry in (path / "runs").iterdir() if entry.is_dir())
            found = [entry for entry in inside if (entry / "config.json").exists()]
            for entry in inside:
                if entry not in found:
                    logger.warning("%s is left out: it has no config.json (stopped before it started?)", entry)
            if not found:
                raise QvitError(f"no run in {path / 'runs'}: each of its folders should hold {RUN_FILES}")
        directories |= {entry.resolve(): entry for entry in found}
    if not directories:
        raise QvitError("no run given: name at least one run directory")
    return [load_run(directory) for directory in directories.values()]


def _read(file: Path, what: str, document: type[Document]) -> dict[str, Any] | None:
    """The content of a document, or None if there is no such file."""
    try:
        return read_document(document, file, what)
    except MissingFile:
        return None


def _read_plan(file: Path) -> tuple[str | None, dict[str, SitePlan]]:
    data = _read(file, "plan", Plan)
    if data is None:
        return None, {}
    plan = {
        name: SitePlan(_tuple(spec["bit_width"]), spec.get("learn_bit_width") is True)
        for name, spec in data.get("sites", {}).items()
        if spec is not None
    }
    _require_few(file, {site: len(own.bit_widths) for site, own in plan.items()})
    return data.get("name") or "plan", plan


def _require_few(file: Path, sites: Mapping[str, int]) -> None:
    if problem := problem_of(sites):
        raise QvitError(f"{file} has {problem}")


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _read_cost(file: Path) -> Cost | None:
    data = _read(file, "costs", Costs)
    if data is None:
        return None
    keys = ("macs", "bit_operations", "weight_bytes")
    sites = tuple(SiteCost(row["site"], *(row[key] for key in keys)) for row in data.get("sites", []))
    _require_few(file, {site.site: 1 for site in sites})
    return Cost(*(data[key] for key in keys), sites=sites)


def _parse_result(data: Mapping[str, Any]) -> Outcome:
    return Outcome(
        accuracy=data["accuracy"],
        bit_operations=data["bit_operations"],
        weight_bytes=data["weight_bytes"],
        float_accuracy=data.get("float_accuracy"),
        seconds=data["seconds"].get("total"),
    )


def _read_log(file: Path) -> Log:
    try:
        lines = read_text(file, "log", limit=LOG_LIMIT, errors="replace").splitlines()
    except MissingFile:
        return Log()
    events: dict[str, dict[int, Any]] = {name: {} for name in EVENTS}
    read, unreadable, last_step, started, failure = 0, 0, 0, None, None
    for line in filter(str.strip, lines):
        event = _parse_event(line)
        if event is None:
            unreadable += 1
            continue
        name, parsed = event
        read += 1
        if name in events:
            events[name][parsed.step] = parsed
        last_step = max(last_step, parsed.step)
        failure = (parsed.reason or "no reason given") if name == "failed" else None
        if name == "start" and started is None:
            started = parsed.time
    if unreadable and not read:
        raise QvitError(f'{file} is not a log: none of its {unreadable} lines is a JSON object with an "event"')

    widths = {site: len(own) for e in events["epoch"].values() for site, own in (e.bit_widths or {}).items()}
    _require_few(file, widths)
    _require_few(file, {site: 1 for e in events["diagnostics"].values() for site in e.sites or ()})

    def of(name: str) -> list[Any]:
        return [event for _, event in sorted(events[name].items())]

    start = (of("start") or [StartEvent()])[-1]
    uniform = start.uniform_bit_operations or {}
    return Log(
        started=started,
        total_steps=None if None in (start.steps_per_epoch, start.epochs) else start.steps_per_epoch * start.epochs,
        steps_per_epoch=start.steps_per_epoch or None,
        budget_bit_operations=start.budget_bit_operations,
        uniform_bit_operations={
            int(bits): cost for bits, cost in uniform.items() if _BITS.fullmatch(bits) and cost is not None
        },
        steps=tuple(
            Step(e.step, e.loss, e.task_loss, e.penalty, e.bit_operations, e.lr) for e in of("step")
        ),
        epochs=tuple(
            Epoch(
                e.epoch, e.step, e.train_loss, e.accuracy, e.bit_operations,
                {site: tuple(own) for site, own in (e.bit_widths or {}).items()},
            )
            for e in of("epoch")
        ),
        diagnostics=tuple(
            Diagnostics(
                e.step,
                {s: WeightRecord(w.oscillating, w.variation, w.outliers) for s, w in (e.sites or {}).items()},
            )
            for e in of("diagnostics")
        ),
        freeze=next((_freeze(event) for event in reversed(of("freeze"))), None),
        failure=failure,
        last_step=last_step,
        unreadable_lines=unreadable,
    )  # fmt: skip


def _parse_event(line: str) -> tuple[str, Any] | None:
    """Name and content of a line; None if it is no event."""
    if len(line) > LINE_LIMIT:
        return None
    try:
        data = parse_json(line, gaps=True)
        name = data["event"]
        return name, EVENTS.get(name, OtherEvent).model_validate(data)
    except (ValueError, KeyError, TypeError):  # ValidationError of pydantic is a ValueError
        return None


def _freeze(event: FreezeEvent) -> Freeze:
    return Freeze(
        event.step,
        event.budget_bit_operations,
        event.bit_operations_learned,
        event.bit_operations_rounded,
        event.bit_operations,
        tuple(Change(c.site, c.head, c.learned, c.rounded, c.final) for c in event.changes or ()),
    )
