"""Run directories → plain data (`qvit.report.runs`): the only way in which the report learns anything.

A run directory holds `config.json` (what was asked), `plan.json` (the widths), `cost.json` (bit operations and
bytes), `log.jsonl` (one event a line) and, once the run has ended, `result.json`. Two kinds of trouble are told
apart:

- An interrupted run is normal. `result.json` is missing, the last line of the log is cut short, a resumed run has
  logged some steps twice: all of it loads, `Run.finished` is False, and of repeated lines the last per event and step
  counts.
- A directory that is no run, or a file that holds something else, is an error that names the file, the key and what
  belongs there.

Numbers of the log that are not finite become None, so a curve has a gap there; a result must be finite.
`qvit.documents` says what belongs into each file; a line of the log that is no such event is counted and left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from qvit.documents.base import Document, checked
from qvit.documents.log import EVENTS, OtherEvent, StartEvent
from qvit.documents.patches import Patches
from qvit.documents.run import Costs, Plan, Result, RunHead
from qvit.errors import QvitError
from qvit.files import MissingFile, parse_json, read_object, read_text
from qvit.report.runs import Log, Run
from qvit.report.sites import require_few

logger = logging.getLogger(__name__)

D = TypeVar("D", bound=Document)
#: The largest log that is read, and the longest line that counts: hundreds of epochs of the largest models.
LOG_LIMIT, LINE_LIMIT = 128 << 20, 8 << 20
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
    try:
        config = read_object(directory / "config.json", "config")
    except MissingFile:
        raise QvitError(
            f"{directory} is not a run directory: config.json is missing; a run directory holds {RUN_FILES}"
        ) from None
    head = checked(RunHead, config, f"the config {directory / 'config.json'}")
    result = _read(directory / "result.json", "result", Result)
    plan = _read(directory / "plan.json", "plan", Plan)
    sites = {site: spec for site, spec in plan.sites.items() if spec is not None} if plan else {}
    require_few(directory / "plan.json", {site: len(spec.bit_width) for site, spec in sites.items()})
    cost = _read(directory / "cost.json", "costs", Costs)
    require_few(directory / "cost.json", {row.site: 1 for row in cost.sites} if cost else {})
    said = result or head
    return Run(
        path=directory,
        model=head.model,
        method=head.method,
        budget=head.budget if said.budget is None else said.budget,
        seed=head.seed if said.seed is None else said.seed,
        config=config,
        plan_name=(plan.name or "plan") if plan else None,
        plan=sites,
        cost=cost,
        result=result,
        log=_read_log(directory / "log.jsonl"),
        patches=_read(directory / "patches.json", "patches", Patches),
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


def _read(file: Path, what: str, document: type[D]) -> D | None:
    """A document, or None if there is no such file."""
    try:
        return checked(document, document.upgraded(read_object(file, what)), f"the {what} {file}")
    except MissingFile:
        return None


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

    require_few(file, {site: len(own) for epoch in events["epoch"].values() for site, own in epoch.bit_widths.items()})
    require_few(file, {site: 1 for event in events["diagnostics"].values() for site in event.sites})
    ordered = {name: tuple(event for _, event in sorted(own.items())) for name, own in events.items()}
    start: StartEvent = (ordered["start"] or (StartEvent(),))[-1]
    epochs, per_epoch, uniform = start.epochs, start.steps_per_epoch, start.uniform_bit_operations or {}
    return Log(
        started=started,
        total_steps=None if epochs is None or per_epoch is None else epochs * per_epoch,
        steps_per_epoch=per_epoch or None,
        budget_bit_operations=start.budget_bit_operations,
        uniform_bit_operations={
            int(bits): cost for bits, cost in uniform.items() if re.fullmatch("[0-9]{1,2}", bits) and cost is not None
        },
        steps=ordered["step"],
        epochs=ordered["epoch"],
        diagnostics=ordered["diagnostics"],
        freeze=(ordered["freeze"] or (None,))[-1],
        failure=failure,
        last_step=last_step,
        unreadable_lines=unreadable,
    )


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
