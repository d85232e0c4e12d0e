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
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qvit.errors import QvitError
from qvit.report.runs import (
    Change,
    Cost,
    Diagnostics,
    Epoch,
    Freeze,
    Log,
    Result,
    Run,
    SiteCost,
    SitePlan,
    Step,
    WeightRecord,
)

logger = logging.getLogger(__name__)

PLAN_FORMAT, PLAN_VERSION = "qvit-plan", 1
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
    config = _read_object(directory / "config.json")
    if config is None:
        raise QvitError(
            f"{directory} is not a run directory: config.json is missing; a run directory holds {RUN_FILES}"
        )
    result = _read_object(directory / "result.json")
    plan_name, plan = _read_plan(directory / "plan.json")
    for key in ("model", "method"):
        if not isinstance(config.get(key), str):
            raise QvitError(f'{directory / "config.json"}: "{key}" must be a string, not {config.get(key)!r}')
    said = {**config, **{key: value for key, value in (result or {}).items() if value is not None}}
    budget, seed = said.get("budget"), said.get("seed")
    return Run(
        path=directory,
        model=config["model"],
        method=config["method"],
        budget=None if budget is None else str(budget),
        seed=seed if isinstance(seed, int) else None,
        config=config,
        plan_name=plan_name,
        plan=plan,
        cost=_read_cost(directory / "cost.json"),
        result=None if result is None else _parse_result(directory / "result.json", result),
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


def _read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no such file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise QvitError(f"cannot read {file}: {error}") from None
    if not isinstance(data, dict):
        raise QvitError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return data


def _number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _required(file: Path, data: Mapping[str, Any], key: str) -> float:
    value = _number(data.get(key))
    if value is None:
        raise QvitError(f'{file}: "{key}" must be a finite number, not {data.get(key)!r}')
    return value


def _numbers(value: Any) -> tuple[float, ...]:
    """One number or a list of them as a tuple; empty if it is anything else."""
    numbers = [_number(entry) for entry in (value if isinstance(value, list) else [value])]
    return () if None in numbers else tuple(entry for entry in numbers if entry is not None)


def _read_plan(file: Path) -> tuple[str | None, dict[str, SitePlan]]:
    data = _read_object(file)
    if data is None:
        return None, {}
    if data.get("format") != PLAN_FORMAT or data.get("version") != PLAN_VERSION:
        raise QvitError(
            f'{file} must have "format": "{PLAN_FORMAT}" and "version": {PLAN_VERSION}, '
            f"not {data.get('format')!r} and {data.get('version')!r}"
        )
    sites = data.get("sites", {})
    if not isinstance(sites, dict):
        raise QvitError(f'{file}: "sites" must be an object')
    plan = {}
    for name, spec in sites.items():
        if spec is None:
            continue
        widths = _numbers(spec.get("bit_width")) if isinstance(spec, dict) else ()
        if not widths or any(width != int(width) for width in widths):
            raise QvitError(
                f'{file}: site "{name}" needs a "bit_width": an integer or a list of integers, one per head'
            )
        plan[name] = SitePlan(tuple(int(width) for width in widths), spec.get("learn_bit_width") is True)
    return str(data.get("name", "plan")), plan


def _read_cost(file: Path) -> Cost | None:
    data = _read_object(file)
    if data is None:
        return None
    rows = data.get("sites", [])
    named = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("site"), str) for row in rows)
    if not named:
        raise QvitError(f'{file}: "sites" must be a list of objects with a "site"')
    keys = ("macs", "bit_operations", "weight_bytes")
    sites = tuple(SiteCost(row["site"], *(int(_required(file, row, key)) for key in keys)) for row in rows)
    return Cost(*(int(_required(file, data, key)) for key in keys), sites=sites)


def _parse_result(file: Path, data: Mapping[str, Any]) -> Result:
    return Result(
        accuracy=_required(file, data, "accuracy"),
        bit_operations=int(_required(file, data, "bit_operations")),
        weight_bytes=int(_required(file, data, "weight_bytes")),
        float_accuracy=_number(data.get("float_accuracy")),
        seconds=_number(data.get("seconds_total", data.get("seconds"))),
    )


