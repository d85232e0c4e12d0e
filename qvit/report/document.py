"""The shell of every page: heading, links to the sections, style, scripts, and the figures' data.

plotly.js, style and data are inside, and no address is ever asked for anything. As a second wall behind the escaping of
`qvit.report.markup`, the content security policy allows exactly the two scripts of the page, by their hashes, and no
connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence

from plotly.offline import get_plotlyjs

from qvit.report.assets import CSS, SCRIPT
from qvit.report.markup import Canvas, escape


def document(
    heading: str, header: str, parts: Sequence[tuple[str, str, str]], canvas: Canvas, *, footer: str = ""
) -> str:
    """A page as text.

    Args:
        heading: Its title, as text.
        header: What stands below the title, as HTML.
        parts: The sections: anchor, title and content, the latter two as HTML; those without content are left out.
        canvas: The figures whose places are in the sections.
        footer: The last lines, as HTML.
    """
    parts = [part for part in parts if part[2]]
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text, _ in parts)
    main = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{text}</h2>{body}</section>'
        for name, text, body in parts
    )
    library = re.sub(r"</(script)", r"<\\/\1", get_plotlyjs(), flags=re.IGNORECASE)
    policy = " ".join(f"'sha256-{_sha256(script)}'" for script in (library, SCRIPT))
    policy = (
        f"default-src 'none'; script-src {policy}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>{escape(heading)}</h1>
{header}
</header>
<nav aria-label="Sections"><ol>{links}</ol></nav>
<main id="main">
<noscript><p class="warning">The plots need JavaScript; the tables do not.</p></noscript>
{main}
</main>
<footer>{footer}</footer>
<script type="application/json" id="figures">{canvas.to_json()}</script>
<script>{library}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
