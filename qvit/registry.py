"""Things by name, found by importing the files of a folder: a new one is one file, and nothing lists it.

    METHODS: Registry[str, type[Method]] = Registry("method", "qvit.methods")

    @METHODS.register("lsq", "lsq+")
    class LSQMethod(Method): ...

The folder is imported at the first question, never before. Packages outside qvit take part through an entry point of
the group `qvit.plugins` that names a module: it is imported at the same moment, and its decorators do the rest.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from qvit.errors import UsageError, nearest, shown

K = TypeVar("K")
T = TypeVar("T", covariant=True)
D = TypeVar("D")
PLUGINS = "qvit.plugins"


class Registry(Mapping[K, T], Generic[K, T]):
    """A dictionary that fills itself; an unknown name is a UsageError with the nearest one.

    Args:
        kind: What it holds, for messages: `method`.
        package: The folder whose files register something: `qvit.methods`.
        order: What the names are sorted by, from a thing; by default they come as they were registered.
    """

    def __init__(self, kind: str, package: str, *, order: Callable[[Any], int] = lambda thing: 0) -> None:
        self.kind, self.package, self.order = kind, package, order
        self._found: dict[K, T] = {}
        self._complete = False

    def register(self, *names: K) -> Callable[[D], D]:
        """Decorator: makes something available under `names`; the same name again replaces it."""

        def registered(thing: Any) -> Any:
            for name in names:
                self._found[name] = thing
            return thing

        return registered

    def __getitem__(self, name: K) -> T:
        self._fill()
        if name not in self._found:
            known = list(map(str, self))
            raise UsageError(f"unknown {self.kind} {shown(name)}{nearest(str(name), known)} ({', '.join(known)})")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._found

    def __iter__(self) -> Iterator[K]:
        self._fill()
        return iter(sorted(self._found, key=lambda name: self.order(self._found[name])))

    def __len__(self) -> int:
        self._fill()
        return len(self._found)

    def _fill(self) -> None:
        if not self._complete:
            self._complete = True  # before the imports, which may ask
            import_files(self.package)
            import_plugins()


def import_files(package: str) -> None:
    """Imports every file of a package but `__main__`, and of packages in it, in the order of their names."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.ispkg:
            import_files(f"{package}.{module.name}")
        elif module.name != "__main__":
            importlib.import_module(f"{package}.{module.name}")


@functools.cache
def import_plugins() -> None:
    """Imports what other packages name as their plugins, once."""
    for point in entry_points(group=PLUGINS):
        point.load()
