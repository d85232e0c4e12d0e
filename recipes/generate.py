"""Writes the recipes of DeiT and Swin on ImageNet: a table of models and published results, and one template.

    python recipes/generate.py            writes recipes/*.toml
    python recipes/generate.py --check    writes nothing; exit code 1 if a file is not what this writes

The two recipes for digits are short and written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BY_HAND = {"digits-float.toml", "digits-3bit-qvit.toml"}
TEACHER = "tf_efficientnet_l2.ns_jft_in1k_475"
VVTQ_SOURCE = "Huang et al. 2023, arXiv 2307.00331, README of the public code"
QVIT_SOURCE = "Li et al. 2022, arXiv 2201.07703, Table 1"


@dataclass(frozen=True)
class Model:
    """A model and what is published of it.

    Attributes:
        short, title, timm: `deit-tiny`, `DeiT-T`, timm's name.
        macs: G multiply-accumulates of an image.
        hours: Estimates by epochs: on one GPU and on eight.
        budgets: G bit operations of N bits with 8 in the first and the last layer.
        qvit: Q-ViT's Table 1 by (method, bits): top-1 in percent and G bit operations.
        vvtq: VVTQ's top-1 by bits.
        floating: Top-1 of the float models in the two papers.
        together: Bits for which there is a recipe of `qvit+vvtq`.
    """

    short: str
    title: str
    timm: str
    macs: str
    hours: dict[int, tuple[str, str]]
    budgets: dict[int, str]
    qvit: dict[tuple[str, int], tuple[str, str]]
    vvtq: dict[int, str]
    floating: tuple[str, str]
    together: tuple[int, ...]


MODELS = (
    Model(
        "deit-tiny", "DeiT-T", "deit_tiny_patch16_224", "1.254",
        {300: ("240 to 320", "30 to 40"), 150: ("120 to 160", "15 to 20")},
        {2: "6.760", 3: "12.883", 4: "21.455"},
        {
            ("lsq+", 3): ("68.09", "12.9"), ("qvit", 3): ("69.62", "13.0"),
            ("lsq+", 4): ("72.46", "21.5"), ("qvit", 4): ("72.79", "21.4"),
        },
        {2: "59.73", 3: "71.22", 4: "74.71"}, ("72.86", "73.75"), (2, 3),
    ),
    Model(
        "deit-small", "DeiT-S", "deit_small_patch16_224", "4.6",
        {300: ("880 to 1180", "110 to 148")},
        {3: "44.590", 4: "76.375"},
        {
            ("lsq+", 3): ("77.76", "44.6"), ("qvit", 3): ("78.08", "45.7"),
            ("lsq+", 4): ("79.66", "76.4"), ("qvit", 4): ("80.11", "77.9"),
        },
        {}, ("79.92", ""), (),
    ),
    Model(
        "swin-tiny", "Swin-T", "swin_tiny_patch4_window7_224", "4.49",
        {300: ("860 to 1150", "108 to 144"), 150: ("430 to 580", "54 to 72")},
        {2: "18.875", 3: "41.25", 4: "72.58"},
        {
            ("lsq+", 3): ("78.96", "41.3"), ("qvit", 3): ("79.45", "40.8"),
            ("lsq+", 4): ("80.47", "72.6"), ("qvit", 4): ("80.59", "70.1"),
        },
        {2: "77.66", 3: "81.37", 4: "82.42"}, ("80.90", "81.0"), (2, 3),
    ),
)  # fmt: skip


def recipes() -> Iterator[tuple[str, str]]:
    """Every file as (name, text)."""
    for model in MODELS:
        for method, bits in model.qvit:
            for paper in (False, True):
                name = f"{model.short}-{bits}bit-{method}{'-paper' if paper else ''}"
                yield f"{name}.toml", labelled_by_data(model, method, bits, name, paper=paper)
        for method, widths in (("vvtq", tuple(model.vvtq)), ("qvit+vvtq", model.together)):
            for bits in widths:
                name = f"{model.short}-{bits}bit-{method}"
                yield f"{name}.toml", labelled_by_a_teacher(model, method, bits, name)


def labelled_by_data(model: Model, method: str, bits: int, name: str, *, paper: bool) -> str:
    """A recipe of Q-ViT's experiments: 300 epochs with DeiT's augmentation."""
    top1, operations = model.qvit[method, bits]
    other = f"{model.short}-{bits}bit-{'lsq+' if method == 'qvit' else 'qvit'}.toml"
    if not paper:
        about = f"The same schedule as {other}: the two differ in the method alone."
    elif method == "qvit":
        about = (
            "Li et al. 2022, section 4.1, and their public code: absolute penalty on rounded widths, one learning rate "
            "for all."
        )
    else:
        about = (
            "Its learning rate is not that of the Q-ViT it is compared with: 5e-4 in the authors' script, 2e-4 there."
        )
    repeated = (
        "# no repeated augmentation, as in Swin's own training (Liu et al. 2021, section 4.1)"
        if model.short.startswith("swin")
        else "repeated_augmentation = 3"
    )
    title = heading(model, method, bits) + (": the published training, as far as it is known." if paper else ".")
    options = PAPER_SEARCH.format(initial=bits + 1) if paper and method == "qvit" else ""
    return f"""\
