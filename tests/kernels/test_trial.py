"""Every operator runs in the form that a trial found faster, and the choice stays as it is."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from grids import make_grid, needs_kernels

from qvit.kernels import cpu, trial
from qvit.kernels import fake_quantize as operators
from qvit.kernels.fake_quantize import Mixed, backward_on, codes_on, difference_on, quantize_on

SLOW, FAST = 0.003, 0.0
OPERATORS = ("forward", "backward", "codes", "difference", "forward between grids", "backward between grids")


class Case:
    """A library's file, and an operator whose forms take a given time and are counted."""

    def __init__(self, folder: Path) -> None:
        self.library, self.kept = folder / "cpu-key-sum.so", folder / "cpu-key-sum.forms.json"
        self.library.touch()
        self.made = 0

    def choose(self, seconds: tuple[float, float]) -> bool:
        """What a new process chooses where the two forms take these times."""

        def forms(operator: str) -> tuple[trial.Form, trial.Form]:
            self.made += 1
            return lambda: time.sleep(seconds[0]), lambda: time.sleep(seconds[1])

        trial._chosen.clear()
        return trial.is_compiled("forward", forms, lambda: self.library)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.delenv("QVIT_KERNELS", raising=False)
    monkeypatch.setattr(trial, "_chosen", {})
    return Case(tmp_path)


@pytest.mark.parametrize("compiled_is_faster", [True, False])
def test_the_faster_form_is_chosen_and_kept(
    case: Case, compiled_is_faster: bool, caplog: pytest.LogCaptureFixture
) -> None:
    times, others = ((FAST, SLOW), (SLOW, FAST)) if compiled_is_faster else ((SLOW, FAST), (FAST, SLOW))
    assert case.choose(times) is compiled_is_faster
    assert json.loads(case.kept.read_text()) == {"forward": compiled_is_faster}
    assert trial.plain() == ([] if compiled_is_faster else ["forward"])
    assert len(caplog.messages) == (not compiled_is_faster)
    assert case.choose(others) is compiled_is_faster and case.made == 1, "kept, whatever is faster today"


@pytest.mark.parametrize("content", ["{", "[]", '{"forward": "no"}', '{"backward": false}'])
def test_a_choice_that_cannot_be_read_is_made_anew(case: Case, content: str) -> None:
    case.kept.write_text(content)
    assert case.choose((FAST, SLOW)) and case.made == 1
    assert json.loads(case.kept.read_text())["forward"] is True


def test_nothing_is_kept_beside_a_library_that_is_not(case: Case) -> None:
    case.library.unlink()
    assert not case.choose((SLOW, FAST)) and not case.kept.exists()


@pytest.mark.parametrize("value", ["1", "avx2"])
def test_a_pinned_form_needs_no_trial(case: Case, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_KERNELS", value)
    assert case.choose((SLOW, FAST)) and not case.made and not case.kept.exists()


@needs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
def test_both_forms_of_a_trial_compute_the_same(operator: str) -> None:
    compiled, plain = (form() for form in operators._forms(operator))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-2)


@needs_kernels
def test_an_operator_that_lost_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of the kernels, sums close to them."""
    grid, other = (make_grid((3, 1, 1), signed=signed, offset=True) for signed in (True, False))
    mixed, x, grad = Mixed(grid, other, torch.rand(3, 1, 1)), torch.randn(2, 3, 50, 40), torch.randn(2, 3, 50, 40)

    def results() -> list[torch.Tensor]:
        found = [quantize_on(x, grid), quantize_on(x, grid, scratch="own").clone(), codes_on(x, grid)]
        found += [difference_on(grad, x, grid, other), *backward_on(grad, x, grid)]
        found += backward_on(grad, x, grid, torch.empty_like(x))
        return [*found, quantize_on(x, mixed), *backward_on(grad, x, mixed)]

    monkeypatch.setattr(trial, "_chosen", dict.fromkeys(OPERATORS, True))
    compiled = results()
    monkeypatch.setattr(trial, "_chosen", dict.fromkeys(OPERATORS, False))
    monkeypatch.setattr(cpu, "_call", lambda *_: pytest.fail("a kernel ran"))
    for own, plain in zip(compiled, results(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-3)
