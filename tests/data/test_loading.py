"""Loaders: a pass depends on (seed, epoch, position) alone; processes share it out; each test image counts once."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import CONFIG, GREY, LIGHT, drain, generator_states, make_images, same, with_workers
from PIL import Image
from torch import Tensor, nn

from qvit.data.augment import _augment_ops, data_config_of, eval_config, train_transform
from qvit.data.open import (
    AugmentConfig,
    CalibrationImages,
    ImageSource,
    Reading,
    calibration_batches,
    eval_loader,
    open_data,
    open_source,
    train_loader,
)
from qvit.data.sampling import derived_seed, epoch_order, process_batches, seeded
from qvit.errors import QvitError, UsageError
from qvit.training.evaluate import evaluate

UNERASED = AugmentConfig(random_erasing=0.0)
Batch = tuple[Tensor, Tensor]


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    return open_source(make_images(tmp_path / "pets", {"cat": 6, "dog": 6, "eel": 7}))


@pytest.fixture(params=["images", "digits"])
def any_source(request: pytest.FixtureRequest, source: ImageSource) -> tuple[ImageSource, dict[str, Any]]:
    """Images and digits, each with a data configuration that fits."""
    if request.param == "images":
        return source, CONFIG
    train = open_data("digits").train
    assert isinstance(train, ImageSource)
    return train.subset(range(0, 1200, 50)), GREY


def same_batches(a: Any, b: Any) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------- the sampling


@pytest.mark.gpu
def test_batches_on_a_gpu_wait_for_steps_that_are_only_queued(tmp_path: Path) -> None:
    """Steps that ask the device for nothing lag far behind the loader, which must not reuse their images."""
    source = open_source(make_images(tmp_path / "many", {"cat": 60, "dog": 60}))
    sums = []
    for cycles in (0, 20_000_000):
        loader = train_loader(source, CONFIG, batch_size=4, augment=LIGHT, device="cuda", seed=3)
        found = []
        for images, targets in loader:
            torch.cuda._sleep(cycles)
            found.append(torch.stack([images.double().sum(), targets.double().sum()]))
            if not cycles:
                torch.cuda.synchronize()
        sums.append(torch.stack(found))
    assert torch.equal(*sums) and len(sums[0]) == 30


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9", "original", "originalr", "v0", "augmix-m5"])
@pytest.mark.parametrize("level", [0, 10])
def test_policies_work_at_their_weakest_and_strongest(policy: str, level: int) -> None:
    """With any Pillow: from 13 on it refuses `posterize` to no bits, which timm asks for at the highest level."""
    image = Image.fromarray(np.random.default_rng(0).integers(1, 256, (12, 12, 3), dtype=np.uint8))
    ops = list(_augment_ops(train_transform(CONFIG, AugmentConfig(auto_augment=policy))))
    assert len(ops) > 2
    for op in ops:
        op.prob, op.magnitude, op.magnitude_std = 1, level, 0
        assert op(image).size == image.size


def test_posterize_to_no_bits_is_black() -> None:
    transform = train_transform(CONFIG, AugmentConfig())
    (op,) = [op for op in _augment_ops(transform) if op.name == "PosterizeIncreasing"]
    op.prob, op.magnitude, op.magnitude_std = 1, 10, 0
    assert not np.asarray(op(Image.new("RGB", (4, 4), "white"))).any()


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_processes_share_out_every_batch(count: int, size: int, world: int, drop_last: bool) -> None:
    parts = [process_batches(count, size, drop_last=drop_last, rank=r, world_size=world) for r in range(world)]
    alone = process_batches(count, size * world, drop_last=drop_last)
    assert len({len(part) for part in parts}) == 1, "as many batches for each process, or they wait for each other"
    for number, steps in enumerate(zip(*parts, strict=True)):
        together = [position for step in steps for position in range(count)[step]]
        assert together == list(range(count)[alone[number]])
    left = len(alone) - len(parts[0])
    assert left == 0 or (left == 1 and not drop_last and count % (size * world) < world)


def test_orders_differ_by_seed_and_epoch_alone() -> None:
    rows, seeds = epoch_order(100, seed=3, epoch=5)
    assert rows.sort().values.tolist() == list(range(100)) and len(seeds.unique()) == 100
    torch.manual_seed(1)
    assert same(epoch_order(100, 3, 5), (rows, seeds))
    others = [epoch_order(100, 3, 6), epoch_order(100, 4, 5), epoch_order(100, 5, 3)]
    assert all(not torch.equal(rows, other) and not torch.equal(seeds, draws) for other, draws in others)


def test_the_order_never_changes() -> None:
    """A run that was stopped is continued by a later version: it must see the images that remain."""
    assert derived_seed(1, 0, 0) == 3717377837946358015
    assert epoch_order(10, 0, 0)[0].tolist() == [4, 8, 2, 7, 0, 1, 5, 3, 6, 9]


def test_seeded_restores_the_generators() -> None:
    before = generator_states()
    with seeded(2**62 + 1):
        first = [random.random(), np.random.rand(), torch.rand(1).item()]
    assert generator_states() == before
    with pytest.raises(ZeroDivisionError), seeded(2**62 + 1):
        assert [random.random(), np.random.rand(), torch.rand(1).item()] == first
        _ = 1 / 0
    assert generator_states() == before


@pytest.mark.gpu
def test_seeded_restores_the_generator_of_the_device() -> None:
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    with seeded(3, device):
        first = torch.rand(4, device=device)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.rand(4, device=device)
    with seeded(3, device):
        assert torch.equal(torch.rand(4, device=device), first)


@pytest.mark.gpu
def test_passes_on_a_device_are_those_of_the_cpu(source: ImageSource) -> None:
    options: dict[str, Any] = {"batch_size": 4, "augment": UNERASED}
    here = drain(train_loader(source, CONFIG, **options))
    there = drain(train_loader(source, CONFIG, device="cuda", **options))
    torch.testing.assert_close((there[0].cpu(), there[1].cpu()), here)
    erased = train_loader(source, CONFIG, batch_size=4, device="cuda")
    before = torch.cuda.get_rng_state()
    first = list(erased)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    erased.set_epoch(0, skip=2)
    assert same_batches(erased, first[2:])


# ------------------------------------------------------------------------------------------------------ training passes


@with_workers
@pytest.mark.parametrize("augment", ["deit", "light", "none"])
def test_a_pass_depends_on_seed_and_epoch_alone(source: ImageSource, augment: str) -> None:
    options: dict[str, Any] = {"batch_size": 4, "augment": AugmentConfig.preset(augment)}
    loader = train_loader(source, CONFIG, seed=7, **options)
    passes = [list(loader) for _ in range(3)]
    assert not any(same_batches(a, b) for a, b in ((passes[0], passes[1]), (passes[1], passes[2])))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    others = train_loader(source, CONFIG, seed=7, workers=2, **options)
    for epoch in (0, 1):
        assert same_batches(others, passes[epoch]), "neither the generators nor the workers matter"
    loader.set_epoch(1)
    assert same_batches(loader, passes[1]) and same_batches(loader, passes[2]), "and goes on from there"
    assert not same_batches(train_loader(source, CONFIG, seed=8, **options), passes[0])


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_can_start_anywhere(any_source: tuple[ImageSource, dict[str, Any]], workers: int) -> None:
    source, config = any_source
    loader = train_loader(source, config, batch_size=4, workers=workers, drop_last=False)
    loader.set_epoch(2)
    whole = list(loader)
    assert len(loader) == len(whole) >= 5
    for skip in (1, 3, len(whole), len(whole) + 1):
        loader.set_epoch(2, skip=skip)
        assert len(loader) == len(whole) and same_batches(loader, whole[skip:])
    assert not same_batches(loader, whole), "the next pass is that of the next epoch"
    with pytest.raises(UsageError, match="epoch >= 0 and skip >= 0"):
        loader.set_epoch(0, -1)


@with_workers
def test_workers_end_with_a_pass_that_is_given_up(source: ImageSource) -> None:
    batches = iter(train_loader(source, CONFIG, batch_size=2, workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()


def test_what_is_skipped_is_not_read(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    load = source.store.load
    monkeypatch.setattr(source.store, "load", lambda row, mode: read.append(row) or load(row, mode))
    loader = train_loader(source, CONFIG, batch_size=4)
    loader.set_epoch(0, skip=3)
    assert len(drain(loader)[1]) == len(read) == 4


@pytest.mark.parametrize("augment", [UNERASED, AugmentConfig(random_erasing=0.0, repeated_augmentation=3)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_two_processes_see_what_one_sees(
    any_source: tuple[ImageSource, dict[str, Any]], augment: AugmentConfig, drop_last: bool
) -> None:
    source, config = any_source
    options: dict[str, Any] = {"augment": augment, "drop_last": drop_last, "seed": 4}
    alone = list(train_loader(source, config, batch_size=6, **options))
    parts = [list(train_loader(source, config, batch_size=3, rank=r, world_size=2, **options)) for r in (0, 1)]
    together = [[torch.cat(pair) for pair in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
    assert same_batches(together, alone[: len(together)])
    assert len(together) == len(alone) or len(alone[-1][1]) == 1, "a single image left cannot be shared out"


def test_erasing_differs_by_process(source: ImageSource) -> None:
    augment = AugmentConfig(auto_augment=None, random_erasing=1.0, hflip=0, scale=(1, 1), ratio=(1, 1))
    parts = [
        drain(train_loader(source, CONFIG, batch_size=4, augment=augment, rank=r, world_size=2))[0] for r in (0, 1)
    ]
    again = drain(train_loader(source, CONFIG, batch_size=4, augment=augment, rank=1, world_size=2))[0]
    assert torch.equal(parts[1], again) and not torch.equal(parts[0], parts[1])


def test_repeated_augmentation(any_source: tuple[ImageSource, dict[str, Any]]) -> None:
    source, config = any_source
    augment = AugmentConfig(auto_augment=None, random_erasing=0, scale=(0.3, 0.9), repeated_augmentation=3)
    loader = train_loader(source, config, batch_size=6, augment=augment)
    images, targets = drain(loader)
    rows = epoch_order(len(source), 0, 0, 3)[0]
    assert len(images) == len(source) // 6 * 6 and len(rows.unique()) == -(-len(source) // 3)
    assert targets.tolist() == source.targets[rows[: len(targets)]].tolist()
    assert torch.equal(rows[:6], rows[[0, 0, 0, 3, 3, 3]]), "an image three times in a row"
    assert not torch.equal(images[0], images[1]), "augmented anew each time"
    loader.set_epoch(0)
    assert same(drain(loader), (images, targets))


@with_workers
def test_no_loader_touches_the_generators(any_source: tuple[ImageSource, dict[str, Any]]) -> None:
    source, config = any_source
    before = generator_states()
    for workers in (0, 2):
        for augment in (AugmentConfig(), LIGHT):
            drain(train_loader(source, config, batch_size=4, augment=augment, workers=workers))
        drain(eval_loader(source, config, batch_size=4, workers=workers))
        list(calibration_batches(source, config, images=5, batch_size=4, workers=workers))
        assert generator_states() == before
    batches = iter(train_loader(source, config, batch_size=4))
    next(batches)
    assert generator_states() == before, "nor between batches, where the training loop draws"


def test_loaders_that_cannot_be_meant(source: ImageSource) -> None:
    for make in (train_loader, eval_loader):
        for rank, world in ((2, 2), (-1, 1), (0, 0)):
            with pytest.raises(UsageError, match=f"0 <= rank < world_size, not rank {rank} of {world}"):
                make(source, CONFIG, batch_size=4, rank=rank, world_size=world)
    with pytest.raises(QvitError, match="has 2 images, too few for 3 processes"):
        train_loader(source.subset([0, 1]), CONFIG, batch_size=4, world_size=3)
    [(images, _)] = train_loader(source.subset(range(7)), CONFIG, batch_size=64, rank=1, world_size=3)
    assert len(images) == 2, "lowered, alike in all processes"


# ----------------------------------------------------------------------------------------------------------- evaluation


class FirstPixel(nn.Module):
    """Logits of which the largest is that of the class written into the first pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return -(images[:, :1, 0, 0] - torch.arange(4.0)).abs()


