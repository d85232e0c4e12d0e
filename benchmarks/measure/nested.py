r"""How many answers stay as more channels of an 8-bit model have 4-bit weights: `qvit.load(FILE, ratio=...)`.

A model is quantized to w8a8 after training and packed once; each ratio is chosen from that file. Images of an archive
that do not calibrate are scored, by the simulated model.

    python benchmarks/measure/nested.py --weights W.safetensors --images IMAGES.tar --class-map classes.txt
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from ptq_halves import halves
from record import RESULTS, record_of

from qvit.data.open import calibration_batches, data_config_of, eval_loader, open_source
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.nested import nested
from qvit.files import write_json
from qvit.methods.ptq.stages import ptq
from qvit.models.convert import freeze
from qvit.models.create import create_model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=Path, required=True, help="an archive of class folders")
    parser.add_argument("--class-map", required=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--out", type=Path, default=RESULTS / "nested.json")
    options = parser.parse_args()
    model = create_model(options.model, weights=options.weights).eval()
    config = data_config_of(model)
    with tempfile.TemporaryDirectory() as folder:
        own, others = halves(options.images, Path(folder), 0)
        training, scored = (open_source(path, split="train", class_map=options.class_map) for path in (own, others))
        images = list(calibration_batches(training, config, images=128, batch_size=16, seed=0))
        batches = [(batch, labels) for batch, labels in eval_loader(scored, config, batch_size=25)]
    full = [model(batch).argmax(1) for batch, _ in batches]
    artifact = Artifact.from_model(freeze(ptq(model, "w8a8", images)), model_name=options.model)
    rows = []
    for ratio in options.ratios:
        own_model = nested(artifact, ratio).model()
        answers = [own_model(batch).argmax(1) for batch, _ in batches]
        count = sum(map(len, answers))
        right = sum(int((a == labels).sum()) for a, (_, labels) in zip(answers, batches, strict=True))
        same = sum(int((a == b).sum()) for a, b in zip(answers, full, strict=True))
        rows.append({"ratio": ratio, "accuracy": 100 * right / count, "agreement": 100 * same / count})
        sys.stdout.write(f"{rows[-1]}\n")
    right = sum(int((a == labels).sum()) for a, (_, labels) in zip(full, batches, strict=True))
    facts = {"model": options.model, "images": count, "float_accuracy": 100 * right / count, "rows": rows}
    write_json(options.out, record_of() | facts)


if __name__ == "__main__":
    main()
