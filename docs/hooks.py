"""Makes the README the first page, and draws figures on the pages.

`<div class="figure" data-figure="figures/NAME.json"></div>` becomes a plotly figure. Its JSON is put into the page,
because a browser does not fetch files beside a page that was opened from disk; plotly's script is copied out of the
installed package, so the site needs no other server.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url
from plotly.offline import get_plotlyjs

LIBRARY = "assets/plotly.min.js"
_PLACE = re.compile(r'<div class="figure" data-figure="([^"]+)"></div>')
_PLACED = '<div class="qvit-figure"'
STYLE = '<style>.md-typeset td[style*="right"] { white-space: nowrap }</style>'
SCRIPT = """
(() => {
  "use strict";
  const figures = [...document.querySelectorAll(".qvit-figure")].map(element => [
    element.querySelector("div"), JSON.parse(element.querySelector("script").textContent),
  ]);
  function draw() {
    const ink = getComputedStyle(document.querySelector(".md-typeset") || document.body).color;
    for (const [element, { data, layout }] of figures) {
      const own = structuredClone(layout);
      own.font = { ...own.font, color: ink };
      if (layout.meta.min_width) element.style.minWidth = layout.meta.min_width + "px";
      element.style.minHeight = layout.height + "px"; // plotly forgets it when the window changes
      element.setAttribute("role", "img");
      element.setAttribute("aria-label", layout.meta.alt);
      Plotly.react(element, structuredClone(data), own, { displayModeBar: false, responsive: true });
    }
  }
  draw();
  new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
})();
"""


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The first page is the README, with its links as seen from here; files that are no pages lose their links."""
    if page.file.src_uri != "index.md":
        return markdown
    text = (Path(config.docs_dir).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?:[A-Z]+(?:\.\w+)?)\)", r"\1", text)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Puts the figures of a page into it."""
    root = Path(config.docs_dir)

    def placed(match: re.Match[str]) -> str:
        file = root / match[1]
        if not file.is_file():
            raise PluginError(f"{page.file.src_uri}: there is no {match[1]}; run `python benchmarks/render`")
        data = file.read_text(encoding="utf-8").replace("<", "\\u003c")
        inside = f'<div></div><script type="application/json">{data}</script>'
        return f'{_PLACED} style="overflow-x: auto; margin-bottom: 1.5em">{inside}</div>'

    filled = _PLACE.sub(placed, html)
    if filled == html:
        return html
    return f'{STYLE}{filled}<script src="{get_relative_url(LIBRARY, page.url)}"></script><script>{SCRIPT}</script>'


def on_post_build(config: Any) -> None:
    """Copies plotly's script into the site."""
    file = Path(config.site_dir) / LIBRARY
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(get_plotlyjs(), encoding="utf-8")
