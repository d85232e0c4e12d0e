r"""What quantization-aware training costs: time and peak memory of a training step over the float step.

Same model, batch, precision and mode (eager or compiled), in one run. Time: the steps of all methods are interleaved,
so that a busy machine slows all of them; the ratio is that of the medians. Memory: one process per row measures the
growth of its resident set from before the model is made to the peak of three steps (on CUDA, in this process: the peak
that the allocator reports, one model at a time). Rows called `method, integers` compute the outputs of linear layers
from integers. The row `plain` is lsq+ without the fused operators: the formulas of `functional.py`, differentiated by
hand.

    python benchmarks/measure/train_step.py                    DeiT-T, batch 16, 224 px; every method, mode, precision
    python benchmarks/measure/train_step.py --modes eager --precisions fp32 --methods lsq+ qvit --json

Once for each kind of processor, in a process that is told to use no more than its instructions, the float step, too;
bf16 is left out for AVX2, where PyTorch has no fast products of it:

    python benchmarks/measure/train_step.py --modes eager --instructions avx512 avx2

On a CUDA GPU, eager and with CUDA graphs, as `qvit train` runs, into a file of its own; with the forms that the
variable `QVIT_GPU_FUSED` names:

    python benchmarks/measure/train_step.py --device cuda --batch 128 --modes graphs eager \
        --out benchmarks/results/train_step_cuda.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of

from qvit.data.open import data_config_of
from qvit.deploy.bench.hardware import cpu_instructions, hardware
from qvit.files import write_json
from qvit.kernels import cpu
from qvit.kernels.cpu import has_int8_dot_products
from qvit.methods import create_method
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.training.config import TrainConfig
from qvit.training.fused_forms import fused_forms
from qvit.training.graphs import GraphedModel, Within
from qvit.training.held_weights import HeldWeights
from qvit.training.loop import run_on_integers
from qvit.training.optimizer import create_optimizer

FLOAT, INTEGERS, PLAIN = "float", ", integers", "plain"
#: Instruction set → the variables that make a process use no other.
INSTRUCTION_SETS = {
    "avx512": {"QVIT_KERNELS": "avx512"},
    "avx2": {
        "QVIT_KERNELS": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
METHODS = ("lsq", "lsq+", "qvit", "vvtq", "qvit+vvtq", "ofq", "irm")
ON_INTEGERS = ("lsq+", "qvit")


def make_step(row: str, mode: str, precision: str, options: argparse.Namespace) -> Callable[[], None]:
    """One whole training step - forward, loss, penalty, backward, optimizer - as a function without arguments."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    device = options.device
    method_name = "lsq+" if row == PLAIN else row.removesuffix(INTEGERS)
    model = create_model(options.model).to(device)
    shape = data_config_of(model)["input_size"]
    images = torch.randn(options.batch, *shape, device=device)
    targets = torch.randint(model.num_classes, (options.batch,), device=device)  # type: ignore[arg-type]
    budget = None if method_name == FLOAT else "4bit"
    config = TrainConfig.create(model=options.model, method=method_name, budget=budget)
    method = create_method(config)
    cost = inspect_model(model)
    plan = method.plan(cost)
    if plan is not None:
        model = calibrate(quantize(model, plan, in_place=True), [images[:4]])
        method.attach(model, cost, 100)
        if row.endswith(INTEGERS):
            run_on_integers(model, config)
    model.train()
    fuses = device.startswith("cuda") and mode != "compiled"
    around = partial(fused_forms, model, HeldWeights(model)) if fuses else nullcontext
    optimizer = create_optimizer(model, opt="adamw", lr=1e-4, weight_decay=0.05, width_lr=1e-3)
    recorded = GraphedModel if mode == "graphs" else Within
    compiled = torch.compile(model) if mode == "compiled" else recorded(model, around)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def step() -> None:
        kept = mode != "graphs"
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision == "bf16", cache_enabled=kept):
            loss = torch.nn.functional.cross_entropy(compiled(images).float(), targets)
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def plain_step() -> None:
        cpu.ENABLED = False
        try:
            step()
        finally:
            cpu.ENABLED = True

    return plain_step if row == PLAIN else step


