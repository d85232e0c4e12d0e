"""Several processes: the same training as one, each image counted once, and what happens when one of them dies.

Processes talk over gloo on this machine. They are started as a launcher would start them, by their environment; the
slow tests go through accelerate's launcher itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import events

from qvit.errors import UsageError
from qvit.training.checkpoint import load_checkpoint
from qvit.training.processes import Processes

TESTS = Path(__file__).parents[1]
TRAIN = """
import json, sys
import torch
from tiny_models import Batches, digit_batches, digits_model, small_config, starting_point
from pathlib import Path
from qvit.models.families import inspect_model
from qvit.training.checkpoint import save_weights
from qvit.training.loop import Trainer, micro_batch
from qvit.training.processes import Processes

values, out = json.loads(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
config = small_config(**values)
processes = Processes("cpu")
micro = micro_batch(config, processes.world_size)
model, method = starting_point(config, attach=False, seed=7 + processes.rank)
processes.share(model.double())  # what differs is the order of sums: in float64 no value crosses a rounding boundary
steps, size = 4, config.batch_size
generator = torch.Generator().manual_seed(5)
batches = []
for images in (batch.double() for batch in digit_batches(steps, size, seed=5)):
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
    "epochs": 5,
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
        assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert events(run, "freeze")[0]["bit_operations"] == events(one, "freeze")[0]["bit_operations"]


NOTING_GRADIENTS = TRAIN.replace(
    "trainer.fit(quiet=True)",
    """from safetensors.torch import save_file
from qvit.quantizers import quantizers_of
widths = {name: quantizer.bit_width for name, quantizer in quantizers_of(model)}
def note(*_):
    if trainer.step == 0:
        save_file({name: width.grad.clone() for name, width in widths.items()}, out / f"gradients{processes.rank}")
trainer.optimizer.register_step_pre_hook(note)
trainer.fit(quiet=True)""",
)


@pytest.mark.slow
def test_gradients_of_widths_are_judged_for_the_whole_batch(tmp_path: Path) -> None:
    """By clipping, with all widths at a limit: as one batch, in four micro-batches, on two processes, and both.

    Parts of a batch that would push a width beyond its limit count against those that would lead it back inside.
    """
    options = {"width_gradient": "clipping", "initial_bits": 2, "searching_ratio": 1.0}
    values = QVIT | {"budget": "2bit", "epochs": 1, "method_options": options}
    found = {}
    for count, accumulate in ((1, 1), (1, 4), (2, 1), (2, 2)):
        out = tmp_path / f"{count}-{accumulate}"
        script = ["-c", NOTING_GRADIENTS, json.dumps(values | {"accumulate": accumulate}), str(out)]
        for code, _, err in finish(launch(count, script)):
            assert code == 0, err
        found[count, accumulate] = [load_file(out / f"gradients{rank}") for rank in range(count)]
    (expected,) = found.pop((1, 1))
    everything = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert (everything == 0).sum() > 5 and (everything != 0).sum() > 5
    for ranks in found.values():
        for gradients in ranks:
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)


DYING = TRAIN.replace(
    "trainer.fit(quiet=True)",
    """import os, signal
def die(*_):
    if processes.rank == 1 and trainer.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.optimizer.register_step_pre_hook(die)
from qvit.errors import QvitError
try:
    trainer.fit(quiet=True)
except QvitError as error:
    print(error)
    os._exit(1)""",
)


def test_a_process_that_dies_ends_the_job_with_a_message_and_a_checkpoint(tmp_path: Path) -> None:
    values = QVIT | {"epochs": 50, "checkpoint_steps": 2}
    started = time.monotonic()
    results = finish(launch(2, ["-c", DYING, json.dumps(values), str(tmp_path / "run")]))
    assert results[1][0] == -signal.SIGKILL
    code, text, err = results[0]
    assert code == 1, err
    assert "process 0 of 2 lost the others" in text and "its own message says why" in text
    assert time.monotonic() - started < 120
    assert load_checkpoint(tmp_path / "run")["step"] == 4


def test_a_request_to_stop_reaches_all_processes(tmp_path: Path) -> None:
    """One of two gets SIGTERM: both end after the same step, with one checkpoint."""
    asked = DYING.replace("signal.SIGKILL", "signal.SIGTERM")
    values = QVIT | {"epochs": 50, "log_every": 3}
    results = finish(launch(2, ["-c", asked, json.dumps(values), str(tmp_path / "run")]))
    assert [code for code, _, _ in results] == [1, 1], results
    assert all("SIGTERM at step 6 of 200" in text for _, text, _ in results)
    assert load_checkpoint(tmp_path / "run")["step"] == 6


