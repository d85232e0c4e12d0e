"""The command line: every command calls one function of the library and prints what it returns.

A file of this folder that registers a command is all that a command needs: see `options.py`.

The result is a table or, with --json, JSON. Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted, 143 saved
and ended by SIGTERM. A failure is one line on stderr; --debug (or QVIT_DEBUG=1) adds the traceback. The library is
imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from qvit.cli.console import out
from qvit.cli.options import COMMANDS
from qvit.errors import QvitError, UsageError
from qvit.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Vision Transformers at 2 to 8 bits: learn, train, measure and report mixed-precision plans for timm models.",
)
#: Group of commands → its help.
GROUPS = {"plan": "Look at plans: which tensor has how many bits."}


_LONGEST_MESSAGE = 4000


def main() -> NoReturn:
    """Entry point of the `qvit` command."""
    click_error = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
    debug = "--debug" in sys.argv or bool(os.environ.get("QVIT_DEBUG"))
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how typer returns from a keyboard interrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; a run continues with `qvit train --resume RUN`", 130)
    except QvitError as error:
        if debug:
            raise
        from qvit.training.signals import EXIT_CODE, Terminated

        _fail(str(error), EXIT_CODE if isinstance(error, Terminated) else 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, click_error):
            message = error.format_message()  # type: ignore[attr-defined]
            if not message:
                sys.exit(2)
            _fail(f"{message} (see `qvit --help`)", 2)
        _fail(f"{type(error).__name__}: {error} (this is a defect of qvit or of a library; --debug shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    text = " ".join(message.split())
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"error: {'' if rank == '0' else f'process {rank}: '}{text}\n")
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # a launcher sums up why its processes failed from these
        content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps(content), encoding="utf-8")
    sys.exit(code)


def _version(show: bool) -> None:
    if show:
        out.print(__version__, highlight=False)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
) -> None:
    """Messages of libraries stay out of the way unless asked for."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("timm").setLevel(logging.DEBUG if debug else logging.ERROR)
    if not debug:
        warnings.filterwarnings("ignore")


def _complete(app: typer.Typer) -> None:
    """Adds the registered commands, in their order."""
    groups: dict[str, typer.Typer] = {"": app}
    for name, command in sorted(COMMANDS.items(), key=lambda item: item[1].order):
        group, _, own = name.rpartition(" ")
        if group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, help=GROUPS.get(group))
            app.add_typer(groups[group], name=group)
        groups[group].command(own, help=command.help)(command.call)


_complete(app)
