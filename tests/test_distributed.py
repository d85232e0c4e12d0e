"""Several processes: the same training as one, each image counted once, and what happens when one of them dies.

Processes talk over gloo on this machine. They are started as a launcher would start them, by their environment; the
slow tests go through accelerate's launcher itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import events

TESTS = Path(__file__).parent
TRAIN = """
import json, sys
import torch
from tiny_models import Batches, digit_batches, digits_model, small_config, starting_point
from pathlib import Path
from qvit.families import inspect_model
from qvit.training.checkpoint import save_weights
from qvit.training.loop import Trainer, micro_batch
from qvit.training.processes import Processes

values, out = json.loads(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
config = small_config(**values)
processes = Processes("cpu")
micro = micro_batch(config, processes.world_size)
model, method = starting_point(config, attach=False, seed=7 + processes.rank)
processes.share(model)
steps, size = 4, config.batch_size
generator = torch.Generator().manual_seed(5)
batches = []
for images in digit_batches(steps, size, seed=5):
    labels = torch.randint(0, 10, (size,), generator=generator)
    for part in range(config.accumulate):
        first = part * micro * processes.world_size + processes.rank * micro
        batches.append((images[first : first + micro], labels[first : first + micro]))
method.steps_per_epoch = steps
trainer = Trainer(
    model, config, Batches(batches), num_classes=10, run=out, hooks=method, width_lr=method.width_lr,
    processes=processes,
)
method.attach(model, inspect_model(model), steps)
trainer.fit(quiet=True)
method.finish(trainer)
save_weights(out / f"rank{processes.rank}.safetensors", model)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(count: int, arguments: list[str], **more: str) -> list[subprocess.Popen[str]]:
    """Starts `count` processes of one job."""
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def trained(out: Path, count: int, **values: Any) -> Path:
    """A run of `TRAIN` on `count` processes."""
    for code, _, err in finish(launch(count, ["-c", TRAIN, json.dumps(values), str(out)])):
        assert code == 0, err
    return out


QVIT: dict[str, Any] = {
    "method": "qvit",
    "budget": "3bit",
    "batch_size": 16,
    "epochs": 2,
    "log_every": 1,
    "lr": 1e-3,
    "clip_grad": 1.0,
    "method_options": {"searching_ratio": 0.5, "width_lr": 0.05},
}


def test_two_processes_train_the_model_that_one_trains(tmp_path: Path) -> None:
    """Searching, freezing and diving; gradients are averaged, so sums differ in their order alone."""
    one = trained(tmp_path / "one", 1, **QVIT)
    two = trained(tmp_path / "two", 2, **QVIT)
    halves = trained(tmp_path / "halves", 2, **QVIT | {"accumulate": 2})
    expected = load_file(one / "rank0.safetensors")
    for run in (two, halves):
        first, second = (load_file(run / f"rank{rank}.safetensors") for rank in (0, 1))
        for key, value in expected.items():
            assert torch.equal(first[key], second[key]), f"processes have different {key}"
            torch.testing.assert_close(
                first[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
        losses = [[event["loss"] for event in events(path, "step")] for path in (one, run)]
        assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert events(run, "freeze")[0]["bit_operations"] == events(one, "freeze")[0]["bit_operations"]
