"""Hooks of a method that is several classes: each one's own part runs, whatever the others are and in which order."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_trainer
from torch import Tensor

from qvit.errors import QvitError
from qvit.methods import Method, base, method_names
from qvit.methods.dq import DQMethod
from qvit.methods.edmips import EdMIPSMethod
from qvit.methods.irm import IRMMethod
from qvit.methods.lsq import LSQMethod
from qvit.methods.ofq import OFQMethod
from qvit.methods.qvit import QViTMethod
from qvit.methods.vvtq import WithRemedy, _VariationAware
from qvit.oscillation import RemedyOptions
from qvit.training.hooks import COMPOSED, ComposedHooks


def own_parts(cls: type) -> list[tuple[str, Any]]:
    """(hook, function) of all classes that `cls` consists of, as they wrote them."""
    owners = [owner for owner in cls.__mro__ if issubclass(owner, ComposedHooks) and owner is not ComposedHooks]
    return [part for owner in owners for part in vars(owner)["_own"].items()]


class Notes(Method):
    """Counts the calls of each hook."""

    def __init__(self, config: Any, options: Any) -> None:
        super().__init__(config, options)
        self.calls: list[str] = []

    def attach(self, *_: Any) -> None:
        self.calls.append("attach")

    def on_epoch(self, *_: Any) -> None:
        self.calls.append("on_epoch")

    def penalty(self, step: int = 0) -> Tensor | None:
        self.calls.append("penalty")
        return torch.tensor(1.0)

    def before_step(self, *_: Any) -> None:
        self.calls.append("before_step")

    def after_step(self, *_: Any) -> None:
        self.calls.append("after_step")

    def finish(self, *_: Any) -> None:
        self.calls.append("finish")

    def figures(self, *, every_width: bool) -> dict[str, Any]:
        self.calls.append("figures")
        return {"notes": len(self.calls)}

    def state_dict(self) -> dict[str, Any]:
        return {"note": torch.tensor(5.0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert list(state) == ["note"]
        self.calls.append("load_state_dict")


class Doubled:
    """A mixin that is no method, and knows nothing of them."""

    def before_step(self, trainer: Any) -> None:
        self.steps_seen = getattr(self, "steps_seen", 0) + 1


METHODS = [LSQMethod, QViTMethod, DQMethod, EdMIPSMethod, IRMMethod, OFQMethod]
CLASSES = [WithRemedy, _VariationAware, Notes, Doubled, *METHODS]


def combined(*classes: type) -> Any:
    """A class of several; None where Python cannot put them into this order."""
    try:
        return type("Combined", classes, {})
    except TypeError as error:
        assert "resolution" in str(error)
        return None


def test_every_pair_of_classes_has_the_parts_of_both() -> None:
    pairs = [pair for pair in itertools.permutations(CLASSES, 2) if any(issubclass(c, ComposedHooks) for c in pair)]
    made = {pair: cls for pair in pairs if (cls := combined(*pair)) is not None}
    assert len(made) > 80
    for pair, cls in made.items():
        expected = [part for one in pair for part in own_parts(one)]
        expected += [("before_step", Doubled.before_step)] if Doubled in pair else []
        for hook in COMPOSED:
            found = [part for _, part in cls._parts[hook]]
            assert len(set(found)) == len(found), f"{pair}: a part of {hook} is called twice"
            assert set(found) == {part for name, part in expected if name == hook}, f"{pair}: {hook}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [0, 1])
def test_all_parts_of_a_pair_run_in_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: type[Method], order: int
) -> None:
    """Each method with a remedy and with classes that note their calls, before and after it."""
    others = [Notes, Doubled] if issubclass(method, WithRemedy) else [Notes, WithRemedy, Doubled]
    cls: Any = combined(*(others[::-1] if order else others), method)
    assert cls is not None
    if not issubclass(method, WithRemedy):
        cls.Options = type("Options", (method.Options, RemedyOptions), {})
    name = next(name for name in method_names() if base._REGISTRY[name] is method and name != "lsq")
    monkeypatch.setitem(base._REGISTRY, name, cls)
    seen: list[tuple[str, str]] = []
    parts = dict(cls._parts)

    def noted(owner: type, hook: str, part: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append((owner.__name__, hook))
            return part(*args, **kwargs)

        return run

    for hook, own in parts.items():
        cls._parts[hook] = tuple((owner, noted(owner, hook, part)) for owner, part in own)
    trainer, made, _ = tiny_trainer(
        tmp_path, method=name, epochs=2, steps=2, method_options={"oscillation": "freezing"}, checkpoint_steps=1
    )
    trainer.fit(quiet=True)
    made.finish(trainer)
    hooks = [hook for hook in COMPOSED if hook != "load_state_dict"]
    wanted = {(owner.__name__, hook) for hook in hooks for owner, _ in parts[hook]}
    assert set(seen) == wanted
    assert made.calls.count("before_step") == made.calls.count("after_step") == made.steps_seen == 4
    assert made.calls.count("on_epoch") == 2 and made.calls.count("penalty") == 4
    state = made.state_dict()
    assert state["Notes"] == {"note": torch.tensor(5.0)}
    made.load_state_dict(state)
    assert made.calls[-1] == "load_state_dict"


def test_a_part_that_calls_another_is_an_error(tmp_path: Path) -> None:
    class Forgetful(QViTMethod):
        def before_step(self, trainer: Any) -> None:
            super().before_step(trainer)

    trainer, method, _ = tiny_trainer(tmp_path)
    method.__class__ = Forgetful
    with pytest.raises(TypeError, match="'before_step' of Forgetful calls that of QViTMethod.*leave out super"):
        method.before_step(trainer)


def test_figures_and_states_have_one_owner(tmp_path: Path) -> None:
    class Twice(QViTMethod):
        def figures(self, *, every_width: bool) -> dict[str, Any]:
            return {"bit_operations": 1.0}

    class Stateful(Method):
        noted: dict[str, Any]

        def state_dict(self) -> dict[str, Any]:
            return {"blocks.0.attn.qkv.query_weight": torch.ones(1)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.noted = state

    class Both(Notes, Stateful): ...

    _, method, _ = tiny_trainer(tmp_path)
    method.__class__ = Twice
    with pytest.raises(TypeError, match="figure 'bit_operations' of Twice is that of another class as well"):
        method.figures(every_width=False)
    own = Both(method.config, None)
    state = own.state_dict()
    assert list(state) == ["Stateful", "Notes"]
    own.load_state_dict(state)
    assert list(own.noted) == ["blocks.0.attn.qkv.query_weight"] and own.calls == ["load_state_dict"]
    with pytest.raises(QvitError, match="state of 'Other', which is no part of Both"):
        own.load_state_dict({"Other": {}})


def rates_of_widths(run: Path, method: str, epochs: int = 5, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The learning rate of the widths at each step of the search, and the model's state at the end of training."""
    trainer, own, model = tiny_trainer(run, method=method, epochs=epochs, steps=6, method_options=options)
    rates = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.extend(
            group["lr"] for group in optimizer.param_groups if group.get("name") == "widths" and group["params"]
        )

    trainer.optimizer.register_step_pre_hook(note)
    trainer.fit(quiet=True)
    own.finish(trainer)
    return rates, model.state_dict()


def test_widths_come_to_rest_with_vvtq_as_well(tmp_path: Path) -> None:
    """`width_schedule = search` is half a cosine over the 12 steps of the search, whatever is added to `qvit`."""
    rates, _ = rates_of_widths(tmp_path / "a", "qvit+vvtq", width_lr=0.1)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])
    assert rates == rates_of_widths(tmp_path / "b", "qvit", width_lr=0.1)[0]
    over_the_run, _ = rates_of_widths(tmp_path / "c", "qvit+vvtq", width_lr=0.1, width_schedule="run")
    assert over_the_run[-1] > 0.05


def test_without_its_additions_vvtq_leaves_qvit_as_it_is(tmp_path: Path) -> None:
    off = {"oscillation": "none", "scale_gradient": "count", "activation_scale_gradient": "count"}
    _, expected = rates_of_widths(tmp_path / "a", "qvit")
    _, found = rates_of_widths(tmp_path / "b", "qvit+vvtq", 5, **off)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
