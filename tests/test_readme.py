"""README and documentation do what they say.

Examples run, command lines parse, links lead somewhere, tables of results are those of the measured files, and tables
of options are those of the code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from qvit.cli import app, main
from qvit.methods import METHODS
from qvit.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RENDER = ROOT / "benchmarks" / "render"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(document: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(document.read_text("utf-8")) if language in languages]


def unwrapped(document: Path) -> str:
    """The text of a document, with the lines of a paragraph joined."""
    return re.sub(r"(?<=[^\n])\n *(?=[^\s|#<*-])", " ", document.read_text("utf-8"))


def render_module() -> Any:
    spec = importlib.util.spec_from_file_location("render", RENDER / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(RENDER))  # as when it is run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RENDER))
    return module


# Examples


RUN = """
import os, runpy, sys
for script in sys.argv[1:]:
    os.chdir(os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
"""


def test_python_examples_run(tmp_path: Path) -> None:
    """The examples of a document, one after the other, in a folder of their own and a process with nothing but qvit.

    Training is cut to an epoch each: no example says which accuracy it ends with.
    """
    scripts = []
    for document in DOCUMENTS:
        if found := blocks(document, "python"):
            scripts.append(tmp_path / document.stem / f"{document.stem}.py")
            scripts[-1].parent.mkdir()
            code = re.sub(r"\b((?:warmup_)?epochs)=\d+", r"\1=1", "\n\n".join(found))
            scripts[-1].write_text(code.replace("warmup_epochs=1", "warmup_epochs=0"), "utf-8")
    assert {script.stem for script in scripts} > {"README", "CONTRIBUTING", "models"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *map(str, scripts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_readme_has_an_example_of_the_whole_path() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    assert all(call in example for call in ("QuantPlan", "quantize", "calibrate", "inspect_model", "evaluate", "train"))


# Lines


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "SECURITY.md"], ids=name_of)
def test_paragraphs_wrap_at_100_columns(document: Path) -> None:
    text = document.read_text("utf-8")
    assert render_module().wrapped(text) == text


def test_wrapping_leaves_alone_what_lines_mean() -> None:
    words = "word " * 30
    kept = f"| {words} |\n\n## {words}\n\n```text\n{words}\n```\n\n    {words}\n\n[a]: {words}\n\nshort\nlines"
    wrapped = render_module().wrapped
    assert wrapped(kept) == kept
    item, continued = wrapped(f"- {words}`a b` {words}\n  more\n- next").split("\n")[:2]
    assert item.startswith("- word") and continued.startswith("  word") and max(len(item), len(continued)) <= 100
    broken = wrapped("x" * 96 + " 1. - # y " + words)
    assert (
        not any(re.match(r"[-#]|1[.]", line) for line in broken.split("\n"))
        and broken.split() == wrapped(broken).split()
    )


# Command lines


def command_lines(document: Path) -> list[str]:
    """Lines that begin with `qvit` in blocks of shell input, continuations joined, comments cut."""
    lines = []
    for language, body in FENCE.findall(document.read_text("utf-8")):
        if language not in ("bash", "console"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            shown = line.removeprefix("$ ") if language == "console" else line
            if shown.startswith("qvit ") and (language == "bash" or line.startswith("$ ")):
                lines.append(shown)
    return lines


def parse(line: str) -> None:
    """Parses a command line as the program would, without running it."""
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    context = command.make_context("qvit", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"'{name}' is no command: {line}"
        command = command.commands[name]
    command.make_context(name, words, parent=context)


ALL_LINES = sorted({(name_of(document), line) for document in DOCUMENTS for line in command_lines(document)})


@pytest.mark.parametrize(("document", "line"), ALL_LINES)
def test_command_lines_parse(document: str, line: str) -> None:
    parse(line)


def test_a_wrong_command_line_would_be_noticed() -> None:
    for line in ("qvit cost deit --plann w3a3", "qvit const deit", "qvit plan shw x", "qvit evaluate"):
        with pytest.raises(Exception, match="(?i)no such option|no command|missing"):
            parse(line)
    assert len(ALL_LINES) > 20


def shown_outputs() -> list[tuple[str, str]]:
    """Command and output of the examples that need no run: costs, and errors."""
    examples = []
    for document in DOCUMENTS:
        for body in blocks(document, "console"):
            for part in body.split("$ ")[1:]:
                line, _, output = part.partition("\n")
                if line.startswith("qvit cost") and "runs/" not in line:
                    examples.append((line, output))
    return examples


@pytest.mark.parametrize(("line", "output"), shown_outputs())
def test_shown_outputs_are_real(
    line: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit):
        main()
    assert "".join(capsys.readouterr()).split() == output.split()


def flags_of(command: Any) -> set[str]:
    own = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    return own.union(*(flags_of(child) for child in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_in_running_text_exist(document: Path) -> None:
    flags = flags_of(typer.main.get_command(app)) | {"--help"}
    foreign = {"--check", "--demo", "--strict"}  # of render.py and mkdocs
    foreign |= {"--mixed_precision", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"}
    foreign |= {"--cpu"}  # this and those before are accelerate's
    others = ("pip", "python", "make", "apt", "accelerate", "torchrun")
    text = FENCE.sub("", document.read_text("utf-8"))
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if not span.startswith(others)]
    used = {word for span in spans for word in re.findall(r"(?<!\S)(--[a-z][a-z_-]*|-[a-z](?=\s|$))", span)}
    assert used <= flags | foreign


def settings_in(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"(?:--set|-o|--option) '?([a-z_]+)=([^\s`']+)", text))


def test_settings_in_command_lines_exist() -> None:
    known = set(TrainConfig.model_fields).union(*(cls.Options.model_fields for cls in METHODS.values()))
    for document in DOCUMENTS:
        assert {key for key, _ in settings_in(document.read_text("utf-8"))} <= known, document


# Tables of options


def test_tables_of_options_and_the_schema_of_recipes_are_those_of_the_code() -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "options.py", "--check"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_method_has_its_table_of_options() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    tables = set(re.findall(r"<!-- options:(\S+):begin -->", text))
    alike = {"lsq+": "lsq", "qvit+vvtq": "vvtq"}
    assert {alike.get(name, name) for name, cls in METHODS.items() if cls.Options.model_fields} - {
        "ptq",
        "pmq",
    } <= tables


# Links


def anchors_of(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text("utf-8"))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{name_of(document)} links to {target}"
        assert not anchor or anchor in anchors_of(file), f"{name_of(document)} links to {target}"


def test_files_and_symbols_of_paper_to_code_exist() -> None:
    for file, symbol in re.findall(
        r"`([\w/]+\.py)(?:::([\w.]+))?`", (ROOT / "docs/paper-to-code.md").read_text("utf-8")
    ):
        source = ROOT / "qvit" / file
        assert source.is_file(), file
        for part in filter(None, symbol.split(".")):
            assert re.search(rf"\b(?:def|class) {part}\b", source.read_text("utf-8")), f"{file}::{symbol}"


# Tables of results


def test_tables_are_those_of_the_measured_files() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/render"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DEMO = {
    "float_accuracy_mean": 97.5,
    "float_accuracy_std": 0.25,
    "rows": [
        {
            "method": method,
            "budget": "3bit",
            "bit_operations": 18_146_688,
            "weight_bytes": 42_144,
            "accuracy_mean": accuracy,
            "accuracy_std": 0.5,
            "seeds": [0, 1, 2],
        }
        for method, accuracy in (("lsq+", 96.0), ("qvit", 97.0))
    ],
    "seconds": 90.0,
    "command": "qvit demo",
    "date": "2020-01-02",
    "hardware": "CPU, 2 cores",
    "versions": {"qvit": "0.0.0"},
}
STEP = {
    "command": "python benchmarks/measure/train_step.py",
    "date": "2020-01-02",
    "hardware": "CPU",
    "versions": {"torch": "1"},
    "model": "vit_digits",
    "batch": 4,
    "rows": [
        {
            "method": "qvit",
            "mode": "eager",
            "precision": "fp32",
            "time_ratio": 2.5,
            "memory_ratio": 1.5,
            "milliseconds": 10.0,
            "memory_mib": 20.0,
        }
    ],
}
SENSITIVITY = {
    "command": "python benchmarks/measure/sensitivity.py",
    "date": "2020-01-02",
    "hardware": "CPU",
    "versions": {"torch": "1"},
    "model": "small",
    "searches": {
        "fisher": {
            "images": 32,
            "widths": [2, 8],
            "seconds": 40.4,
            "processor_seconds": 70.0,
            "seconds_of_exact_allocation_at_4bit": 0.5,
        }
    },
    "exhaustive_kl": {
        "heads": 388,
        "heads_measured": 60,
        "passes_measured": 300,
        "images_measured": 8,
        "seconds_measured": 100.0,
        "passes_of_all": 2716,
        "seconds_of_all_extrapolated": 3600,
    },
    "agreement": {
        "fisher": {
            "spearman": 0.9,
            "spearman_by_width": {"2": 0.8, "8": 0.95},
            "median_ratio_by_width": {"2": 1.5, "8": 1.0},
        }
    },
}
EMPTY = "\n".join(f"<!-- results:{name}:begin -->\n<!-- results:{name}:end -->" for name in ("demo", "train_step"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    for name in render_module().DOCUMENTS:
        (tmp_path / name).write_text(f"before\n{EMPTY}\nafter\n")
    (tmp_path / "results").mkdir()
    return tmp_path


def render(project: Path, *arguments: str) -> int:
    return render_module().main(["--root", str(project), "--results", str(project / "results"), *arguments])


def test_render_without_results_says_how_to_measure(project: Path) -> None:
    assert render(project, "--check") == 1
    assert render(project) == 0
    assert render(project, "--check") == 0
    assert (project / "README.md").read_text().count("Not measured yet") == 2


def test_render_shows_what_was_measured_and_notices_a_change(project: Path) -> None:
    (project / "results" / "demo.json").write_text(json.dumps(DEMO))
    (project / "results" / "train_step.json").write_text(json.dumps(STEP))
    assert render(project) == 0
    text = unwrapped(project / "docs" / "results.md")
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| qvit | 3bit | 97.00 ± 0.50 |  | 18.147 | 42.1 |" in text
    assert "`qvit` is 1.00 points above `lsq+`, more than the larger standard deviation over seeds (0.50)" in text
    assert "| qvit | 10.0 | 2.50 | 20 | 1.50 |" in text
    assert all(fact in text for fact in ("`qvit demo`", "seeds 0, 1, 2", "CPU, 2 cores", "2020-01-02", "torch 1"))
    (project / "results" / "demo.json").write_text(json.dumps({**DEMO, "float_accuracy_mean": 97.6}))
    assert render(project, "--check") == 1


def test_render_shows_each_kind_of_processor(project: Path) -> None:
    row = STEP["rows"][0]
    rows = [
        {**row, "instructions": "avx512", "time_ratio": 1.25},
        {**row, "instructions": "avx512", "method": "lsq+", "time_ratio": 1.125},
        {**row, "instructions": "avx512", "precision": "bf16"},
        {**row, "instructions": "avx2", "time_ratio": 1.75},
        {**row, "instructions": "avx2", "method": "lsq+", "time_ratio": 1.375},
        {**row, "instructions": "avx2", "method": "lsq"},
    ]
    (project / "README.md").write_text("<!-- results:headlines:begin -->\n<!-- results:headlines:end -->")
    measured = {**STEP, "instructions": ["avx2", "avx512f"], "rows": rows}
    (project / "results" / "train_step.json").write_text(json.dumps(measured))
    assert render(project) == 0
    text = unwrapped(project / "docs" / "results.md")
    assert "time / float, AVX-512" in text and "memory / float, AVX2" in text
    assert "| qvit | 10.0 | 1.25 | 20 | 1.50 | 10.0 | 1.75 | 20 | 1.50 |" in text
    assert "| lsq |  |  |  |  | 10.0 | 2.50 | 20 | 1.50 |" in text
    assert "AVX2 was selected on a processor that has AVX-512, too." in text
    wanted = "is 1.12 (LSQ+) and 1.25 (search) with AVX-512, 1.38 (LSQ+) and 1.75 (search) with AVX2."
    assert wanted in unwrapped(project / "README.md")


def test_render_compares_patchwise_plans(project: Path) -> None:
    rows = [
        {"variant": name, "top1": top1, "agreement": 50.0, "divergence_on_training_images": top1 / 100,
         "bit_operations": 21_000_000_000, "only_this_right": 3, "only_uniform_right": 5, "p_value": 0.7266}
        for name, top1 in (("uniform", 60.0), ("same", 58.5))
    ]  # fmt: skip
    facts = {"model": "m", "images": 9, "calibration_images": 8, "score_images": 7, "seed": 0, "top1_float": 77.0}
    origin = {"command": "c", "hardware": "CPU", "date": "2020-01-02", "versions": {}, "cpu_seconds": 90.0}
    budgets = [
        {"budget": "4bit", "variants": rows, "chosen": "same"},
        {"budget": "6bit", "variants": rows, "chosen": "uniform"},
    ]
    (project / "docs" / "patchwise.md").write_text("<!-- results:patchwise:begin -->\n<!-- results:patchwise:end -->")
    (project / "results" / "patchwise.json").write_text(json.dumps(facts | origin | {"budgets": budgets}))
    assert render(project) == 0
    text = unwrapped(project / "docs" / "patchwise.md")
    assert "| same | 58.50 | 50.0 | 3 / 5 | 0.73 | 0.5850 | 21.000 |" in text
    assert "Training images choose `same`, which is 1.50 points below uniform (p = 0.73)." in text
    assert "choose the uniform plan" in text and "1.5 minutes of processor time" in text
    (project / "results" / "patchwise.json").write_text("{}")
    assert render(project) == 2


def test_render_shows_search_times_and_rank_correlations(project: Path) -> None:
    markers = "<!-- results:sensitivity:begin -->\n<!-- results:sensitivity:end -->\n"
    (project / "docs" / "results.md").write_text(markers)
    assert render(project) == 0
    assert "Not measured yet: `QVIT_DATA" in (project / "docs" / "results.md").read_text()
    (project / "results" / "sensitivity.json").write_text(json.dumps(SENSITIVITY))
    assert render(project) == 0
    text = unwrapped(project / "docs" / "results.md")
    assert "from 32 images: 40 s (70 s of processor time)" in text and "about 1.0 hours" in text
    assert "| fisher | 0.900 | 0.800 | 0.950 | 1.50 | 1.00 |" in text
    (project / "results" / "sensitivity.json").write_text("{}")
    assert render(project) == 2


def test_render_shows_speeds_of_each_model_and_batch(project: Path) -> None:
    def row(engine: str, batch: int, ms: float, ratio: float | None, *, ours: bool) -> dict[str, Any]:
        return {
            "engine": engine, "precision": "w8a8" if ours else "int8", "batch": batch, "milliseconds_median": ms,
            "milliseconds_quartiles": [ms - 1, ms + 2], "ratio_to_openvino_int8": ratio, "ratio_to_pytorch_fp32": None,
            "top1_agreement": 99.0, "agreement_with_simulated": 100.0 if ours else None, "file_bytes": 5_900_000,
            "arithmetic": "all in int8", "ours": ours,
        }  # fmt: skip

    rows = [row("qvit-torch", 1, 8.0, 0.8, ours=True), row("openvino", 1, 10.0, 1.0, ours=False)]
    rows += [row("qvit-torch", 8, 90.0, None, ours=True)]
    run = {"model": "deit", "plan": "w8a8", "rows": rows, "float_weights": "untrained", "images": "noise"}
    run |= {"speed_only": True, "skipped": [{"engine": "onnxruntime", "precision": "int8", "reason": "not installed"}]}
    origin = {"command": "c", "hardware": "CPU", "date": "2020-01-02", "versions": {}, "threads": 2}
    document = project / "docs" / "deployment.md"
    document.write_text("<!-- results:deploy:begin -->\n<!-- results:deploy:end -->")
    assert render(project) == 0 and "Not measured yet: `python benchmarks/measure/deploy.py`" in unwrapped(document)
    measured = origin | {"instructions": ["avx2"], "runs": [run]}
    (project / "results" / "deploy.json").write_text(json.dumps(measured))
    assert render(project) == 0
    text = unwrapped(document)
    assert "`deit`, w8a8, batch 1:" in text and "`deit`, w8a8, batch 8:" in text
    assert "| **qvit-torch** | w8a8 | 8.0 | 7.0 – 10.0 | 0.80 |  | 99 | 100 | 5.9 |" in text
    assert "| openvino | int8 | 10.0 | 9.0 – 12.0 | 1.00 |  | 99 |  | 5.9 |" in text
    assert "`qvit-torch`, is faster than the fastest peer, openvino int8: it takes 0.80 times as long." in text
    assert "Speed alone" in text and "onnxruntime int8 (not installed)" in text and "`avx2`" in text
    (project / "results" / "deploy.json").write_text("{}")
    assert render(project) == 2


def test_render_shows_forms_of_the_native_engine(project: Path) -> None:
    rows = [
        {"form": "AVX2", "batch": 8, "plan": plan, "milliseconds_median": ms, "ratio_to_first": ms / 10}
        for plan, ms in (("w8a8", 10.0), ("w4a4", 6.25))
    ]
    measured = {"command": "c", "hardware": "CPU", "date": "2020-01-02", "versions": {}, "model": "deit", "rows": rows}
    document = project / "docs" / "deployment.md"
    document.write_text("<!-- results:native_forms:begin -->\n<!-- results:native_forms:end -->")
    (project / "results" / "native_forms.json").write_text(json.dumps({**measured, "plans": ["w8a8", "w4a4"]}))
    assert render(project) == 0
    text = unwrapped(document)
    assert "w4a4, ms (÷ w8a8) |" in text and "| AVX2 | 8 | 10.00 (1.00) | 6.25 (0.62) |" in text
    (project / "results" / "native_forms.json").write_text("{}")
    assert render(project) == 2


def test_render_shows_bits_against_milliseconds(project: Path) -> None:
    """A table and a figure for each batch size: plans by their width, peers as lines, the wrong one named."""

    def row(engine: str, precision: str, plan: str | None, ms: float, right: bool | None) -> dict[str, Any]:
        return {
            "engine": engine, "precision": precision, "plan": plan, "batch": 1, "milliseconds_median": ms,
            "milliseconds_quartiles": [ms - 1, ms + 2], "ratio_to_right_peer": ms / 10, "ratio_to_pytorch_fp32": None,
            "top1_agreement": 99.0 if right is not False else 80.0, "agreement_with_simulated": 98.0, "right": right,
            "file_bytes": 5_900_000, "arithmetic": "all in int8", "ours": right is None,
        }  # fmt: skip

    rows = [row("qvit-native", "w8a8", "w8a8", 8.0, None), row("qvit-native", "w4a4", "w4a4", 5.0, None)]
    rows += [row("qvit-native", "mixed", "mixed-3bit", 4.0, None)]
    rows += [row("openvino", "fp32", None, 10.0, True), row("openvino", "int8", None, 6.0, False)]
    run = {"model": "deit", "plan": "w8a8, w4a4, mixed-3bit", "rows": rows, "float_weights": "of deit", "images": "x"}
    run |= {"speed_only": False, "right_percent": 95.0, "compared_images": 200, "skipped": []}
    origin = {"command": "c", "hardware": "CPU", "date": "2020-01-02", "versions": {}, "threads": 2}
    document = project / "docs" / "deployment.md"
    document.write_text("<!-- results:bits_ms:begin -->\n<!-- results:bits_ms:end -->")
    assert render(project) == 0 and "Not measured yet: `python benchmarks/measure/bits_ms.py`" in unwrapped(document)
    measured = origin | {"instructions": ["avx2", "avx512_vnni"], "runs": [run]}
    (project / "results" / "bits_ms.json").write_text(json.dumps(measured))
    assert render(project) == 0
    text = unwrapped(document)
    assert "`deit` on AVX-512 VNNI, batch 1; the fastest right peer is openvino fp32, 10.00 ms:" in text
    assert "| w4a4 | 5.00 | 4.00 – 7.00 | 0.62 | 0.50 |  | 5.9 | 99 | 98 |" in text
    assert "Wrong: openvino int8 (80 %)." in text and "Answers are to 200 images" in text
    figure = json.loads((project / "docs" / "figures" / "bits-ms-avx-512-vnni-batch-1.json").read_text())
    traces = {trace["name"]: (trace["x"], trace["y"]) for trace in figure["data"]}
    assert traces["qvit-native"] == ([4, 8], [5, 8]) and traces["qvit-native, mixed-3bit"] == ([3], [4])
    assert traces["openvino int8 (wrong)"][1] == [6, 6] and traces["openvino fp32"][1] == [10, 10]
    noise = run | {"images": "noise", "rows": [own | {"right": None} for own in rows]}
    (project / "results" / "bits_ms.json").write_text(json.dumps(measured | {"runs": [noise]}))
    assert render(project) == 0
    assert "Speed alone: images are noise" in unwrapped(document) and "no peer was judged" in unwrapped(document)


def test_render_names_what_is_wrong(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "results" / "demo.json").write_text("{}")
    assert render(project) == 2
    assert "demo.json" in capsys.readouterr().err
    (project / "results" / "demo.json").unlink()
    for broken in ("no markers", "<!-- results:demo:begin -->", EMPTY.replace("demo:end", "nothing:end")):
        (project / "README.md").write_text(broken)
        assert render(project) == 2
        assert "README.md" in capsys.readouterr().err


def test_render_takes_a_demo_over(project: Path) -> None:
    demo = project / "demo"
    for seed in (0, 1):
        (demo / "runs" / f"float-seed{seed}").mkdir(parents=True)
        config = {
            "versions": DEMO["versions"],
            "hardware": DEMO["hardware"],
            "command": ["qvit", "demo"],
            "started": "2020-01-02T03:04:05+0000",
        }
        (demo / "runs" / f"float-seed{seed}" / "config.json").write_text(json.dumps(config))
    measured = {key: value for key, value in DEMO.items() if key not in ("command", "date", "hardware", "versions")}
    (demo / "results.json").write_text(json.dumps(measured))
    assert render(project, "--demo", str(demo)) == 0
    assert json.loads((project / "results" / "demo.json").read_text()) == DEMO
