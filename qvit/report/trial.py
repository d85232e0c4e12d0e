"""The panel in which packed models are tried out: a drawing or an image in, answers beside those of the float model.

The graphs (ONNX) and the runtime that computes them (ONNX Runtime Web, WebAssembly) are inside the page, compressed; it
asks no address for anything. Where the models come from is not known here: a `Trial` is plain data and bytes, made by
`qvit.runs.trial`. What a person does, and how an image becomes the model's input, is `assets/trial.js`.

Without a runtime a panel is a sentence that says why it is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from qvit.report.markup import escape, muted, select
from qvit.report.shell import Program, asset
from qvit.report.units import bytes_text

HEADING = "Try it"


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the input of a model, as the model's transform says.

    Attributes:
        channels, height, width: Of the input.
        mean, std: Per channel, of values in 0..1.
        resize: (height, width) that an image is resized to before its centre is cut out; (n,): its shorter side to n.
        interpolation: `bilinear` or `bicubic`, as Pillow computes them.
        drawn: Whether the model reads handwritten digits: 8×8 counts of ink, made of a drawing.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, ...]
    interpolation: str
    drawn: bool


@dataclass(frozen=True)
class Graph:
    """A model of the panel.

    Attributes:
        name: For people.
        size: Bytes of the file that it is of.
        content: The ONNX file.
        beside: Index of its float model among the graphs; None for none.
    """

    name: str
    size: int
    content: bytes = field(repr=False)
    beside: int | None = None


@dataclass(frozen=True)
class Trial:
    """What a panel holds.

    Attributes:
        preparation: How images are prepared, the same for all models.
        classes: Names of the classes; empty where they are not known.
        models: The packed models.
        floats: The float models that they stand beside.
        samples: Images of the test set as 8×8 rows of 0..16, with their class; for models of digits.
        notes: Sentences about what is left out.
        script: ONNX Runtime Web, a JavaScript module.
        program: The same, its WebAssembly.
        licence: A line about it.
    """

    preparation: Preparation
    classes: Sequence[str]
    models: Sequence[Graph]
    floats: Sequence[Graph]
    samples: Sequence[tuple[Sequence[int], int]]
    notes: Sequence[str]
    script: str = field(repr=False)
    program: bytes = field(repr=False)
    licence: str


def trial_section(trial: Trial | str) -> tuple[str, str, str]:
    """The panel as a section of the page, or the sentence (text) that stands in its place."""
    if isinstance(trial, str):
        return "trial", HEADING, muted(escape(trial))
    draws = trial.preparation.drawn
    options = [f"{graph.name}, {bytes_text(graph.size)}" for graph in trial.models]
    size = f"{trial.preparation.width}×{trial.preparation.height}"
    if draws:
        first = "Draw a digit, drop an image of one, or take a scan of the test set, which no run was trained on."
        pad = "Drawing area: with Shift, arrow keys draw; without, they move the pen"
        role = f'tabindex="0" role="application" aria-label="{pad}"'
        scans = '<div id="trial-scans" class="scans" role="group" aria-label="Scans of the test set"></div>'
    else:
        first = "Drop an image here, or choose one: it is resized, cropped and normalized as in evaluation."
        role, scans = 'role="img" aria-label="The image"', ""
    inside = (
        f"<p>{first} The packed model answers beside the float one, both computed in this page by ONNX Runtime Web; "
        "nothing leaves it.</p>"
        f"{select('trial-model', 'Packed model', options)}"
        '<div class="controls"><label>Image: <input type="file" id="trial-file" accept="image/*"></label>'
        f"{'<button type=button id=trial-clear>Clear</button>' if draws else ''}</div>"
        f'<div class="trial" id="trial-panel"><div><canvas id="trial-pad" width="320" height="320" {role}></canvas>'
        f'{scans}</div><figure><canvas id="trial-seen" role="img" aria-label="Input of the model"></canvas>'
        f"<figcaption>What the model sees: {size}</figcaption></figure>"
        '<div class="said"><p id="trial-status" role="status"></p><div id="trial-answers" class="answers"></div>'
        "</div></div>"
    )
    return "trial", HEADING, inside + muted(" ".join(map(escape, (*trial.notes, trial.licence))))


def trial_data(trial: Trial) -> dict[str, object]:
    """What `assets/trial.js` reads."""
    models = [{"name": one.name, "beside": one.beside} for one in trial.models]
    return {
        "preparation": asdict(trial.preparation),
        "classes": list(trial.classes),
        "samples": [[list(codes), label] for codes, label in trial.samples],
        "models": models,
        "floats": [{"name": f"{one.name}, {bytes_text(one.size)}"} for one in trial.floats],
    }


def trial_program(trial: Trial) -> Program:
    """The runtime, the script of the panel, and the graphs."""
    graphs = {"model": trial.models, "float": trial.floats}
    blobs = {f"{kind}-{place}": one.content for kind, own in graphs.items() for place, one in enumerate(own)}
    return Program([_global(trial.script), asset("trial.js")], blobs | {"runtime": trial.program})


def _global(script: str) -> str:
    """The runtime's module with its exports as the global `ort`: the modules of a page have no addresses to import."""
    start = script.rindex("export{")
    names = script[start + len("export{") : script.index("}", start)].split(",")
    pairs = [name.split(" as ") for name in names]
    return script[:start] + "globalThis.ort={" + ",".join(f"{given}:{own}" for own, given in pairs) + "};"