def _read_log(file: Path) -> Log:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return Log()
    except OSError as error:
        raise QvitError(f"cannot read {file}: {error}") from None
    events: dict[tuple[str, int], dict[str, Any]] = {}
    unreadable, last_step, started, failure = 0, 0, None, None
    for line in filter(str.strip, lines):
        try:
            event = json.loads(line)
            name, step = event["event"], int(_number(event.get("step")) or 0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            unreadable += 1
            continue
        events[str(name), step] = event
        last_step = max(last_step, step)
        failure = str(event.get("reason", "no reason given")) if name == "failed" else None
        if name == "start" and started is None:
            started = _number(event.get("time"))
    if unreadable and not events:
        raise QvitError(f'{file} is not a log: none of its {unreadable} lines is a JSON object with an "event"')

    def of(name: str) -> list[dict[str, Any]]:
        return [event for (kind, _), event in sorted(events.items(), key=lambda item: item[0][1]) if kind == name]

    start = (of("start") or [{}])[-1]
    per_epoch, epochs = _number(start.get("steps_per_epoch")), _number(start.get("epochs"))
    uniform = start.get("uniform_bit_operations")
    uniform = uniform if isinstance(uniform, dict) else {}
    return Log(
        started=started,
        total_steps=None if per_epoch is None or epochs is None else int(per_epoch * epochs),
        steps_per_epoch=None if not per_epoch else int(per_epoch),
        budget_bit_operations=_number(start.get("budget_bit_operations")),
        uniform_bit_operations={
            int(bits): cost
            for bits, value in uniform.items()
            if bits.isdecimal() and (cost := _number(value)) is not None
        },
        steps=tuple(_parse_step(event) for event in of("step")),
        epochs=tuple(_parse_epoch(event) for event in of("epoch")),
        diagnostics=tuple(_parse_diagnostics(event) for event in of("diagnostics")),
        freeze=next((_parse_freeze(event) for event in reversed(of("freeze"))), None),
        failure=failure,
        last_step=last_step,
        unreadable_lines=unreadable,
    )


def _parse_step(event: Mapping[str, Any]) -> Step:
    keys = ("loss", "task_loss", "penalty", "bit_operations", "lr")
    return Step(int(_number(event.get("step")) or 0), *(_number(event.get(key)) for key in keys))


def _parse_epoch(event: Mapping[str, Any]) -> Epoch:
    widths = event.get("bit_widths")
    widths = widths if isinstance(widths, dict) else {}
    return Epoch(
        epoch=int(_number(event.get("epoch")) or 0),
        step=int(_number(event.get("step")) or 0),
        train_loss=_number(event.get("train_loss")),
        accuracy=_number(event.get("accuracy")),
        bit_operations=_number(event.get("bit_operations")),
        bit_widths={site: parsed for site, values in widths.items() if (parsed := _numbers(values))},
    )


def _parse_diagnostics(event: Mapping[str, Any]) -> Diagnostics:
    sites = event.get("sites")
    rows = {site: row for site, row in sites.items() if isinstance(row, dict)} if isinstance(sites, dict) else {}
    keys = ("oscillating", "variation", "outliers")
    return Diagnostics(
        int(_number(event.get("step")) or 0),
        {site: WeightRecord(*(_number(row.get(key)) for key in keys)) for site, row in rows.items()},
    )


def _parse_freeze(event: Mapping[str, Any]) -> Freeze:
    changes = []
    rows = event.get("changes")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict):
            continue
        learned, rounded, final = (_number(row.get(key)) for key in ("learned", "rounded", "final"))
        if learned is not None and rounded is not None and final is not None:
            head = row.get("head")
            head = head if isinstance(head, int) else None
            changes.append(Change(str(row.get("site")), head, learned, int(rounded), int(final)))
    keys = ("budget_bit_operations", "bit_operations_learned", "bit_operations_rounded", "bit_operations")
    return Freeze(
        int(_number(event.get("step")) or 0), *(_number(event.get(key)) for key in keys), changes=tuple(changes)
    )
