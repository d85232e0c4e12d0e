"""What every page has around its sections: one HTML file that needs nothing else.

plotly.js, style and data are inside, and no address is ever asked for anything. As a second wall behind the escaping of
`qvit.report.markup`, the content security policy allows exactly the scripts of the page, by their hashes, and no
connection at all; WebAssembly is allowed where a page brings some (`Program`).
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from qvit.documents.base import Document, read_document
from qvit.files import write_atomically
from qvit.report.markup import Canvas, embedded, escape

COSTS_NOTE = (
    "1 G = 10<sup>9</sup>, 1 MB = 10<sup>6</sup> bytes. Bit operations: multiply-accumulates × bits of one factor "
    "× bits of the other, for one image; float counts as 32 bits."
)
WIDTHS_NOTE = "The widths follow Q-ViT (Li et al. 2022, arXiv 2201.07703)."


@dataclass(frozen=True)
class Program:
    """What a page computes with beside its figures.

    Attributes:
        modules: Texts of JavaScript modules, run one after the other behind the common script.
        blobs: Bytes by name: each is in the element `#blob-NAME`, gzip in base64.
    """

    modules: Sequence[str]
    blobs: Mapping[str, bytes]


@functools.cache
def asset(name: str) -> str:
    """A file of `qvit/report/assets`: style, a script or the frame of all pages, as text."""
    return (resources.files("qvit.report") / "assets" / name).read_text(encoding="utf-8")


def document(
    heading: str,
    header: str,
    parts: Sequence[tuple[str, str, str]],
    canvas: Canvas,
    *,
    skip: str = "Skip to the results",
    footer: str = f"{COSTS_NOTE} {WIDTHS_NOTE}",
    data: object = None,
    script: str = "",
    program: Program | None = None,
) -> str:
    """The whole page.

    Args:
        heading: Text of the heading and the title.
        header: HTML below the heading.
        parts: Sections as (name, text of the heading, HTML); empty ones are left out.
        canvas: The figures.
        skip: Text of the link to the sections.
        footer: HTML.
        data: Plain data for `script`, as JSON in the element `#data`.
        script: The asset that is run after the common script.
        program: Modules that run last, and their bytes.
    """
    parts = [(name, escape(text), body) for name, text, body in parts if body]
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text, _ in parts)
    main = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{text}</h2>{body}</section>'
        for name, text, body in parts
    )
    scripts = [get_plotlyjs(), asset("page.js"), *([asset(script)] if script else [])]
    own = "" if data is None else f'<script type="application/json" id="data">{embedded(data)}</script>\n'
    for name, content in (program.blobs if program else {}).items():
        packed = base64.b64encode(gzip.compress(content, mtime=0)).decode()
        own += f'<script type="application/octet-stream" id="blob-{name}">{packed}</script>\n'
    kinds = [("", scripts), (' type="module"', program.modules if program else ())]
    inside = [(kind, re.sub(r"</(script)", r"<\\/\1", text, flags=re.I)) for kind, texts in kinds for text in texts]
    code = "\n".join(f"<script{kind}>{text}</script>" for kind, text in inside)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in inside]
    allowed = [*(f"'sha256-{digest}'" for digest in digests), *(["'wasm-unsafe-eval'"] if program else [])]
    return Template(asset("page.html")).substitute(
        heading=escape(heading), header=header, skip=escape(skip), links=links, main=main, footer=footer,
        scripts=" ".join(allowed), style=asset("page.css"), figures=canvas.to_json(), own=own, code=code,
    )  # fmt: skip


def write_page_of(
    data: str | Path, out: str | Path, render: Callable[[Any], str], document: type[Document], what: str
) -> Path:
    """Renders a JSON file to a page; `what` it is called in messages.

    Raises QvitError if it cannot be read, is no such document, or the page cannot be written.
    """
    return write_html(render(read_document(document, data, what)), out)


def write_html(page: str, out: str | Path) -> Path:
    """Writes a page; its folder is created, and it appears at once or not at all. Raises QvitError if it cannot be."""
    content = page.encode("utf-8", errors="replace")
    write_atomically(Path(out), lambda file: file.write(content))
    return Path(out)
