"""Integer forms against their formulas in Python's own integers, against the float functions, and at their limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qvit.nonlinear import OPERATIONS, base, fqvit, ibert, ivit, layer_norm, values

EXP = torch.arange(-(2**15), 1)
ALL_GELU = torch.arange(-base.LARGEST["gelu"], base.LARGEST["gelu"] + 1)
MODULES = {"i-bert": ibert, "i-vit": ivit}


def python_exp(name: str, x: int) -> int:
    if name == "i-bert":
        z = -x // 710
        return (((x + 710 * z + 1385) ** 2 + 1006166) * 183) >> (14 + z)
    t = x + (x >> 1) - (x >> 4)
    return ((1024 + (-(-t & 1023) >> 1)) << 5) >> (-t >> 10)


def python_softmax(name: str, scores: list[int]) -> list[int]:
    exponential = "i-bert" if name == "fq-vit" else name
    e = [python_exp(exponential, max(s - max(scores), -(2**15))) for s in scores]
    if name == "fq-vit":
        ratios = [(sum(e) + own // 2) // own if own else 1 << 40 for own in e]
        q = [math.floor(math.log2(r)) + (r >= 1.5 * 2 ** math.floor(math.log2(r))) for r in ratios]
        return [2 ** (15 - own) if own < 16 else 0 for own in q]
    bits = sum(e).bit_length()
    return [(own * (2 ** (bits + 15) // sum(e)) + 2 ** (bits - 1)) >> bits for own in e]


def python_gate(name: str, x: int) -> int:
    sign = (x > 0) - (x < 0)
    if name == "i-bert":
        return ((7261607 + sign * (7261607 - (min(abs(x), 2562) - 2562) ** 2)) << 14) // 7261607
    a = -min(abs(x), 2**14)
    e = python_exp(name, a + (a >> 1) + (a >> 3) + (a >> 4))
    return (2**30 if x >= 0 else e << 15) // (2**15 + e)


def python_norm(name: str, x: list[int]) -> list[int]:
    count = len(x)
    mean = (2 * sum(x) + count) // (2 * count)
    square = sum((own - mean) ** 2 for own in x)
    if name == "i-bert":
        root, one, bits = max(math.isqrt(square // count), 1), 2**14, 4
    else:
        n = max(square, 1)
        root, one, bits = 2 ** (n.bit_length() // 2), round(math.sqrt(count) * 1024), 0
        for _ in range(10):
            root = (root + n // root) >> 1
    length = root.bit_length() + bits
    factor = (one << root.bit_length()) // root
    return [((own - mean) * factor + 2 ** (length - 1)) >> length for own in x]


@pytest.mark.parametrize(
    ("operation", "python"), [("softmax", python_softmax), ("layernorm", python_norm)], ids=["softmax", "layernorm"]
)
def test_rows_are_what_the_formulas_say(operation: str, python: Callable[[str, list[int]], list[int]]) -> None:
    most = base.LARGEST[operation]
    for name, form in OPERATIONS[operation].items():
        for spread in (0, 3, 500, 5000, most):
            rows = torch.randint(-spread, spread + 1, (4, 37))
            rows[0, 0] = most  # and an outlier
            assert form(rows).tolist() == [python(name, row) for row in rows.tolist()], (name, spread)


@pytest.mark.parametrize("name", MODULES)
def test_exponentials_are_close_and_rise(name: str) -> None:
    e = MODULES[name].exponential(EXP)
    assert e[::97].tolist() == [python_exp(name, x) for x in EXP[::97].tolist()]
    assert bool((e.diff() >= 0).all()) and int(e.min()) == 0 and 2**14 < int(e.max()) <= 2**15
    error = (e / e.max() - (EXP.double() / 1024).exp()).abs().max()
    assert error < {"i-bert": 0.0020, "i-vit": 0.0443}[name]


@pytest.mark.parametrize("name", MODULES)
def test_gelus_are_close_and_their_gates_rise(name: str) -> None:
    gate, y = MODULES[name].gate(ALL_GELU), OPERATIONS["gelu"][name](ALL_GELU)
    assert gate[::499].tolist() == [python_gate(name, x) for x in ALL_GELU[::499].tolist()]
    assert torch.equal(y, (ALL_GELU * gate + 1024) >> 11) and int(y.abs().max()) <= 2**21
    assert bool((gate.diff() >= 0).all()) and (int(gate[0]), int(gate[-1])) == (0, 2**15)
    error = (y / 2**14 - F.gelu(ALL_GELU.double() / 1024)).abs().max()
    assert error < {"i-bert": 0.0183, "i-vit": 0.0255}[name]


@pytest.mark.parametrize("name", OPERATIONS["softmax"])
def test_probabilities_sum_to_one_and_keep_the_order(name: str) -> None:
    form, most = OPERATIONS["softmax"][name], base.LARGEST["softmax"]
    scores = torch.cat([torch.randn(50, 197) * 3000, torch.full((1, 197), most)]).round().long().clamp(-most, most)
    q = form(scores)
    in_order = q.gather(1, scores.argsort(1))
    assert bool((in_order.diff(dim=1) >= 0).all()) and int(q.min()) >= 0 and int(q.max()) <= 2**15
    if name != "fq-vit":  # each is rounded by half a code, and the factor of a row by at most a code in 2^15
        assert int((q.sum(1) - 2**15).abs().max()) <= 197 // 2 + 1
    for row, largest in (([5], 2**15), ([most, -most, -most], 2**15)):
        assert int(form(torch.tensor(row))[0]) == largest
    assert torch.equal(form(torch.tensor([7] * 4096)), torch.full((4096,), 2**3))  # no overflow in long rows


def test_logarithmic_probabilities_are_powers_of_two_at_most_a_factor_of_1_5_away() -> None:
    scores = torch.randn(20, 64) * 2000
    q, exact = fqvit.softmax(scores.round().long()) / 2**15, (scores.double() / 1024).softmax(1)
    likely = exact > 1e-2
    assert bool((q[likely].log2() % 1 == 0).all()) and float((q / exact)[likely].log2().abs().max()) < 0.6


def test_bits_are_counted_and_roots_are_exact() -> None:
    powers = 2 ** torch.arange(62)
    sides = torch.cat([torch.arange(1, 3000), torch.randint(2**10, 2**31, (3000,))])
    n = torch.cat([torch.arange(2**16), powers, powers - 1, sides.square(), sides.square() - 1, sides.square() + sides])
    assert base.bit_length(n).tolist() == [own.bit_length() for own in n.tolist()]
    n = n[n < 2**62]
    exact = torch.tensor([math.isqrt(own) for own in n.tolist()])
    assert torch.equal(ibert.square_root(n), exact)
    assert set((ivit.square_root(n[n > 0]) - exact[n > 0]).tolist()) == {0, 1}


@pytest.mark.parametrize("name", MODULES)
def test_layer_norms_are_close_whatever_the_size_of_their_input(name: str) -> None:
    weight, bias = torch.randn(192) + 1, torch.randn(192)
    for size, bound in ((0.05, 0.15 if name == "i-bert" else 0.03), (1.0, 0.02), (500.0, 0.006)):
        x = torch.randn(30, 192) * size + size
        y = layer_norm(OPERATIONS["layernorm"][name], x, weight, bias, 1e-6)
        assert float((y - F.layer_norm(x, (192,), weight, bias, 1e-6)).abs().max()) < bound, size
    most = base.LARGEST["layernorm"]
    extreme = torch.full((1, base.MOST_CHANNELS), -most)
    extreme[0, 0] = most  # the largest sum of squares that there is, but for one channel
    half = torch.where(torch.arange(base.MOST_CHANNELS) % 2 == 0, most, -most)[None]  # and the largest
    for row in (extreme, half):
        exact = F.layer_norm(row.double(), row.shape[1:])
        assert float((OPERATIONS["layernorm"][name](row) / 2**10 - exact).abs().max()) < 0.006
    assert not OPERATIONS["layernorm"][name](torch.full((1, 192), 12345)).any()


def test_the_affine_part_has_16_bit_weights_and_any_bias() -> None:
    n = torch.randint(-(2**15), 2**15, (8, 16))
    for scale in (1e-6, 1.0, 3e5):
        weight, bias = torch.randn(16) * scale, torch.randn(16) * scale
        codes, unit = base.affine(n, weight, bias)
        exact = n / 2**10 * weight.double() + bias.double()
        assert float((codes * unit - exact).abs().max()) < 2**-10 * float(weight.abs().max()) and codes.max() <= 2**23
    for weight, bias in ((None, None), (torch.zeros(16), torch.full((16,), 1e6)), (torch.full((16,), 2.0**24), None)):
        codes, unit = base.affine(n, weight, bias)
        expected = n / 2**10 * (1 if weight is None else weight.double()) + (0 if bias is None else bias)
        assert float(unit) == 2.0 ** math.log2(float(unit))
        expected = expected.double().clamp(-(2**23) * unit, 2**23 * unit)
        assert torch.allclose((codes * unit).double(), expected, 1e-4, 1e-2)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_are_on_the_grid_and_gradients_those_of_the_float_function(operation: str) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        if operation == "softmax":
            return values.softmax(ivit.softmax, x), x.softmax(-1)
        if operation == "gelu":
            return values.gelu(ivit.gelu, x, "tanh"), F.gelu(x, approximate="tanh")
        return values.layer_norm(ivit.layer_norm, x, None, None, 1e-6), F.layer_norm(x, x.shape[-1:], eps=1e-6)

    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
    own, exact = both(x)
    assert torch.equal(own * 2**15, (own * 2**15).round()) and not torch.equal(own, exact)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (own, exact)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert torch.equal(both(x)[0], own)
        broken = x.clone()
        broken[0, 0] = float("nan")
        assert bool(both(broken)[0][0, 0].isnan())


def test_values_are_those_of_all_rows_at_once() -> None:
    x = torch.randn(3, 5, 40, 197) * 3
    for function, form, bits in ((values.softmax, fqvit.softmax, 15), (values.gelu, ibert.gelu, 14)):
        own = function(form, x)
        assert torch.equal(own * 2**bits, form(values.fixed(function.__name__, x)).float())


def test_quotients_are_exact() -> None:
    d = torch.randint(1, 2**24, (20000,))
    q = torch.randint(0, 2**29, (20000,))
    for n in (q * d, (q * d - 1).clamp_min(0), q * d + d - 1):
        assert torch.equal(base.quotient(n, d), n // d)


def test_masked_scores_have_no_probability() -> None:
    scores = torch.tensor([[1.0, float("-inf"), 2.0, -100.0]])
    for name in OPERATIONS["softmax"]:
        assert values.softmax(OPERATIONS["softmax"][name], scores)[0, [1, 3]].tolist() == [0, 0]
