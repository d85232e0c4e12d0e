"""What a section is, and the register of all: `qvit.report.page` composes them by their order.

    @section("losses", "Losses", order=45)
    def losses(groups: Sequence[Group], canvas: Canvas) -> str:
        return canvas.plot("losses", [figure_of(groups)], caption="One line per run.")

A section is one file of this folder, or of a package that names a module under the entry point `qvit.plugins`. Its
function gets the groups of runs and returns HTML, or an empty string where there is nothing to say. Figures go to the
`Canvas`; the HTML only has places for them. What could be expected and is missing deserves a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvit.registry import Registry
from qvit.report.groups import Group
from qvit.report.markup import Canvas

Render = Callable[[Sequence[Group], Canvas], str]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: Its address in the page.
        heading: Its heading, as text.
        order: Where it stands; qvit's own are at 10, 20, ...
        render: Groups of runs → HTML.
    """

    name: str
    heading: str
    order: int
    render: Render


SECTIONS: Registry[str, Section] = Registry("report section", "qvit.report.sections")


def section(name: str, heading: str, *, order: int) -> Callable[[Render], Render]:
    """Decorator: makes a function a section of the page; see `Section`."""

    def registered(render: Render) -> Render:
        SECTIONS.register(name)(Section(name, heading, order, render))
        return render

    return registered
