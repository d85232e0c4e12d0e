"""The processes that train together: who this one is, and the few things that they say to each other.

A job of several processes is started by accelerate's launcher (or torchrun), which sets the environment that
`PartialState` reads; alone, nothing of it is touched. Processes hold the same model, see different images, and average
their gradients (`DistributedDataParallel`). What crosses them besides gradients is small: counts of an evaluation, and
once every few steps the figures of the log.

Precision, batch size and everything else are the run's config and not the launcher's: the same config gives the same
training on one process or on eight.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qvit.errors import QvitError, UsageError, first_line


class Processes:
    """One process alone, or one of several.

    Args:
        device: `auto` (a CUDA GPU if there is one), or a device; with several processes `cpu`, or `cuda` for one GPU
            each.

    Attributes:
        rank: Number of this process; 0 writes files and shows progress.
        world_size: How many there are.
        device: Where this one computes.

    Raises:
        UsageError: A device that is not there, or a kind of distribution that is not data parallelism.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.world_size, self.device = 0, 1, device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._join(device)
        elif device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        else:
            try:
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError) as error:
                raise UsageError(f"device '{device}' is not available: {first_line(error)}") from None

    def _join(self, device: str) -> None:
        for flag, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
            if os.environ.get(flag, "false").lower() == "true":
                raise UsageError(
                    f"training under {name} is not supported: a ViT fits on each device; launch with --multi_gpu"
                )
        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"on several processes --device is auto, cpu or cuda, not '{device}': each takes its own")
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if not on_cpu and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
            raise UsageError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes were started here, but there are "
                f"{torch.cuda.device_count()} GPUs: start one process per GPU, or give --device cpu"
            )
        try:
            state = PartialState(cpu=on_cpu)
        except (RuntimeError, ValueError) as error:
            raise QvitError(f"the processes of this job cannot reach each other: {first_line(error)}") from error
        atexit.register(state.destroy_process_group)
        self.rank, self.world_size = state.process_index, state.num_processes
        self.device = str(state.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def wait(self) -> None:
        """Returns when all processes are here."""
        self.sum(torch.zeros(1))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over processes, on its device. All of them must call it."""
        return values if self.alone else self.gather(values).sum(0)

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every process, stacked along a new first dimension. All of them must call it."""
        if self.alone:
            return values.unsqueeze(0)
        own = values.detach().to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(everyone, own)
        return torch.stack(everyone).to(values.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every process, in their order. Small data only; all of them must call it."""
        if self.alone:
            return [value]
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def share(self, model: nn.Module) -> nn.Module:
        """Gives all processes the parameters and buffers of process 0, in place. All of them must call it."""
        if not self.alone:
            for value in model.state_dict().values():
                torch.distributed.broadcast(value, 0)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over processes; parameters and buffers become those of process 0."""
        if self.alone or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        devices = [torch.device(self.device)] if self.device.startswith("cuda") else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    @contextmanager
    def lost_ones_are_reported(self) -> Iterator[None]:
        """Turns the error that follows when another process has ended into one that says so."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            lost = ("gloo", "nccl", "connection closed", "connection reset", "socket", "timed out", "broken pipe")
            if self.alone or not any(word in text for word in lost):
                raise
            raise QvitError(
                f"process {self.rank} of {self.world_size} lost the others ({first_line(error)}): "
                "one of them ended or cannot be reached, and its own message says why"
            ) from error