def rows_of(mode: str, options: argparse.Namespace) -> list[str]:
    """What is measured in a mode: a compiled model has neither fused operators nor integers, and takes minutes."""
    if mode == "compiled":
        return [FLOAT, *(name for name in options.compiled_methods if name in options.methods)]
    rows = [FLOAT, *options.methods]
    if options.device == "cpu":
        rows += [PLAIN] if "lsq+" in options.methods else []
        fast = has_int8_dot_products() and options.selected != "avx2"
        rows += [name + INTEGERS for name in ON_INTEGERS if name in options.methods and fast]
    return rows


def measure_times(mode: str, precision: str, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds per step of each row, steps interleaved."""
    steps = {row: make_step(row, mode, precision, options) for row in rows_of(mode, options)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(row: str, mode: str, precision: str, options: argparse.Namespace) -> float:
    """Mebibytes that a row's training adds to a process at its peak; on a CPU it needs a process of its own."""
    if options.device.startswith("cuda"):
        gc.collect()  # models are cycles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make_step(row, mode, precision, options)
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()
    before = resident("VmRSS")
    step = make_step(row, mode, precision, options)
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Mebibytes in memory, now (VmRSS) or at the peak (VmHWM); `ru_maxrss` would include the peak of the parent."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) / 1024


def measured_with(instructions: str) -> list[dict[str, Any]]:
    """The rows of a process that uses these instructions."""
    command = [sys.executable, __file__, *sys.argv[1:], "--selected", instructions]
    environment = os.environ | INSTRUCTION_SETS[instructions]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return [{"instructions": instructions, **row} for row in json.loads(text)]


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each mode, precision and method."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    rows = []
    for mode in options.modes:
        for precision in options.precisions:
            if (options.selected, precision) == ("avx2", "bf16"):
                continue
            memory = {}
            for name in rows_of(mode, options):
                if options.device.startswith("cuda"):
                    memory[name] = measure_memory(name, mode, precision, options)
                    continue
                command = [sys.executable, __file__, *arguments, "--memory-of", name, mode, precision]
                memory[name] = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            times = measure_times(mode, precision, options)
            for name in times:
                row = {
                    "method": name,
                    "mode": mode,
                    "precision": precision,
                    "time_ratio": round(times[name] / times[FLOAT], 3),
                    "memory_ratio": round(memory[name] / memory[FLOAT], 3),
                    "milliseconds": round(times[name], 1),
                    "images_per_second": round(1000 * options.batch / times[name], 1),
                    "memory_mib": round(memory[name], 1),
                }
                rows.append(row)
                sys.stderr.write(
                    f"{mode:<8} {precision} {name:<16} {row['milliseconds']:9.1f} ms  x {row['time_ratio']:.2f}"
                    f"   {row['memory_mib']:8.0f} MiB  x {row['memory_ratio']:.2f}\n"
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--compiled-methods", nargs="+", choices=METHODS, default=ON_INTEGERS)
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled", "graphs"), default=("eager", "compiled"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--instructions", nargs="+", choices=INSTRUCTION_SETS, default=(), help="measured in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.json")
    parser.add_argument("--json", action="store_true", help="print the result instead of a table")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--selected", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        sys.stdout.write(f"{measure_memory(*options.memory_of, options)}\n")
        return
    if options.selected:
        sys.stdout.write(json.dumps(measured(options)))
        return
    for name in options.instructions:
        if not cpu.has_instructions(name):
            parser.error(f"this processor has no {name}")
    rows = [row for name in options.instructions for row in measured_with(name)] or measured(options)
    result = {
        **record_of(device=options.device, switches=("--json",)),
        **({} if options.device.startswith("cuda") else {"hardware": hardware()}),
        "instructions": cpu_instructions(),
        "threads": options.threads,
        "model": options.model,
        "batch": options.batch,
        "rows": rows,
    }
    write_json(options.out, result)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
