"""Handwritten digits, the data set that needs no download: split, exactness, augmentation."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import CONFIG, GREY, drain, names

from qvit.data import digits
from qvit.data.open import (
    AugmentConfig,
    calibration_batches,
    eval_loader,
    open_data,
    open_source,
    train_loader,
)
from qvit.errors import UsageError


def test_digits_split() -> None:
    bundle = open_data("digits", seed=5)
    assert (len(bundle.train), len(bundle.test), bundle.num_classes) == (1200, 597, 10)
    assert bundle.class_names == [str(digit) for digit in range(10)] and "fixed stratified third" in bundle.note
    assert not set(names(bundle.train)) & set(names(bundle.test))
    shares = np.bincount(bundle.test.targets) / np.bincount(np.concatenate([bundle.train.targets, bundle.test.targets]))
    assert np.all(abs(shares - 597 / 1797) < 1 / 174)
    assert names(open_source("digits")) == names(open_data("digits").test) == names(bundle.test)
    for given_too in ({"test_data": "digits"}, {"class_map": "map.txt"}):
        with pytest.raises(UsageError, match="test images and classes of its own"):
            open_data("digits", **given_too)


def test_digits_are_exact_at_their_own_size() -> None:
    test = open_data("digits").test
    images, targets = drain(eval_loader(test, GREY, batch_size=100))
    assert images.shape == (597, 1, 8, 8) and images.dtype == torch.float32
    assert targets.dtype == torch.int64 and targets.tolist() == test.targets.tolist()
    raw = torch.stack([image for image, _ in test.dataset(mode="L")])
    assert raw.min() == 0 and raw.max() == 1 and torch.equal(raw * 16, (raw * 16).round())
    assert torch.equal(images, (raw - 0.25) / 0.5)
    colour, _ = drain(eval_loader(test, {**CONFIG, "input_size": (3, 8, 8)}, batch_size=100))
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.equal(colour, (raw - mean) / std)
    large, _ = drain(eval_loader(test, {**CONFIG, "input_size": (3, 24, 32)}, batch_size=100))
    assert large.shape == (597, 3, 24, 32)
    torch.testing.assert_close(large.mean(dim=(2, 3)), colour.mean(dim=(2, 3)), atol=0.1, rtol=0)


def test_digits_training() -> None:
    train = open_data("digits").train
    loader = train_loader(train, GREY, batch_size=128)
    first = drain(loader)
    assert len(loader) == 9 and first[0].shape == (1152, 1, 8, 8)
    plain = drain(train_loader(train, GREY, batch_size=128, augment=AugmentConfig.preset("none"), drop_last=False))
    clean, clean_targets = drain(eval_loader(train, GREY, batch_size=128))
    assert sorted(plain[1].tolist()) == sorted(clean_targets.tolist()) and not torch.equal(plain[1], clean_targets)
    assert torch.equal(plain[0].sum(0).sort().values.round(decimals=2), clean.sum(0).sort().values.round(decimals=2))
    moved = first[0] - plain[0][:1152]
    assert torch.equal(first[1], plain[1][:1152]), "the order is drawn before the augmentation"
    assert 0.05 < moved.abs().mean() < 0.5, "augmented, but recognisable"
    images = torch.cat(list(calibration_batches(train, GREY, images=33, batch_size=32, seed=1)))
    assert images.shape == (33, 1, 8, 8)


def test_random_affine_is_the_identity_at_zero() -> None:
    images = open_data("digits").train.store.images[:50]  # type: ignore[attr-defined]
    torch.testing.assert_close(digits.random_affine(images, 0.0, 0.0, (1.0, 1.0)), images)
    moved = digits.random_affine(torch.ones(2000, 1, 8, 8), 0.0, 0.7, (1.0, 1.0))
    lost = 1 - moved.mean(dim=(1, 2, 3))
    assert 0 < lost.max() <= 1 - (1 - 0.7 / 8) ** 2 + 1e-6, "no shift beyond 0.7 pixel"
    assert len(lost.unique()) > 100, "each image is moved by its own amount"
    dot = torch.zeros(1, 1, 8, 8)
    dot[..., 3:5, 3:5] = 1
    assert digits.random_affine(dot, 0.0, 0.0, (2.0, 2.0)).sum() == pytest.approx(16), "zoom magnifies"
    turned = digits.random_affine(dot.expand(100, 1, 8, 8), 45.0, 0.0, (1.0, 1.0))
    torch.testing.assert_close(turned, turned.flip(2, 3), msg="turned about the centre")
    assert len(turned[:, 0, 3, 2].unique()) > 50


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return imported(name, *rest)

    digits._load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"need scikit-learn; install it with: pip install 'qvit\[demo\]'"):
        open_data("digits")
