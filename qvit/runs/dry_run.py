"""What a run would do, without doing it: plan, costs, steps, memory. Nothing is written, downloaded or computed.

The model is built without storage (on PyTorch's meta device) and run on fake tensors, which have shapes and no
content. Bytes of a training step, per process:

    parameters + gradients + optimizer state + activations saved for backward + float model (+ average, + teacher)

Activations are what autograd saves in one forward pass of the real micro-batch in the run's precision: every storage
once, parameters left out. Workspaces and the gradients of activations come and go while activations are released, and
are not counted; nor is what an allocator keeps. The peaks that `benchmarks/measure/train_step.py` measures (no float
model is kept there) are 16 to 22 % above the sum with glibc's allocator.

Without a CUDA device the pass follows the CPU's autocast; that of CUDA keeps softmax and LayerNorm in fp32.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from qvit.data.open import DataBundle, data_config_of
from qvit.errors import UsageError
from qvit.methods import create_method
from qvit.models.convert import quantize
from qvit.models.create import WEIGHTS_FILE, create_model
from qvit.models.families import inspect_model
from qvit.plan.cost import FLOAT_BITS
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of
from qvit.runs.steps import step_configs, without_steps
from qvit.runs.subject import float_model, open_images
from qvit.runs.teaching import require_what_teaches
from qvit.training.config import TrainConfig
from qvit.training.loop import micro_batch
from qvit.training.optimizer import create_optimizer


def dry_run(config: TrainConfig, *, with_data: bool = True) -> dict[str, Any]:
    """The plan of a training run.

    Args:
        config: The run's options.
        with_data: Opens the data and counts the images; without, counts and steps are None, and the classifier is as
            large as the model's own.

    Returns:
        Plain data, see docs/cli.md; bit operations and bytes are plain counts.

    Raises:
        QvitError: Unknown names, an impossible budget, a batch that cannot be shared, data that are not there.
    """
    if config.steps is not None:
        return _dry_steps(config, with_data=with_data)
    method = create_method(config)
    if not method.trains:
        raise UsageError(f"method '{config.method}' has no training to plan: leave out --dry-run")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = micro_batch(config, processes)
    config.require_labels_alone()
    bundle = open_images(config) if with_data else None
    images, classes = (None, None) if bundle is None else (_count_images(bundle), bundle.num_classes)
    with torch.device("meta"):
        model = float_model(config, classes, load=False)
        if bundle is not None:
            require_what_teaches(config, model, bundle.train)
        cost = inspect_model(model)
        plan = method.plan(cost)
        if plan is not None:
            model = quantize(model, plan, in_place=True)
    widths = {site: (FLOAT_BITS,) for site in cost.sites} if plan is None else plan.widths()
    batch_size = config.batch_size if images is None else min(config.batch_size, images["train"])
    micro = min(micro, batch_size)
    steps_per_epoch = None if images is None else images["train"] // batch_size
    return {
        **{key: getattr(config, key) for key in ("model", "method", "budget", "epochs", "accumulate")},
        "budget_bit_operations": method.budget(cost),
        "bit_operations": cost.bit_operations(widths),
        "weight_bytes": cost.weight_bytes(widths),
        "widths": [] if plan is None else _widths_by_kind(plan),
        "plan": None if plan is None else plan.to_json(),
        "float_weights": _source_of_weights(config),
        "images": images,
        "classes": getattr(model, "num_classes", None),
        "processes": processes,
        "batch_size": batch_size,
        "micro_batch": micro,
        "steps_per_epoch": steps_per_epoch,
        "steps": None if steps_per_epoch is None else steps_per_epoch * config.epochs,
        "memory": _memory(config, model, micro, quantizes=method.quantizes),
        "config": config.model_dump(),
    }


def _dry_steps(config: TrainConfig, *, with_data: bool) -> dict[str, Any]:
    """The last of several steps, with the epochs of all; its teacher is the step before, as large as itself."""
    step_configs(config, Path())
    report = dry_run(without_steps(config), with_data=with_data)
    parts = report["memory"]["parts"]
    parts["teacher"] = parts["parameters"]
    report["memory"]["total"] = sum(parts.values())
    return report | {"config": config.model_dump()}


def _count_images(bundle: DataBundle) -> dict[str, int]:
    sources = {"train": bundle.train, "held out": bundle.held_out, "test": bundle.test}
    return {name: len(source) for name, source in sources.items() if source is not None}


def _source_of_weights(config: TrainConfig) -> str:
    if config.weights is not None:
        return config.weights + ("" if Path(config.weights).exists() else " (nothing there yet)")
    return "timm's hub" if config.pretrained else "nowhere: untrained"


def _widths_by_kind(plan: QuantPlan) -> list[dict[str, Any]]:
    """One row per kind of tensor: a site's name with its block numbers replaced by stars."""
    rows: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for site, spec in plan.sites.items():
        kind = re.sub(r"\.\d+(?=\.)", ".*", site)
        learned = spec is not None and spec.learn_bit_width
        start = {"tensors": kind, "sites": 0, "widths": 0, "bits": None, "learned": learned}
        row = rows.setdefault((kind, spec is None, learned), start)
        row["sites"] += 1
        if spec is not None:
            row["widths"] += len(spec.widths)
            row["bits"] = [min(seen := [*(row["bits"] or ()), *spec.widths]), max(seen)]
    return list(rows.values())


