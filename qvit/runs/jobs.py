"""Many runs in several processes, each a run directory under one folder; what is finished there is not run again.

The demo and the accuracy benchmarks are lists of such jobs. One job is one config; it may start from the weights or the
plan of another. A list that was stopped goes on where it was, and a job whose config has changed is run anew, together
with those that started from it. A job that fails takes with it those that start from it; the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qvit.errors import QvitError
from qvit.locks import writer_of, writing
from qvit.runs.directory import LOG, RESULT, forget_progress, read_config, written
from qvit.runs.run import resume, train
from qvit.training.checkpoint import last_checkpoint
from qvit.training.config import TrainConfig

#: Seconds that a process may take to end after the one that it works for is gone.
GRACE = 30
#: Set while this process of a pool runs a job.
_AT_WORK = threading.Event()


def work(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process of the pool: resumed if it can be."""
    folder, config = Path(run), TrainConfig.create(**values)
    if last_checkpoint(folder) and not (folder / RESULT).is_file():
        return resume(folder, quiet=True)
    return train(config, folder, overwrite=True, quiet=True)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: Its directory's name.
        config: Its options.
        after: The job that it starts from; None for none.
        work: What runs it, given its directory and its options; a function that other processes can import.
    """

    name: str
    config: TrainConfig
    after: str | None = None
    work: Callable[[str, dict[str, Any]], dict[str, Any]] = work


def run_jobs(
    runs: Path, listed: list[Job], *, workers: int | None = None, overwrite: bool = False, console: Console
) -> bool:
    """Runs what is missing of `listed`, and says whether there was anything.

    Args:
        runs: Folder of the run directories, which have the jobs' names.
        listed: Jobs; each after the one that it starts from.
        workers: Processes; None: one per core.
        overwrite: Runs everything again.
        console: Where progress goes.

    Raises:
        BeingWritten: Another list is at work in this folder.
        QvitError: Jobs failed, told when all others are done.
    """
    with writing(runs):
        return _run_missing(runs, listed, workers, overwrite, console)


def _run_missing(runs: Path, listed: list[Job], workers: int | None, overwrite: bool, console: Console) -> bool:
    begun = [runs / job.name for job in listed if (runs / job.name).is_dir()]
    for run in begun:  # processes of a list that was killed may be saving
        if writer := writer_of(run):
            console.print(f"waiting for {writer}, which writes in {run}", markup=False, highlight=False)
        with written(run, patience=2 * GRACE):
            pass
    again = {job.name for job in listed if overwrite or not _same_config(runs / job.name, job.config)}
    again |= {job.name for job in listed if job.after in again}  # what started from other weights is another run
    for run in begun:
        if run.name in again:
            with written(run):
                forget_progress(run)
    todo = [job for job in listed if not (runs / job.name / RESULT).is_file()]
    if todo:
        processes = min(workers or os.cpu_count() or 1, len(todo))
        console.print(f"{len(todo)} training runs in {processes} process(es), one thread each", highlight=False)
        _run_all(runs, todo, processes, console)
    return bool(todo)


def _same_config(run: Path, config: TrainConfig) -> bool:
    try:
        _, record = read_config(run)
    except QvitError:
        return False
    wanted = config.model_dump(mode="json")
    for values in (record, wanted):  # the folder may have been moved
        values["weights"] = values.get("weights") and Path(values["weights"]).name
        values["plan"] = values.get("plan") and Path(values["plan"]).parts[-2:]
    return all(record.get(key) == value for key, value in wanted.items())


def _run_all(runs: Path, todo: list[Job], workers: int, console: Console) -> None:
    """Runs the jobs, each as soon as the one that it starts from is done."""
    total = sum(job.config.epochs for job in todo)
    waiting = {job.name: job for job in todo}
    active: dict[Future[dict[str, Any]], Job] = {}
    failed: dict[str, str] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    pool_of = ProcessPoolExecutor(min(workers, len(todo)), mp_context=_context(), initializer=_end_with_parent)
    with bar, pool_of as pool:
        task = bar.add_task("training", total=total)
        try:
            while waiting or active:
                while lost := next((job for job in waiting.values() if job.after in failed), None):
                    failed[lost.name] = f"not run, because {lost.after} failed"
                    del waiting[lost.name]
                unfinished = set(waiting) | {job.name for job in active.values()}
                ready = [job for job in waiting.values() if job.after not in unfinished]
                for job in ready[: max(0, workers - len(active))]:  # no more, so that the first listed come first
                    active[pool.submit(_run, job.work, str(runs / job.name), job.config.model_dump())] = waiting.pop(
                        job.name
                    )
                done, _ = wait(active, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    job, error = active.pop(future), future.exception()
                    if isinstance(error, Exception) and not isinstance(error, BrokenExecutor):
                        failed[job.name] = str(error).splitlines()[0] if str(error) else type(error).__name__
                        console.print(f"{job.name} failed: {failed[job.name]}", style="red", markup=False)
                    else:
                        _announce(job, future.result(), console)
                bar.update(
                    task,
                    completed=sum(_epochs_done(runs / job.name) for job in todo),
                    description=f"{len(active) + len(waiting)} runs left",
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise QvitError(f"{len(failed)} of {len(todo)} runs failed:{lines}")


def _context() -> BaseContext:
    """Processes forked from one that has imported this package, where the system can: it is read from disk once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent() -> None:
    """Makes a process of the pool end when the one that it works for is gone: a killed list leaves nobody at work."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # a training saves a checkpoint after its step
        until = time.monotonic() + GRACE
        while _AT_WORK.is_set() and time.monotonic() < until:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(function: Callable[[str, dict[str, Any]], dict[str, Any]], run: str, values: dict[str, Any]) -> dict[str, Any]:
    """A job, in a process of the pool."""
    _AT_WORK.set()
    try:
        return function(run, values)
    finally:
        _AT_WORK.clear()


def _announce(job: Job, result: dict[str, Any], console: Console) -> None:
    console.print(f"{job.name:<18} {result['accuracy']:6.2f} %   {result['seconds']['total']:5.1f} s", highlight=False)


def _epochs_done(run: Path) -> int:
    """Epochs in the log of a run that may be writing it."""
    try:
        return sum(
            line.startswith('{"event": "epoch"')
            for line in (run / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        )
    except OSError:
        return 0
