"""What there is to know about a GPU, in the order of what matters most if time on it is short; needs a CUDA device.

Three parts, each with its own files of results:

    engine      `qvit bench --device cuda`: the engine `cuda` beside compiled bf16, and TensorRT where it is installed,
                at batch 1, 8, 128, 1024; first its answers beside the reference's                gpu_engine.json
    steps       `train_step.py --device cuda`: quantized training steps over the float step, recorded as CUDA graphs
                and eager, without the forms that `QVIT_GPU_FUSED` turns on                    train_step_cuda.json
                and with each of them, and all                                      train_step_cuda_<form>.json
    products    linear layers of the model alone: our kernel at 8 bits and packed at 4, `torch._int_mm`, bf16, in
                microseconds                                                                     gpu_products.json

    python benchmarks/measure/gpu.py
    python benchmarks/measure/gpu.py --parts engine --models deit_tiny_patch16_224 --seconds 1
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of

from qvit.deploy.engines import create_engine
from qvit.deploy.file.artifact import Artifact
from qvit.files import write_json
from qvit.kernels.switches import FORMS
from qvit.methods.ptq.stages import ptq
from qvit.models.create import create_model
from qvit.runs.bench import bench
from qvit.runs.requests import BenchRequest

PARTS = ("engine", "steps", "products")
ENGINES = ("qvit-cuda", "pytorch-bf16", "pytorch-compiled", "tensorrt")


def answers_beside_the_reference(name: str, plan: str) -> dict[str, Any]:
    """How far the engine's logits for noise are from the reference's, computed on the CPU."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 224, 224)
    artifact = Artifact.from_model(ptq(create_model(name).eval(), plan, [images]), model_name=name)
    found, expected = create_engine(artifact, "cuda")(images), create_engine(artifact, "reference")(images)
    apart = (found - expected).abs().amax(1) / expected.abs().max()
    same = (found.argmax(1) == expected.argmax(1)).float().mean()
    return {"model": name, "plan": plan, "largest_difference": float(apart.max()), "same_answers": float(same)}


def engine(options: argparse.Namespace) -> None:
    """The first part."""
    checks = [answers_beside_the_reference(name, plan) for name in options.models for plan in options.plans]
    results = []
    for name in options.models:
        request = BenchRequest(
            model=name, plans=options.plans, batches=options.batches, engines=ENGINES, device="cuda",
            rounds=options.rounds, seconds=options.seconds, max_seconds=600.0,
        )  # fmt: skip
        results.append(bench(request))
        for row in results[-1]["rows"]:
            sys.stderr.write(f"{name} {row['engine']} {row['precision']} batch {row['batch']}: ")
            sys.stderr.write(f"{row['milliseconds_median']} ms\n")
    record = record_of(device="cuda", packages=("triton",))
    write_json(RESULTS / "gpu_engine.json", {**record, "answers": checks, "results": results})


def steps(options: argparse.Namespace) -> None:
    """The second part: a process without the forms that no GPU has timed, one with each of them, one with all."""
    script = Path(__file__).with_name("train_step.py")
    for form in ("", *FORMS, "all"):
        file = RESULTS / f"train_step_cuda{form and '_' + form}.json"
        command = [sys.executable, str(script), "--device", "cuda", "--batch", "128", "--modes", "graphs", "eager"]
        command += ["--methods", "lsq+", "qvit", "--model", options.models[0], "--out", str(file)]
        subprocess.run(command, check=True, env=os.environ | {"QVIT_GPU_FUSED": form, "QVIT_GPU_ATTENTION": "0"})


def products(options: argparse.Namespace) -> None:
    """The third part."""
    from triton.testing import do_bench

    from qvit.deploy.cuda.operators import Codes, linear, pack

    rows = []
    for name in options.models:
        dim = create_model(name).embed_dim
        for batch in options.batches:
            for label, length, outputs in (("qkv", dim, 3 * dim), ("fc1", dim, 4 * dim), ("fc2", 4 * dim, dim)):
                x = torch.randint(-8, 8, (batch * 197, length), dtype=torch.int8, device="cuda")
                w = torch.randint(-8, 8, (outputs, 1, length), dtype=torch.int8, device="cuda")
                scale, bias = torch.ones(1, outputs, device="cuda"), torch.zeros(outputs, device="cuda")
                held, codes, turned = pack(w), Codes(x, 0), w[:, 0].t()
                half, other = x.bfloat16(), turned.bfloat16()
                fits = len(x) > 16 and length % 8 == 0 and outputs % 8 == 0
                forms = {
                    "int8": lambda a=codes, b=w, s=scale, c=bias: linear(a, b, s, c),
                    "packed": lambda a=codes, b=held, s=scale, c=bias: linear(a, b, s, c, packed=True),
                    "int_mm": (lambda a=x, b=turned: torch._int_mm(a, b)) if fits else None,
                    "bf16": lambda a=half, b=other: a @ b,
                }
                times = {
                    form: None if run is None else round(1000 * do_bench(run, return_mode="median"), 2)
                    for form, run in forms.items()
                }
                rows.append({"model": name, "layer": label, "batch": batch, "microseconds": times})
                sys.stderr.write(f"{name} {label} batch {batch}: {times}\n")
    write_json(RESULTS / "gpu_products.json", {**record_of(device="cuda", packages=("triton",)), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--plans", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 128, 1024])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device: nothing to measure")
    for part in options.parts:
        {"engine": engine, "steps": steps, "products": products}[part](options)


if __name__ == "__main__":
    main()