def _memory(config: TrainConfig, model: nn.Module, micro: int, *, quantizes: bool) -> dict[str, Any]:
    parameters = sum(map(_size, model.parameters()))
    bf16, place = config.precision == "bf16", config.device
    parts = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": round(parameters * _state_per_parameter(config.opt)),
        "activations": saved_for_backward(model, micro, device=place, bf16=bf16, train=config.stochastic_depth),
    }
    if config.ema_decay:
        parts["averaged_model"] = parameters
    if quantizes:  # the float model stays, to be scored beside the other and to be learned from
        parts["float_model"] = sum(_size(p) for name, p in model.named_parameters() if "_quantizer." not in name)
    if config.distill and config.teacher:
        parts["teacher"] = _bytes_of_teacher(config.teacher, config.teacher_kwargs)
    return {"total": sum(parts.values()), "parts": parts, "note": "an allocator takes more, on CPU up to a third"}


def _bytes_of_teacher(name: str, kwargs: dict[str, Any]) -> int:
    if (file := Path(name) / WEIGHTS_FILE).is_file():
        return file.stat().st_size
    with torch.device("meta"):
        return sum(map(_size, create_model(name, **kwargs).parameters()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state_per_parameter(opt: str) -> float:
    """Bytes that the optimizer keeps per byte of a matrix, from a step on a small one. Raises UsageError if unknown."""
    layer = nn.Linear(32, 32, bias=False)
    optimizer = create_optimizer(layer, opt=opt, lr=1e-3, weight_decay=0.0, width_lr=1e-3)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    return sum(map(_size, kept)) / _size(layer.weight)


def saved_for_backward(
    model: nn.Module, batch: int, *, device: str = "cpu", bf16: bool = False, train: bool = False
) -> int:
    """Bytes of activations that autograd saves in a forward pass and its loss, without computing it.

    Args:
        model: Float or quantized, calibrated or not, on any device; its parameters become fake ones: it is used up.
        batch: Images in the pass.
        device: Where the run will be; a CUDA device counts where there is one.
        bf16: Under autocast.
        train: With dropout and stochastic depth.
    """
    place = "cuda" if torch.cuda.is_available() and device.startswith(("auto", "cuda")) else "cpu"
    shape = data_config_of(model)["input_size"]
    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        for module in model.modules():
            for name, own in [*module._parameters.items(), *module._buffers.items()]:
                if own is None:
                    continue
                fake = torch.empty(own.shape, dtype=own.dtype, device=place)
                if isinstance(own, nn.Parameter):
                    module._parameters[name] = nn.Parameter(fake, requires_grad=own.requires_grad)
                else:
                    module._buffers[name] = fake
        model.train(train)
        for _, quantizer in quantizers_of(model):
            quantizer.calibrated = True
        persistent = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in persistent:
                saved[storage._cdata] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        targets = torch.zeros(batch, dtype=torch.int64, device=place)
        with hooks, torch.autocast(place, torch.bfloat16, enabled=bf16):
            logits = model(torch.empty(batch, *shape, device=place)).float()
            F.cross_entropy(logits, targets) if logits.dim() == 2 and logits.shape[-1] else logits.sum()
    return sum(storage.nbytes() for storage in saved.values())
