"""A linear segmentation head on the features of a quantized backbone, on images that are no squares.

    python examples/segmentation.py                      a ViT at 4 bits, in less than a minute on a CPU
    python examples/segmentation.py --model swin --plan w6a6 --json

The data are made here: discs, squares and crosses, each mostly of its colour, on noise, and a class for every pixel. A
small backbone is trained together with its head in float. Then the backbone alone is quantized, without training, on
images of two sizes; the head stays in float, once as it was and once trained further on the quantized features. The
packed backbone runs on integers, by the reference engine.

What is compared is the mean IoU: for every class the pixels that are in both, of those that are in the prediction or in
the truth, over all images of a test set; the mean of the classes. Test images are drawn by a seed of their own. One of
their two sizes was not trained at.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qvit

CLASSES = ("background", "disc", "square", "cross")
#: Height and width: of training, and of further images to calibrate and to test with.
SIZES = ((32, 48), (48, 64))
#: Backbones that answer with a feature for each patch, of images of any size.
FEATURES: dict[str, Any] = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True, "img_size": list(SIZES[0])}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "class_token": False, **FEATURES},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, **FEATURES},
    ),
}
BATCH = 16
Run = Callable[[Tensor], Tensor]


def scenes(count: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, height, width), and the class of every pixel (count, height, width)."""
    height, width = size
    images = 0.5 * torch.randn(count, 3, height, width, generator=generator)
    truth = torch.zeros(count, height, width, dtype=torch.int64)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for image, classes in zip(images, truth, strict=True):
        for kind in torch.randint(1, len(CLASSES), (3,), generator=generator).tolist():
            radius = int(torch.randint(5, 9, (), generator=generator))
            row, column = (int(torch.randint(0, side, (), generator=generator)) for side in size)
            across, down = (x - column).abs(), (y - row).abs()
            inside = {
                "disc": across**2 + down**2 <= radius**2,
                "square": torch.maximum(across, down) <= 0.85 * radius,
                "cross": (torch.minimum(across, down) <= radius // 3) & (torch.maximum(across, down) <= radius),
            }[CLASSES[kind]]
            colour = torch.eye(3)[kind - 1].unsqueeze(1) + 0.5 * torch.randn(3, 1, generator=generator)
            image[:, inside] = colour + 0.5 * torch.randn(3, int(inside.sum()), generator=generator)
            classes[inside] = kind
    return images, truth


def feature_map(features: Tensor, images: Tensor) -> Tensor:
    """Features as (B, C, rows, columns), from a ViT's tokens (B, N, C) or a Swin's (B, rows, columns, C)."""
    if features.dim() == 4:
        return features.permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    side = round((height * width / features.shape[1]) ** 0.5)
    return features.transpose(1, 2).unflatten(2, (height // side, width // side))


def segment(backbone: Run, head: nn.Module, images: Tensor) -> Tensor:
    """Logits of every pixel, (B, classes, height, width)."""
    found = head(feature_map(backbone(images), images))
    return F.interpolate(found, images.shape[-2:], mode="bilinear", align_corners=False)


def train(
    backbone: Run, head: nn.Module, parameters: list[nn.Parameter], steps: int, generator: torch.Generator
) -> None:
    """Trains parameters by the cross-entropy of every pixel, on new images in every step."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        images, truth = scenes(BATCH, SIZES[0], generator)
        loss = F.cross_entropy(segment(backbone, head, images), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def mean_iou(backbone: Run, head: nn.Module, images: Tensor, truth: Tensor) -> float:
    """Mean over classes of intersection over union, in percent."""
    found = torch.cat([segment(backbone, head, part).argmax(1) for part in images.split(BATCH)])
    both, either = (
        torch.stack([join(found == kind, truth == kind).sum() for kind in range(len(CLASSES))])
        for join in (torch.logical_and, torch.logical_or)
    )
    return float(100 * (both / either.clamp_min(1)).mean())


def run(model: str, plan: str, *, steps: int, images: int, seed: int, out: Path) -> dict[str, Any]:
    """Trains, quantizes and compares; the packed backbone is written to `out`."""
    torch.manual_seed(seed)
    name, arguments = BACKBONES[model]
    backbone = qvit.create_model(name, **arguments)
    head = nn.Conv2d(backbone.num_features, len(CLASSES), 1)  # type: ignore[arg-type]
    training, testing = (torch.Generator().manual_seed(2 * seed + own) for own in (0, 1))
    train(backbone, head, [*backbone.parameters(), *head.parameters()], steps, training)
    backbone.eval()

    calibration = [scenes(BATCH, size, training)[0] for _ in range(4) for size in SIZES]
    quantized = qvit.ptq(backbone, plan, calibration)
    further = copy.deepcopy(head)
    train(lambda images: quantized(images).detach(), further, [*further.parameters()], max(steps // 4, 2), training)

    qvit.Artifact.from_model(quantized, model_name=name, model_kwargs=arguments).save(out)
    engine = qvit.load(out, "reference")
    rows = []
    for size in SIZES:
        test, truth = scenes(images, size, testing)
        rows.append(
            {
                "size": list(size),
                "float": mean_iou(backbone, head, test, truth),
                "quantized": mean_iou(quantized, head, test, truth),
                "head_trained": mean_iou(quantized, further, test, truth),
                "packed": mean_iou(engine, further, test, truth),
            }
        )
    about = {"model": model, "plan": plan, "steps": steps, "images": images, "seed": seed}
    return {**about, "file_bytes": out.stat().st_size, "mean_iou": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="A linear segmentation head on a quantized backbone.")
    parser.add_argument("--model", choices=BACKBONES, default="vit")
    parser.add_argument("--plan", default="w4a4", help="widths of the backbone: a preset or a plan file")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the float model")
    parser.add_argument("--images", type=int, default=64, help="test images of each size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the packed backbone; by default it is not kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder) / "backbone.safetensors"
        options = {"steps": given.steps, "images": given.images, "seed": given.seed}
        result = run(given.model, given.plan, **options, out=out)
    if given.json:
        print(json.dumps(result))
        return
    print(f"{given.model}, backbone at {given.plan}, {result['file_bytes'] / 1e3:.1f} kB; mean IoU in percent")
    for row in result["mean_iou"]:
        height, width = row["size"]
        print(
            f"{height}x{width}: float {row['float']:.1f}, quantized {row['quantized']:.1f}, head trained on that "
            f"{row['head_trained']:.1f}, packed {row['packed']:.1f}"
        )


if __name__ == "__main__":
    main()
