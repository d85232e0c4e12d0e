"""Diagonal Fisher sensitivity: all sites and widths from one forward and one backward per image.

    Ω(b) = 1/2 · mean over images of  Σ_j g_j² · (t̂_j(b) - t_j)²

with g the gradient at the quantized tensor itself, weight or activation: the second-order estimate of the loss increase
with the Fisher's diagonal for the Hessian, in the form of NVIDIA ModelOpt's AutoQuantize, which has it at module
outputs.

The loss and its label. No labels are needed: Ω estimates how far the model's answer moves from what it was, the
divergence KL(p || p̂) that the metric `kl` measures, whose Hessian is exactly the Fisher matrix F = Jᵀ(diag(p) - ppᵀ)J
of the model's own distribution p. The cross-entropy to the predicted label would do badly: its gradient vanishes where
the model is sure. A label sampled from p is unbiased but rarely informative for the same reason. So all labels enter at
once, with random signs: the backward pass starts from

    u = √p∘r - p·(√p·r),     r_k = ±1          E[u uᵀ] = diag(p) - ppᵀ

and E[g²] is the diagonal of F.  Each image is a backward pass of its own (a batch's gradient at a weight would sum over
images before squaring); a site's error at b bits is the same as in the quantized model with all other sites in float.

Cost: one forward and backward per image, and quantizing every activation once per width. Memory: one image's graph and
a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qvit.measure.metric import Task, register_metric
from qvit.measure.partial import NOTHING_KEPT
from qvit.measure.probe import require_finite
from qvit.measure.table import Table

_GENERATOR = "generator"


def signed_answer(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The vector u above for (1, classes) logits, detached."""
    probabilities = logits.detach().float().softmax(dim=-1)
    signs = torch.randint(0, 2, probabilities.shape, generator=generator).to(probabilities) * 2 - 1
    root = probabilities.sqrt() * signs
    return (root - probabilities * root.sum()).to(logits.dtype)


class Sums:
    """What a metric adds up over the images, by name; kept in the task's file, and taken up from there.

    Args:
        task: What the metric is given.
        answer: The probe's `logits` (None), or its `features`.
        start: From the answer to one image to the vector that its backward pass starts from, such as u above.
        kept: Whether the sums are kept in the task's file.
    """

    def __init__(
        self,
        task: Task,
        answer: Callable[[Tensor], Tensor] | None = None,
        start: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        kept: bool = True,
    ) -> None:
        self.task, self.probe = task, task.probe
        self.partial = task.partial() if kept else NOTHING_KEPT
        self.answer, self.start = answer or task.probe.logits, start or signed_answer
        self.images = [image for batch in task.batches for image in batch.split(1)]
        self.images_done, self._sums = self.partial.load()
        #: The quantized weights, as the model passed them last.
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Adds to the sum of this name."""
        if name in self._sums:
            self._sums[name] += values
        else:
            self._sums[name] = values.clone()

    def add_square(self, name: str, values: Tensor) -> None:
        """Adds the squares of `values`."""
        if name in self._sums:
            self._sums[name].addcmul_(values, values)
        else:
            self._sums[name] = values.square()

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    def table(self) -> Table:
        """Half the mean over the images of the sums by site, (heads, widths); zeros where no gradient came."""
        found = {}
        for site in self.probe.quantizers:
            empty = torch.zeros(self.probe.heads(site), len(self.task.widths), dtype=torch.float64)
            found[site] = self._sums.get(site, empty).cpu().numpy() * (0.5 / len(self.images))
        return found

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(site, tensor, g) of every quantized tensor of every image that is not in the sums yet, detached.

        The sums are kept between images, and never after the last one, whose pass shows the weights.
        """
        generator = torch.Generator().manual_seed(self.task.seed)
        device = next(self.probe.model.parameters()).device
        if self.images_done:
            generator.set_state(self._sums.pop(_GENERATOR))
            self._sums = {name: value.to(device) for name, value in self._sums.items()}
        with self.probe.watched() as seen:
            for image in self.images[self.images_done :]:
                if self.images_done:
                    self.partial.save(self.images_done, lambda: self._sums | {_GENERATOR: generator.get_state()})
                answer = self.answer(image.detach().requires_grad_())
                tensors = [tensor for _, tensor in seen]
                grads = torch.autograd.grad(answer, tensors, self.start(answer, generator), allow_unused=True)
                for (site, tensor), grad in zip(seen, grads, strict=True):
                    if self.probe.sites[site].role == "weight":
                        self.weights[site] = tensor.detach()
                    if grad is not None:
                        yield site, tensor.detach(), grad
                seen.clear()
                self.images_done += 1
                self.task.progress(self.images_done, len(self.images))


@register_metric("fisher")
def fisher(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    return table_of(Sums(task))


def table_of(sums: Sums) -> Table:
    """Ω by site from the gradients of all images."""
    task = sums.task
    for site, tensor, grad in sums.gradients():
        if task.probe.sites[site].role == "weight":
            sums.add_square(f"squares:{site}", grad)
        else:
            sums.add(site, _weighted_errors(task, site, tensor, grad.abs()))
    for site, weight in sums.weights.items():
        sums.add(site, _weighted_errors(task, site, weight, sums[f"squares:{site}"].sqrt()))
    return sums.table()


def _weighted_errors(task: Task, site: str, tensor: Tensor, importance: Tensor) -> Tensor:
    """Σ (importance · error)² per head and width."""
    viewed, errors = task.probe.quantizers[site].view(importance), task.probe.errors(site, tensor, task.widths)
    columns = [task.probe.squares_per_head(site, error.mul_(viewed)) for error in errors]
    found = torch.stack(columns, dim=1).double()
    require_finite(site, found, "gradients")
    return found
