"""What the panel of a report holds (`qvit.report.trial`): packed models and their float models as graphs, the runtime.

Of every group of runs the first one that is packed is taken, at most six, all with the same preparation of images. The
float model is the one that a run started from; it is left out, with the reason, where a run has none or its weights are
not there any more. Graphs are for small models: a page is opened whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import floor
from pathlib import Path
from typing import Any

import torch

from qvit.data.augment import eval_config
from qvit.data.digits import DIGITS
from qvit.data.open import open_data
from qvit.deploy.export.onnx import OnnxRuntimeArithmetic, artifact_graph, float_graph, image_size
from qvit.deploy.export.web import VERSION, web_runtime
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.packages import require
from qvit.errors import QvitError, UsageError
from qvit.report.groups import group_runs
from qvit.report.runs import Run
from qvit.report.trial import Graph, Preparation, Trial
from qvit.runs.directory import PACKED, read_config
from qvit.runs.subject import fingerprint, float_model
from qvit.tensors import total_bytes

_log = logging.getLogger(__name__)
MOST = 6
#: Bytes of all graphs together, before compression: DeiT-T at 8 bits and in float fits.
LARGEST = 32_000_000
INTERPOLATIONS = ("bilinear", "bicubic")
LICENCE = f"The page contains ONNX Runtime Web {VERSION}, © Microsoft Corporation, MIT licence."


def trial_of(
    runs: Sequence[Run], runtime: str | Path | None = None, notify: Callable[[str], None] = _log.info
) -> Trial:
    """The panel of some runs.

    Args:
        runs: The runs of the page.
        runtime: Folder of ONNX Runtime Web; see `web_runtime`.
        notify: Is told what is done.

    Raises:
        UsageError: No run is packed, or a model that no page can hold: too large, prepared in a way that the page does
            not know, or not to be exported.
        QvitError: The runtime cannot be had, or a file cannot be read.
    """
    groups = [group for group in group_runs(runs) if not group.is_float]
    packed = {
        group.name_of(run): run
        for group in groups
        if (run := next((run for run in group.runs if (run.path / PACKED).is_file()), None))
    }
    if not packed:
        some = next((run.path for group in groups for run in group.runs), None)
        todo = f": `qvit pack {some}` makes one" if some else ", they are float models"
        raise UsageError(f"no run has a packed model to try out{todo}")
    require("onnx", "onnxscript")
    artifacts = {name: Artifact.load(run.path / PACKED) for name, run in packed.items()}
    first = next(iter(artifacts.values()))
    preparation = preparation_of(first)
    kept = [name for name, own in artifacts.items() if own is first or _alike(own, first)][:MOST]
    left = [name for name in artifacts if name not in kept]
    notes = [f"Not in this panel: {', '.join(left)}."] if left else []
    files = web_runtime(runtime, notify)
    graphs = _Graphs()
    for name in kept:
        notify(f"putting {packed[name].path / PACKED} into the page")
        if reason := graphs.add(name, packed[name], artifacts[name]):
            notes.append(f"There is no float model beside {name}: {reason}.")
    samples = _samples() if preparation.drawn else []
    made = preparation, first.class_names, graphs.models, graphs.floats, samples, notes
    return Trial(*made, files.script, files.program, LICENCE)


def preparation_of(artifact: Artifact) -> Preparation:
    """How images are prepared for a packed model. Raises UsageError for what the page cannot do."""
    config = eval_config(artifact.data_config)
    channels, height, width = image_size(artifact)
    drawn = artifact.provenance.get("data") == DIGITS
    squash = config.get("crop_mode") == "squash"
    scaled = tuple(floor(side / config["crop_pct"]) for side in config["input_size"][1:])
    if not drawn and config.get("crop_mode") not in ("center", "squash", None):
        raise UsageError(f"the page cannot prepare images by crop_mode '{config['crop_mode']}'")
    if not drawn and (config["interpolation"] not in INTERPOLATIONS or (scaled[0] != scaled[1] and not squash)):
        raise UsageError(
            f"the page cannot prepare images by interpolation '{config['interpolation']}' to {height}×{width} pixels; "
            f"it knows {' and '.join(INTERPOLATIONS)}, to squares"
        )
    resize, how = scaled if squash else scaled[:1], "bilinear" if drawn else config["interpolation"]
    mean, std = (tuple(map(float, artifact.data_config[key])) for key in ("mean", "std"))
    return Preparation(channels, height, width, mean, std, resize, how, drawn)


def _alike(one: Artifact, other: Artifact) -> bool:
    """Whether two models take the same images, and name the same classes."""
    settings = [(own.data_config, own.class_names, own.provenance.get("data")) for own in (one, other)]
    return settings[0] == settings[1]


class _Graphs:
    """The graphs of a panel, as long as there is room."""

    def __init__(self) -> None:
        self.models: list[Graph] = []
        self.floats: list[Graph] = []
        self._places: dict[str, int] = {}

    def add(self, name: str, run: Run, artifact: Artifact) -> str:
        """Adds a packed model and its float model; why that is missing, or nothing."""
        content = artifact_graph(artifact, OnnxRuntimeArithmetic()).SerializeToString()
        self._require_room(content)
        reason, beside = "", None
        try:
            beside = self._float(run, artifact)
        except QvitError as error:
            reason = str(error)
        self.models.append(Graph(name, (run.path / PACKED).stat().st_size, content, beside))
        return reason

    def _float(self, run: Run, artifact: Artifact) -> int:
        config, _ = read_config(run.path)
        if config.weights is None and not config.pretrained:
            raise UsageError("it was quantized from an untrained one")
        model = float_model(config, artifact.model_kwargs.get("num_classes"), new_classifier=False).eval()
        key = fingerprint(model)
        if key not in self._places:
            content = float_graph(model, torch.zeros(2, *image_size(artifact))).SerializeToString()
            self._require_room(content)
            self._places[key] = len(self.floats)
            self.floats.append(Graph("32 bits", total_bytes(model.state_dict().values()), content))
        return self._places[key]

    def _require_room(self, content: bytes) -> None:
        total = len(content) + sum(len(own.content) for own in (*self.models, *self.floats))
        if total > LARGEST:
            raise UsageError(
                f"a page holds at most {LARGEST / 1e6:.0f} MB of graphs, and these take {total / 1e6:.0f} MB"
            )


def _samples() -> list[tuple[list[int], int]]:
    """A test image of each digit, as codes of 0..16 row by row."""
    test: Any = open_data(DIGITS).test
    found = {}
    for pixels, label in test.dataset(mode="L"):
        found.setdefault(label, (pixels * 16).round().int().flatten().tolist())
    return [(codes, label) for label, codes in sorted(found.items())]