# {title}
# {about}
#
{how(model, name, epochs=300)}
# published: {top1} % top-1 at {operations} G bit operations ({QVIT_SOURCE}; float {model.floating[0]} %).
#            Nobody has reproduced it with this recipe yet.
{budget(model, bits)}

{subject(model, method, bits)}
augment = "deit"
{repeated}
mixup = 0.8
cutmix = 1.0
label_smoothing = 0.1
workers = 8 # per process

{schedule(300, "5e-4" if paper and method == "lsq+" else "2e-4", "0.05")}
precision = "fp32"
{options}"""


PAPER_SEARCH = """
[method_options]
searching_ratio = 0.9
penalty = "absolute"
penalty_weight = 0.1 # per G², as published
penalty_widths = "rounded"
width_lr = 2e-4 # that of the weights
width_schedule = "run"
width_gradient = "clipping"
initial_bits = {initial}
"""


def labelled_by_a_teacher(model: Model, method: str, bits: int, name: str) -> str:
    """A recipe of VVTQ's experiments: 150 epochs on stored soft labels."""
    alone = method == "vvtq"
    if alone:
        about = (
            "# AdamW at 5e-4, cosine to 0, no warm-up, 150 epochs, as the authors' script says, learning from stored "
            "soft labels\n# alone."
        )
        published = (
            f"{model.vvtq[bits]} % top-1 ({VVTQ_SOURCE}; float {model.floating[1]} %),\n"
            "#            with soft labels of EfficientNet-L2. Nobody has reproduced it with this recipe yet."
        )
    else:
        about = (
            f"# The same schedule as {model.short}-{bits}bit-vvtq.toml: the two differ in the method alone. "
            "No paper has this combination."
        )
        published = (
            f"nothing; uniform widths reach {model.vvtq[bits]} % top-1 ({VVTQ_SOURCE.removesuffix(' public code')}\n"
            f"#            public code; float {model.floating[1]} %), with soft labels of EfficientNet-L2."
        )
    return f"""\
# {heading(model, method, bits)}.
{about}
#
# labels:    qvit labels {model.timm} --teacher {TEACHER}
#            --data PATH/TO/imagenet --crops 500 --scale 0.08 0.936 --out labels/imagenet (18.6 GB)
{how(model, name, epochs=150)}
# published: {published}
{budget(model, bits)}

{subject(model, method, bits)}model_kwargs = {{ drop_path_rate = 0.1 }}

labels = "labels/imagenet" # made first, see above; nothing else happens to the crops
crops_per_image = 4
single_crop_epochs = 4
crop_interpolation = "bilinear" # of the training; the teacher saw bicubic
workers = 8 # per process

{schedule(150, "5e-4", "1e-4")}
stochastic_depth = true
precision = "fp32"
"""


def heading(model: Model, method: str, bits: int) -> str:
    """The model, the method and the widths, without a full stop."""
    uniform = {"lsq+": "LSQ+", "vvtq": "VVTQ"}
    if method in uniform:
        return f"{model.title}, {uniform[method]}, every block at {bits} bits"
    title = "Q-ViT" if method == "qvit" else "Q-ViT with VVTQ's additions"
    return f"{model.title}, {title} at the bit operations of {bits} bits"


def how(model: Model, name: str, *, epochs: int) -> str:
    """How it is started, and an estimate of how long it takes."""
    one, eight = model.hours[epochs]
    return f"""\
# command:   accelerate launch --multi_gpu --num_processes 8 -m qvit.cli train
#            recipes/{name}.toml --data PATH/TO/imagenet --out runs/{name}
# hours:     {one} on one GPU, {eight} on eight: an estimate, not measured. It is 6 FLOPs per MAC ({model.macs} G)
#            and image × 1,281,167 images × {epochs} epochs × 1.5 to 2 for fake quantization, at 5 TFLOP/s a GPU \
(assumed)."""


def budget(model: Model, bits: int) -> str:
    """The bit operations of the uniform model."""
    return (
        f"# budget:    {model.budgets[bits]} G bit operations: the uniform {bits}-bit model with 8 bits in the first "
        "and the last layer."
    )


def subject(model: Model, method: str, bits: int) -> str:
    """Model, method and budget as options."""
    return f"""\
model = "{model.timm}"
pretrained = true # timm's float weights; --weights FILE for others
method = "{method}"
budget = "{bits}bit"
"""


def schedule(epochs: int, rate: str, decay: str) -> str:
    """The options of optimizer and schedule."""
    return f"""\
epochs = {epochs}
batch_size = 512 # over all processes
opt = "adamw"
lr = {rate}
min_lr = 0.0
warmup_epochs = 0
sched = "cosine"
weight_decay = {decay}"""


def main() -> int:
    """Writes the files, or says which are others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args().check
    texts = dict(recipes())
    there = {path.name for path in FOLDER.glob("*.toml")} - BY_HAND
    stale = sorted(
        name
        for name in there | texts.keys()
        if name not in texts or name not in there or (FOLDER / name).read_text(encoding="utf-8") != texts[name]
    )
    if check:
        sys.stderr.writelines(f"out of date: {name}\n" for name in stale)
        return 1 if stale else 0
    for name in stale:
        if name in texts:
            (FOLDER / name).write_text(texts[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
