"""Writes tables and figures of README.md and of the documentation from the files in benchmarks/results, not by hand.

A table stands between two markers, `<!-- results:NAME:begin -->` and `<!-- results:NAME:end -->`; which names there are
is said in `tables.py`. Figures are files in docs/figures, which `docs/hooks.py` draws where the text has a place for
them; files there that no result makes are removed.

    python benchmarks/render                       writes tables and figures
    python benchmarks/render --check               writes nothing; exit code 1 if something is out of date
    python benchmarks/render --demo demo-output    first takes a demo's results over into demo.json
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import bits
import evidence_figures
import evidence_fragile
import evidence_tables
import headlines
import systems_tables
import tables
from rendering import FIGURES, TABLES, RenderError, figure_text, read, wrapped

#: Where tables and figures are registered.
REGISTERED = (tables, bits, headlines, systems_tables, evidence_tables, evidence_figures, evidence_fragile)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/results.md",
    "docs/evidence.md",
    "docs/analyses.md",
    "docs/training-speed.md",
    "docs/patchwise.md",
    "docs/two-bits.md",
    "docs/soft-labels.md",
    "docs/deployment.md",
    "docs/cli.md",
    "docs/models.md",
    "docs/methods.md",
)
_BLOCK = re.compile(r"<!-- results:(\w+):begin -->\n(.*?)<!-- results:(\w+):end -->", re.DOTALL)
_PLACE = re.compile(r'data-figure="figures/([^"]+)"')
_MARKER = re.compile(r"<!-- results:\w+:(?:begin|end) -->")


def fill(text: str, results: Path) -> str:
    """`text` with every marked section written anew. Raises RenderError for unknown, unpaired or missing markers."""

    def write(match: re.Match[str]) -> str:
        name, end = match[1], match[3]
        if name != end or name not in TABLES or _MARKER.search(match[2]):
            raise RenderError(f"the section 'results:{name}' ends as '{end}', or is none of {', '.join(TABLES)}")
        return f"<!-- results:{name}:begin -->\n\n{wrapped(TABLES[name](results))}\n\n<!-- results:{name}:end -->"

    filled, sections = _BLOCK.subn(write, text)
    if sections == 0 or len(_MARKER.findall(text)) != 2 * sections:
        raise RenderError("markers of a section are missing or come singly")
    return filled


def files_of(root: Path, results: Path) -> dict[Path, str | None]:
    """Every file that is rendered and what should be in it; None for a figure that no result makes any more."""
    files: dict[Path, str | None] = {}
    placed: set[str] = set()
    for name in DOCUMENTS:
        try:
            text = fill((root / name).read_text(encoding="utf-8"), results)
        except RenderError as error:
            raise RenderError(f"{name}: {error}") from None
        files[root / name] = text
        placed |= set(_PLACE.findall(text))
    folder = root / "docs" / "figures"
    figures = {f"{name}.json": figure for make in FIGURES for name, figure in make(results).items()}
    if placed != figures.keys():
        raise RenderError(f"figures without a place, or places without a figure: {sorted(placed ^ figures.keys())}")
    stale: dict[Path, str | None] = {file: None for file in folder.glob("*.json")}
    return files | stale | {folder / name: figure_text(figure) for name, figure in figures.items()}


def take_over(demo: Path, results: Path) -> Path:
    """Writes demo.json from a demo's directory; command, date, hardware and versions are those its runs recorded."""
    data = read(demo / "results.json")
    configs = [read(file) for file in sorted(demo.glob("runs/*/config.json"))]
    if not configs:
        raise RenderError(f"{demo} has no runs: give the directory that `qvit demo --out` was told to write to")
    try:
        versions = {json.dumps(config["versions"]) for config in configs}
        hardware = dict.fromkeys(config["hardware"] for config in configs)
        if len(versions) > 1:
            raise RenderError(f"the runs in {demo} were made with different versions: run the demo anew (--overwrite)")
        last = max(configs, key=lambda config: config["started"])
        data |= {
            "command": shlex.join(last["command"]),
            "date": last["started"][:10],
            "hardware": "; ".join(hardware),
            "versions": last["versions"],
        }
    except (KeyError, TypeError) as error:
        raise RenderError(f"a config.json in {demo} lacks {error}") from None
    target = results / "demo.json"
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return target


def write(file: Path, text: str | None) -> None:
    if text is None:
        file.unlink()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    parser.add_argument("--demo", type=Path, metavar="DIR", help="take the results of this demo over first")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.demo and not options.check:
            take_over(options.demo, options.results)
        stale = []
        for file, text in files_of(options.root, options.results).items():
            if text != (file.read_text(encoding="utf-8") if file.is_file() else None):
                stale.append(str(file.relative_to(options.root)))
                if not options.check:
                    write(file, text)
    except (RenderError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.check and stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run `python benchmarks/render`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
