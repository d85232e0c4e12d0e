r"""Packed models beside what they were packed from: true bytes against theory, and the same answers by every engine.

For every model: file bytes, the bytes that its bits and float leftovers must take, and for each engine top-1 and the
share of images with the same first class as the fake-quantized model. Where answers differ the cause is looked for:
fake quantization itself is repeated in float64, and how far logits move then is put beside how far an engine moves
them. A model whose answers change with rounding alone has no single right answer there.

    python benchmarks/measure/packed.py --weights W.safetensors --data TRAIN.tar --eval-data TEST.tar \
        --class-map classes.txt
    python benchmarks/measure/packed.py ... --packed demo-output/runs/qvit-3bit-seed0/packed.safetensors

The first quantizes DeiT-T after training (`--plans`) and packs it; `--packed` adds files that are scored on digits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of
from torch import Tensor, nn

from qvit.data.open import calibration_batches, data_config_of, eval_loader, open_data, open_source
from qvit.deploy.bench.hardware import hardware
from qvit.deploy.engines import available_engines, create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.summary import describe
from qvit.deploy.packages import missing
from qvit.files import write_json
from qvit.methods.ptq.stages import ptq
from qvit.models.create import create_model

Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    for name in ("weights", "data", "eval-data", "class-map"):
        parser.add_argument(f"--{name}", help="of the timm model; all four, or none")
    parser.add_argument("--plans", nargs="*", default=["w8a8", "w4a4"])
    parser.add_argument("--packed", nargs="*", default=[], help="packed files of the demo, scored on its test images")
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--images", type=int, help="how many of the test images; default: all")
    parser.add_argument("--engines", nargs="+", default=available_engines())
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "packed.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [of_digits(Path(file), options) for file in options.packed]
    if options.weights:
        rows += list(of_timm_model(options))
    result = {
        **record_of(packages=[name for name in ("onnxruntime", "openvino") if not missing(name)]),
        "hardware": f"{hardware()}, {options.threads} threads",
        "rows": rows,
    }
    write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def of_digits(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    artifact = Artifact.load(file)
    loader = eval_loader(open_data("digits").test, dict(artifact.data_config), batch_size=100, workers=0, device="cpu")
    return row_of("digits", artifact, artifact.model(), file.stat().st_size, list(loader), options)


def of_timm_model(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    model = create_model(options.model, weights=options.weights).eval()
    config = data_config_of(model)
    calibration = open_source(options.data, class_map=options.class_map, split="train")
    images = list(calibration_batches(calibration, config, images=options.calibration_images, batch_size=32, seed=0))
    scored: Batches = []
    for batch in eval_loader(open_source(options.eval_data, class_map=options.class_map), config, batch_size=50):
        scored.append(batch)
        if options.images and 50 * len(scored) >= options.images:
            break
    for plan in options.plans:
        quantized = ptq(model, plan, images)
        artifact = Artifact.from_model(quantized, model_name=options.model, plan_name=plan)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "packed.safetensors"
            artifact.save(file)
            size, artifact = file.stat().st_size, Artifact.load(file)
        yield row_of(options.model, artifact, quantized, size, scored, options)


@torch.no_grad()
def row_of(
    name: str, artifact: Artifact, simulated: nn.Module, size: int, scored: Batches, options: argparse.Namespace
) -> dict[str, Any]:
    """Sizes of a packed model, and its answers by every engine beside the simulated ones."""
    facts = describe(artifact, size)
    truth = torch.cat([targets for _, targets in scored])
    fake = torch.cat([simulated(batch) for batch, _ in scored])
    double = simulated.double()
    exact = torch.cat([double(batch.double()) for batch, _ in scored])
    simulated.float()
    moved = (fake - exact).abs().amax(1)
    best = fake.topk(2, dim=1).values
    margin = best[:, 0] - best[:, 1]
    row: dict[str, Any] = {
        "model": name,
        "plan": artifact.plan.name,
        "images": len(truth),
        **{key: facts[key] for key in ("file_bytes", "payload_bytes")},
        "theory_bytes": facts["theory_bytes"],
        "float_bytes": 4
        * sum(part.numel() for part in create_model(artifact.model_name, **artifact.model_kwargs).parameters()),
        "top1_simulated": percent(fake.argmax(1) == truth),
        "agreement_of_float64": percent(fake.argmax(1) == exact.argmax(1)),
        "median_movement": float(moved.median()),
        "median_margin": float(margin.median()),
        "engines": [],
    }
    for engine_name in options.engines:
        settings = {"compiled": False} if engine_name == "torch" else {}
        engine = create_engine(artifact, engine_name, threads=options.threads, **settings)
        found = torch.cat([engine(batch) for batch, _ in scored])
        differ, distance = found.argmax(1) != fake.argmax(1), (found - fake).abs().amax(1)
        row["engines"].append(
            {
                "engine": engine_name,
                "arithmetic": engine.arithmetic,
                "top1": percent(found.argmax(1) == truth),
                "agreement": percent(~differ),
                "differing": int(differ.sum()),
                "largest_margin_of_differing": float(margin[differ].max()) if bool(differ.any()) else 0.0,
                "median_movement": float(distance.median()),
            }
        )
        sys.stderr.write(json.dumps(row["engines"][-1]) + "\n")
    return row


def percent(hits: Tensor) -> float:
    return 100.0 * float(hits.double().mean())


if __name__ == "__main__":
    main()
