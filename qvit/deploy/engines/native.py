"""The native engine (`deploy/native/`): packed ViTs and Swins in C++, the default where it runs a model.

The model is handed over as the bytes of its file. What the engine does not run (other families, groups of tokens that
follow the image, weights on grids without zero) it refuses with the reason, and the next engine serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.deploy.engines.base import register_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import functions_in_words
from qvit.deploy.native import NativeModel
from qvit.errors import UsageError
from qvit.models.layers import AttentionSites, QuantConv2d, QuantLinear
from qvit.models.network import differences


@register_engine("native", order=5)
class NativeEngine:
    """A model in C++; the library is compiled when the first one is made, unless the installation has it."""

    name = "native"

    def __init__(self, artifact: Artifact, threads: int | None, *, form: str | None = None) -> None:
        split = [site for site, spec in artifact.plan.sites.items() if spec is not None and spec.ranks_tokens]
        model = artifact.skeleton
        reason = (
            f"'{split[0]}' has two groups of tokens that follow the image" if split else next(differences(model), None)
        )
        if reason is not None:
            raise UsageError(f"engine 'native' does not run this model: {reason}")
        try:
            self.model = NativeModel(artifact.to_bytes(), threads=threads, form=form)
        except UsageError as error:
            raise UsageError(f"engine 'native' does not run this model: {error}") from None
        modules = list(model.modules())
        products = sum(isinstance(module, (QuantLinear, QuantConv2d)) for module in modules)
        products += 2 * sum(isinstance(module, AttentionSites) for module in modules)
        words = (f"all {products} products in integers", functions_in_words(model), self.model.form)
        self.artifact, self.arithmetic = artifact, ", ".join(filter(None, words))

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.model(images.detach().cpu().float().numpy()))

    def profile(self, images: Tensor) -> dict[str, float]:
        """Milliseconds by kind of kernel, of one run."""
        return self.model.profile(images.detach().cpu().float().numpy())
