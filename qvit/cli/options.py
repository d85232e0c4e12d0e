"""Commands, and their options from the fields of configs: name, type, default, range and help stand at the field alone.

    @command("bench", order=15)
    def bench(request: Annotated[Given, Fields(BenchRequest)], *, as_json: Json = False) -> None:
        '''Measure the speed of our engines beside their peers.'''

A file of this folder that registers a command is all that a command needs; packages outside qvit register theirs by the
entry point `qvit.plugins`. A parameter with `Fields` receives a dictionary of the options that were given, one with
`option` a single value. The docstring is the help; every command takes `--debug`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from qvit.cli.console import pairs
from qvit.registry import Registry
from qvit.runs.requests import Request

Given = dict[str, Any]
#: What the command line calls a field; by default `--its-name`.
_FLAGS = {
    "model_kwargs": ["--model-arg", "-m"],
    "teacher_kwargs": ["--teacher-arg"],
    "method_options": ["--option", "-o"],
}


@dataclass(frozen=True)
class Command:
    """A command: its function with one parameter for each option, its help, and its place in the list of commands."""

    call: Callable[..., None]
    help: str
    order: float


#: Commands by name; `plan show` is the command `show` of the group `plan`.
COMMANDS: Registry[str, Command] = Registry("command", "qvit.cli")


def command(name: str, *, order: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: makes a function a command."""

    def registered(function: Callable[..., None]) -> Callable[..., None]:
        COMMANDS.register(name)(Command(_expanded(function), _help(function), order))
        return function

    return registered


class Fields:
    """Fields of a config as options of a command.

    Args:
        cls: The config, a pydantic model or dataclass.
        names: Its fields with spaces between, in the order of the help; by default all.
        flags: Field → what the command line calls it.
        help: Field → help, where it means something else to this command.
        defaults: Field → default, where it is another one.
        required: Whether fields without a default have to be given.
        panel: Heading that they stand under in the help.
    """

    def __init__(
        self,
        cls: type[Any],
        names: str = "",
        *,
        flags: dict[str, list[str]] | None = None,
        help: dict[str, str] | None = None,
        defaults: dict[str, Any] | None = None,
        required: bool = True,
        panel: str | None = None,
    ) -> None:
        every: dict[str, FieldInfo] = cls.__pydantic_fields__
        self.fields = {name: every[name] for name in names.split() or every}
        self.flags, self.help, self.defaults = _FLAGS | (flags or {}), help or {}, defaults or {}
        self.required, self.panel = required, panel

    def parameters(self) -> Iterator[tuple[str, inspect.Parameter]]:
        """Each field with the parameter that typer makes an option of; `model` becomes an argument."""
        for name, field in self.fields.items():
            kind, metavar = _kind(field.annotation)
            needed = self.required and field.is_required() and name not in self.defaults
            told: dict[str, Any] = {"help": self._help(name, field), "metavar": metavar, "show_default": False}
            default = ... if needed else None
            if name == "model":
                info = typer.Argument(default, **told)
            else:
                flag = name.replace("_", "-")
                flags = self.flags.get(name) or [f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"]
                info = typer.Option(default, *flags, rich_help_panel=self.panel, **told)
            annotation = kind if needed else kind | None
            yield name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)

    def collected(self, values: dict[str, Any]) -> Any:
        """What the function receives, from the values of the options by field."""
        given = {name: value for name, value in values.items() if value is not None and value != []}
        tables = [name for name, field in self.fields.items() if get_origin(field.annotation) is dict]
        return self.defaults | given | {name: pairs(given[name]) for name in tables if name in given}

    def _help(self, name: str, field: FieldInfo) -> str:
        text = plain(self.help.get(name) or field.description or "")
        default = self.defaults.get(name, None if field.is_required() else field.get_default(call_default_factory=True))
        default = "on" if default is True else default
        says_nothing = default in (None, "") or isinstance(default, (bool, dict))
        return text if says_nothing else f"{text} \\[default: {_words(default)}]"


class option(Fields):  # noqa: N801  # reads as a function, such as `typer.Option`
    """One field; the parameter receives its value."""

    def collected(self, values: dict[str, Any]) -> Any:
        ((name, field),) = self.fields.items()
        return super().collected(values).get(name, field.get_default(call_default_factory=True))


Device = Annotated[str, option(Request, "device")]
Workers = Annotated[int, option(Request, "workers")]
ClassMap = Annotated[str | None, option(Request, "class_map")]
ModelArgs = Annotated[dict[str, Any], option(Request, "model_kwargs")]


def plain(description: str) -> str:
    """A field's description as a sentence of plain text: without links, brackets escaped for rich."""
    link = r"\[([^\]]+)\]\([^)]+\)"
    text = re.sub(rf"[;,] see {link}|; {link}| \({link}\)", "", description)
    text = re.sub(link, r"\1", text).replace("*training*", "training").replace("`", "").replace("[", r"\[")
    first = text if description.startswith(("timm", "`")) else text[:1].upper() + text[1:]
    return first if first.endswith(".") or not first else f"{first}."


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def types_of(annotation: Any) -> list[Any]:
    """The types of a union, without None and without pydantic's annotations."""
    if get_origin(annotation) is Annotated:
        return types_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in types_of(part) if kind is not NoneType]
    return [annotation]


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type that typer reads for a field, and what the help calls a value.

    Words are text that pydantic checks, a dictionary is KEY=VALUE, a sequence is an option that may be repeated.
    """
    kinds = types_of(annotation)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return str, "|".join([*(kind.__name__ for kind in kinds if kind in (int, float)), *words])
    origin = get_origin(kinds[0])
    if origin is dict:
        return list[str], "KEY=VALUE"
    return (list[types_of(get_args(kinds[0])[0])[0]] if origin is Sequence else kinds[0]), None


def _expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The function with a parameter for each option in place of `Fields`, and with `debug`, which `main` looks at."""
    groups: dict[str, tuple[Fields, dict[str, str]]] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        fields = next((part for part in get_args(parameter.annotation)[1:] if isinstance(part, Fields)), None)
        if fields is None:
            parameters[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        own = {field: (f"{name}_{field}" if field in parameters else field, new) for field, new in fields.parameters()}
        parameters |= {key: new.replace(name=key) for key, new in own.values()}
        groups[name] = fields, {key: field for field, (key, _) in own.items()}
    debug = typer.Option(False, "--debug", help="Show tracebacks and debug messages.")
    parameters["debug"] = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=debug, annotation=bool)

    @functools.wraps(function)
    def call(**values: Any) -> None:
        del values["debug"]
        for name, (fields, keys) in groups.items():
            values[name] = fields.collected({field: values.pop(key) for key, field in keys.items()})
        return function(**values)

    call.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return call


def _help(function: Callable[..., None]) -> str:
    """The docstring as help. Its only markup is the colour of examples; other brackets are meant as they are."""
    return re.sub(r"\[(?!cyan\]|/\])", r"\\[", inspect.getdoc(function) or "")
