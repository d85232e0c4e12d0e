"""Options of post-training quantization; torch is not imported, because `qvit ptq --help` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qvit.training.config import MethodOptions

if TYPE_CHECKING:
    from qvit.methods.ptq.reconstruction import ReconstructOptions
    from qvit.methods.ptq.relu import ReluOptions


#: Steps per block, images, and images per step of every effort.
EFFORTS = {"fast": (100, 256, 16), "standard": (600, 1024, 32), "full": (3000, 1024, 32)}
#: Steps per MLP that gets a ReLU; images and images per step are those of the reconstruction.
MLP_STEPS = {"fast": 300, "standard": 1000, "full": 20_000}


class PTQOptions(MethodOptions):
    """Options of `ptq`."""

    image_sizes: Sequence[str] = Field(
        (),
        description="sizes of calibration images, which have them in turn, such as `224` or `224x320` (height, width), "
        "for a model that takes any, see [Image sizes](models.md#image-sizes); by default the model's own",
    )
    observer: Literal["mse", "percentile", "minmax"] = Field("mse", description="how ranges of activations are chosen")
    scale_search: Literal["error", "similarity", "ranking"] = Field(
        "error",
        description="what scales are chosen by once ranges are; `error`: each operand's own error; `similarity`: the "
        "correlation of linear layers' outputs, and of the scores of attention, with the float ones; `ranking`: for q "
        "and k the order of the scores, too",
    )
    weights: Literal["per-channel", "per-head"] = Field(
        "per-channel", description="what shares a scale in a weight; `per-head` where it has heads"
    )
    probs: Literal["auto", "uniform", "log2", "log-sqrt2", "twin"] = Field(
        "auto",
        description="grid of the attention probabilities; `auto`: `log2` up to 3 bits, `log-sqrt2` with 4, else "
        "`uniform`, of mixed widths by the uniform width of the budget; `twin`: fine steps near zero and coarse ones "
        "above, for the engines `reference` and `torch`",
    )
    gelu: Literal["uniform", "twin"] = Field(
        "uniform",
        description="grid of the output of the GELU, and of other activation functions that go a little below zero: "
        "`uniform` with an offset, or `twin`: steps of their own for negative values, for the engines `reference` and "
        "`torch`",
    )
    heads: Literal["auto", "per-head", "per-tensor"] = Field(
        "auto",
        description="what shares a scale in q, k, v, probabilities and head outputs; `auto`: `per-tensor` where the "
        "whole plan has 8 bits, which need no finer scales and run faster without, else `per-head`",
    )
    positions: Literal["none", "inputs", "all"] = Field(
        "none",
        description="what has a scale for each position of a token: the inputs of q, k and v, of `fc1` and `fc2` "
        "(`inputs`), q, k, probabilities and heads' outputs, too (`all`). Plain ViTs of one image size alone, and not "
        "in the engine `native`",
    )
    reparameterize: bool = Field(
        True, description="centre and even out the channels of LayerNorm outputs, q, k, v and heads' outputs"
    )
    rotate: Literal["auto", "none", "heads", "all"] = Field(
        "auto",
        description="rotate what is quantized, as part of the reparameterization: q, k, v and the heads' outputs "
        "within each head (`heads`), the residual stream of plain ViTs, too (`all`); `auto`: `none` where the whole "
        "plan has 8 bits, `all` where some width is at most 5 (of mixed widths: may be), else `heads`",
    )
    class_token: Annotated[int, Field(ge=3, le=8)] | Literal["auto", "off"] = Field(
        "auto",
        description="width of the class token and of registers where other tokens have fewer bits; `auto`: 8 where "
        "those have at most 6, if it brings the model nearer to the float one on calibration images. Costs under 1 % "
        "more bit operations: a budget that is no name of a plan, such as `w4a4`, is kept",
    )
    mlp: Literal["keep", "relu"] = Field(
        "keep",
        description="`relu`: give the MLPs a ReLU before anything else, and train each to answer as before. This "
        "changes the model: see [ReLU in the MLPs](post-training.md#relu-in-the-mlps)",
    )
    mlp_steps: int | None = Field(
        None,
        ge=1,
        description="with `mlp`: steps per MLP; by default 300 with the effort `fast`, 20000 with `full`, else 1000",
    )
    bias_correction: bool = Field(True, description="take the mean errors back in the biases")
    rounding: Literal["auto", "feedback", "nearest"] = Field(
        "auto",
        description="how weights are rounded; `feedback`: the error of each column is taken back by the next ones; "
        "`auto`: `nearest` where the whole plan has 8 bits, else `feedback`",
    )
    effort: Literal["fast", "standard", "full"] | None = Field(
        None,
        description="reconstruct with a preset of steps per block, images, and images per step: `fast` 100, 256, 16; "
        "`standard` 600, 1024, 32; `full` 3000, 1024, 32, for a GPU. The time is said after the first steps",
    )
    reconstruct: bool = Field(
        False, description="train each block to answer like its float original; implied by `effort`"
    )
    steps: int | None = Field(
        None, ge=1, description="steps per block of the reconstruction; by default those of `effort`, or of `standard`"
    )
    recon_images: int | None = Field(None, ge=1, description="images of the reconstruction; by default likewise")
    recon_batch: int | None = Field(
        None, ge=1, description="images per step of the reconstruction; by default likewise"
    )
    fisher: bool = Field(
        True, description="weight the reconstruction error by Fisher information: by what an answer depends on"
    )
    suffix: bool = Field(
        False,
        description="add to the reconstruction error that of the feature which the float blocks behind make of a "
        "block's output; a step takes about four times as long",
    )
    metric: str | None = Field(
        None,
        description="choose mixed widths by sensitivities, measured by `fisher`, `kl`, `hessian`, `relevance`, "
        "`mix-qvit`, `nuclear-norm`, `lampq`, `ompq` or `topological-entropy`; of models that answer with features by "
        "`features`, `cosine` or `lampq`",
    )
    sensitivity: str | None = Field(
        None, description="choose mixed widths by a measured sensitivity, such as another run's `sensitivity.json`"
    )
    sensitivity_images: int | None = Field(
        None,
        ge=1,
        description="calibration images that a sensitivity is measured with; by default all. `kl` passes them through "
        "the model a few thousand times: give it 16",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=20,
        description="plans of mixed widths that are tried, at most: each further one by sensitivities that the model "
        "quantized by the one before gives, until a plan repeats; the one nearest to the float model on calibration "
        "images is kept (LampQ). Not with `max_drop`",
    )
    min_width: int | None = Field(
        None,
        ge=2,
        le=8,
        description="narrowest of the mixed widths; by default 3, or 2 where 3 bits everywhere exceed the budget: "
        "without training nothing makes up for 2 bits, and their predictions are a rough guide",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="in place of a budget: find the cheapest plan that loses at most so many points on training images "
        "that do not calibrate, of top-1, or without labels of answers; of models without classes of 100 · (1 - "
        "cosine) of features; see [An accuracy "
        "gate](post-training.md#an-accuracy-gate)",
    )
    objective: Literal["bops", "bytes", "latency"] = Field(
        "bops",
        description="with `max_drop`: what is to be cheap, bit operations, bytes of weights or the milliseconds of "
        "`latency_table`",
    )
    latency_table: str | None = Field(
        None, description="for the objective `latency`: the file of `qvit bench MODEL --latency-table`"
    )
    deciding_images: int = Field(
        512,
        ge=16,
        le=10**9,
        description="with `max_drop`: how many training images decide, beside those that calibrate; half of them "
        "search, the others confirm",
    )
    boundary: Annotated[int, Field(ge=2, le=16)] | Literal["free"] = Field(
        8, description="width of the first and the last layer where widths are mixed; `free`: chosen like the others"
    )

    solver: Literal["program", "greedy"] = Field(
        "program",
        description="how mixed widths are chosen: by the integer `program`, the least predicted loss of all plans, or "
        "`greedy`, one width lowered at a time where that costs least (MPTQ-ViT)",
    )

    def grids(self) -> dict[str, str]:
        """What shares a scale, and the grids of probabilities and GELUs, as `ptq_plan` takes them."""
        return {name: getattr(self, name) for name in ("weights", "probs", "gelu", "heads", "positions")}

    def reconstruction(self, seed: int) -> ReconstructOptions | None:
        """Options of the reconstruction; None if there is none."""
        if not self.reconstruct and self.effort is None:
            return None
        from qvit.methods.ptq.reconstruction import ReconstructOptions

        given = (self.steps, self.recon_images, self.recon_batch)
        numbers = (
            preset if own is None else own
            for own, preset in zip(given, EFFORTS[self.effort or "standard"], strict=True)
        )
        return ReconstructOptions(*numbers, fisher=self.fisher, suffix=self.suffix, seed=seed)

    def relu(self, seed: int) -> ReluOptions | None:
        """Options of the training with a ReLU; None if MLPs keep their activation."""
        if self.mlp == "keep":
            return None
        from qvit.methods.ptq.relu import ReluOptions

        effort = self.effort or "standard"
        _, images, size = EFFORTS[effort]
        steps = self.mlp_steps or MLP_STEPS[effort]
        return ReluOptions(steps, self.recon_images or images, self.recon_batch or size, seed)

    def reconstruction_record(self) -> dict[str, int] | None:
        """What a result says about the reconstruction."""
        options = self.reconstruction(0)
        if options is None:
            return None
        return {"steps": options.steps, "images": options.images, "batch_size": options.batch_size}


class PMQOptions(PTQOptions):
    """Options of `pmq`."""

    class_token: Annotated[int, Field(ge=3, le=8)] | Literal["auto", "off"] = Field(
        "auto",
        description="width that the class token and registers may have where other tokens have fewer bits; `auto`: 8. "
        "The program gives it to the activations where it pays",
    )
    patches: bool = Field(True, description="let the patches of an activation have two widths, by their importance")
    shares: Sequence[Annotated[float, Field(gt=0, lt=1)]] = Field(
        (0.25, 0.5, 0.75), description="shares of important tokens that are tried"
    )
    key: bool = Field(False, description="let the tokens of the keys differ in width, too")
    points: int = Field(100, ge=2, le=1000, description="largest number of points of the frontier")
    picture: int = Field(
        4, ge=0, le=100, description="how many test images are drawn with the widths of their patches in the report"
    )