@pytest.mark.parametrize("count", range(11))
@pytest.mark.parametrize("form", ["images", "digits"])
def test_every_image_is_evaluated_once(source: ImageSource, count: int, form: str) -> None:
    if form == "digits":
        test = open_data("digits").test
        assert isinstance(test, ImageSource)
        part, config = test.subset(range(count)), GREY
    else:
        part, config = source.subset(range(count)), CONFIG
    parts = [list(eval_loader(part, config, batch_size=2, rank=r, world_size=3)) for r in range(3)]
    lengths = [len(eval_loader(part, config, batch_size=2, rank=r, world_size=3)) for r in range(3)]
    assert lengths == [len(batches) for batches in parts]
    whole = list(eval_loader(part, config, batch_size=2))
    images = [torch.cat([images for images, _ in batches]) if batches else torch.zeros(0) for batches in parts]
    for row, image in enumerate(image for batch, _ in whole for image in batch):
        assert torch.equal(images[row % 3][row // 3], image)
    assert sum(len(part) for part in images) == count


def test_counts_are_summed_over_processes_once() -> None:
    def batch(*pixels: int) -> Batch:
        return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 1, 1), torch.tensor([0] * len(pixels))

    parts: list[list[Batch]] = [[batch(0, 1), batch(0)], [batch(3)], []]
    calls: list[Tensor] = []
    for part in parts:  # what each process hands over, also the one that has no image

        def collect(counts: Tensor) -> Tensor:
            calls.append(counts)
            return counts + torch.tensor([0, 0, 0, 0, 0, 1, 0])  # as if another process had an image

        evaluate(FirstPixel(), part, reduce=collect)
    assert len(calls) == 3 and all(call.dtype == torch.int64 for call in calls)
    total = torch.stack(calls).sum(0)
    scores = [evaluate(FirstPixel(), part, reduce=lambda _: total) for part in parts]
    alone = evaluate(FirstPixel(), [batch for part in parts for batch in part])
    assert scores == [alone] * 3 and alone == {"top1": 50.0, "top5": 100.0, "images": 4}
    with pytest.raises(QvitError, match="no images to evaluate"):
        evaluate(FirstPixel(), [])


def test_images_seen_by_all_processes_are_checked() -> None:
    broken = (torch.full((1, 1, 1, 1), float("nan")), torch.tensor([0]))
    with pytest.raises(QvitError, match="NaN or infinite logits for 1 of 1 images"):
        evaluate(FirstPixel(), [broken])


# ------------------------------------------------------------------------------------------------ the model's protocol


class Resizable(nn.Module):
    """A model that says, as timm's do, what it was trained for and how it is evaluated."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (3, 16, 16),
            "crop_pct": 0.8,
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            **config,
        }


def test_the_test_size_is_taken_by_models_of_any_size(source: ImageSource) -> None:
    asked = {"test_input_size": (3, 24, 24), "test_crop_pct": 1.0}
    config = data_config_of(Resizable(**asked))
    assert config["input_size"] == (3, 16, 16)
    assert eval_config(config)["input_size"] == (3, 24, 24) and eval_config(config)["crop_pct"] == 1.0
    assert next(iter(eval_loader(source, config, batch_size=2)))[0].shape == (2, 3, 24, 24)
    assert next(iter(train_loader(source, config, batch_size=2)))[0].shape == (2, 3, 16, 16)
    fixed = data_config_of(Resizable(fixed_input_size=True, **asked))
    assert eval_config(fixed)["input_size"] == (3, 16, 16) and eval_config(fixed)["crop_pct"] == 0.8
    assert eval_config(data_config_of(Resizable()))["input_size"] == (3, 16, 16)


def test_calibration_images_have_several_sizes_in_turn(any_source: tuple[ImageSource, dict[str, Any]]) -> None:
    source, config = any_source
    one = torch.cat(list(CalibrationImages(source, config, Reading(2), 7)))
    height, width = one.shape[2:]
    sizes = ((height, width), (height, 2 * width))
    batches = list(CalibrationImages(source, config, Reading(2), 7, sizes))
    assert [tuple(batch.shape[2:]) for batch in batches] == [sizes[0], sizes[1], sizes[0], sizes[1]]
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(batches[::2]), one[::2])
