"""torch.compile: one graph, the same numbers, and no second compilation when widths move."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import digit_batches, digits_model, events, small_config, tiny_trainer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qvit.methods import create_method
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.quantizers import quantizers_of

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPU"
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def learned_model(**options: Any) -> tuple[nn.Module, CostModel]:
    """A calibrated model with the starting plan of `qvit`."""
    model = digits_model()
    cost = inspect_model(model)
    plan = create_method(small_config(method="qvit", budget="3bit", method_options=options)).plan(cost)
    assert plan is not None
    return calibrate(quantize(model, plan), digit_batches()), cost


def set_widths(model: nn.Module, bits: float) -> None:
    with torch.no_grad():
        for _, quantizer in quantizers_of(model):
            quantizer.bit_width.fill_(bits)


def step(model: Any, parameters: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one forward and backward pass."""
    parameters.zero_grad()
    output = model(images)
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in parameters.named_parameters() if p.grad is not None}
    return output.detach(), gradients


@pytest.mark.parametrize("width_gradient", ["clipping", "difference", "interpolation"])
def test_widths_move_across_integers_without_compiling_again(width_gradient: str) -> None:
    model, _ = learned_model(width_gradient=width_gradient)
    images = digit_batches(1)[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits in (4.0, 3.49, 3.51, 2.0, 1.3, 8.0, 9.0, 5.5):
            set_widths(model, bits)
            expected, gradients = step(model, model, images)
            actual, compiled_gradients = step(compiled, model, images)
            torch.testing.assert_close(actual, expected)
            assert compiled_gradients.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(compiled_gradients[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
            outputs.append(actual)
    assert counter.frame_count == 1
    assert len({tuple(output.flatten().tolist()) for output in outputs}) >= 5, "the widths had no effect"


def test_scales_and_weights_move_without_compiling_again() -> None:
    model, _ = learned_model()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in digit_batches(5):
            optimizer.zero_grad()
            compiled(images).square().mean().backward()
            optimizer.step()
    assert counter.frame_count == 1


def test_freezing_compiles_once_more_and_then_no_more() -> None:
    model, _ = learned_model(width_gradient="difference")  # x̂ is on one grid before, too
    images = digit_batches(1)[0]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(images)
    set_widths(model, 2.6)
    before = compiled(images).detach()
    freeze(model)
    torch.testing.assert_close(compiled(images).detach(), before)
    assert counter.frame_count == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(compiled, model, images)
    assert counter.frame_count == 2


def test_the_penalty_is_one_graph_without_recompilation() -> None:
    config = small_config(method="qvit", budget="3bit")
    model, cost = learned_model()
    method = create_method(config)
    method.attach(model, cost, 6)
    counter = CompileCounterWithBackend("aot_eager")
    penalty: Any = torch.compile(method.penalty, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits in (8.0, 4.6, 2.2):
            set_widths(model, bits)
            expected = method.penalty()
            assert expected is not None
            torch.testing.assert_close(penalty(), expected)
    assert counter.frame_count == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("width_gradient", ["clipping", "difference", "interpolation"])
def test_inductor_agrees_with_eager(width_gradient: str) -> None:
    # In double precision: fused arithmetic rounds differently, which in single precision moves values that lie on the
    # edge between two grid points to the other side.
    model, _ = learned_model(width_gradient=width_gradient)
    model.double()
    images = digit_batches(1)[0].double()
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits in (4.0, 2.6, 7.7):
            set_widths(model, bits)
            expected, gradients = step(model, model, images)
            actual, compiled_gradients = step(compiled, model, images)
            torch.testing.assert_close(actual, expected)
            for name, gradient in gradients.items():
                torch.testing.assert_close(compiled_gradients[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@needs_compiler
@pytest.mark.slow
def test_a_run_may_be_compiled(tmp_path: Path) -> None:
    """The searching stage with `compile`: the losses are those of the plain run."""
    losses = []
    for compiled in (False, True):
        run = tmp_path / str(compiled)
        options = {"searching_ratio": 1.0, "width_lr": 0.1}
        trainer, method, _ = tiny_trainer(run, steps=6, epochs=1, compile=compiled, lr=1e-4, method_options=options)
        trainer.fit(quiet=True)
        method.finish(trainer)
        losses.append([event["task_loss"] for event in events(run, "step")])
        assert len(events(run, "freeze")) == 1
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