SCORE = """
import json, sys
import torch
from tiny_models import Batches
from qvit.training.evaluate import evaluate
from qvit.training.processes import Processes

processes = Processes("cpu")
for count in map(int, sys.argv[1:]):
    targets = torch.arange(count) % 7
    logits = torch.nn.functional.one_hot((targets + (torch.arange(count) % 3 == 0)) % 7, 7).float()
    rows = torch.arange(count)[processes.rank :: processes.world_size]
    batches = Batches((logits[part], targets[part]) for part in rows.split(2) if len(part))
    print(json.dumps(evaluate(torch.nn.Identity(), batches, reduce=processes.sum)))
    print(json.dumps(processes.gather_objects(processes.rank)))
"""


def test_an_evaluation_counts_each_image_once(tmp_path: Path) -> None:
    """Also where a process has fewer images than another, or none."""
    counts = (1, 5)
    results = finish(launch(3, ["-c", SCORE, *map(str, counts)]))
    assert all(code == 0 for code, _, _ in results), results
    for _, text, _ in results:
        said = iter([json.loads(line) for line in text.splitlines()])
        for count, scores, ranks in zip(counts, said, said, strict=True):
            right = sum(number % 3 != 0 for number in range(count))
            assert scores["images"] == count and scores["top1"] == pytest.approx(100 * right / count)
            assert ranks == [0, 1, 2]


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "cpu", "FSDP is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "cpu", "DeepSpeed is not supported"),
        ({}, "cpu:0", "--device is auto, cpu or cuda, not 'cpu:0'"),
    ],
)
def test_what_is_no_data_parallelism_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, message: str
) -> None:
    for key, value in (environment | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=message):
        Processes(device)


@pytest.mark.slow
def test_accelerate_launch_trains_the_model_of_one_process(tmp_path: Path) -> None:
    """The command line under accelerate's launcher, over gloo, on real images: float, 8 bits, and Q-ViT at 3 bits.

    Tolerances on the loss: 10⁻⁴ for the float model and 1 % at 8 bits, over the whole run; 10⁻⁵ for Q-ViT until a value
    crosses a rounding boundary because a sum was added in another order. From there on a 3-bit run is another one.
    """

    def run(count: int, name: str, *options: str) -> Path:
        out = tmp_path / f"{name}-{count}"
        start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--multi_gpu", "--main_process_port", str(free_port())] if count > 1 else []
        command = [*start, "-m", "qvit.cli", "train", "vit_digits", "--data", "digits", "--device", "cpu", "--quiet"]
        command += [*options, "--batch-size", "48", "--set", "log_every=1", "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert sum(line.startswith("accuracy") for line in done.stdout.splitlines()) == 1, "only the first one speaks"
        assert json.loads((out / "config.json").read_text())["processes"] == count
        return out

    def both(name: str, *options: str) -> tuple[list[dict[str, Any]], list[list[float]]]:
        """Results and losses of one process and of two."""
        paths = [run(count, name, *options) for count in (1, 2)]
        results = [json.loads((path / "result.json").read_text()) for path in paths]
        assert [result["images"] for result in results] == [597, 597]
        return results, [[event["loss"] for event in events(path, "step")] for path in paths]

    results, losses = both("float", "--method", "float", "--epochs", "8", "--lr", "3e-3", "--set", "warmup_epochs=1")
    assert len(losses[0]) == 200 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert results[1]["accuracy"] == pytest.approx(results[0]["accuracy"], abs=1 / 5.97)
    learn = ["--weights", str(tmp_path / "float-1"), "--lr", "1e-3", "--distill", "1", "--set", "monitor_share=0.1"]
    results, losses = both("lsq", *learn, "--method", "lsq+", "--plan", "w8a8", "--epochs", "2")
    assert len(losses[0]) == 44 and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert results[1]["bit_operations"] == results[0]["bit_operations"]
    results, losses = both("qvit", *learn, "--method", "qvit", "--budget", "3bit", "--epochs", "3")
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-5)
    assert max(result["bit_operations"] for result in results) <= 8_337_664
