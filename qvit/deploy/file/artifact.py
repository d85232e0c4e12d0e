"""A packed model: integer codes, the scales that give them meaning, and all that is needed to run it again.

One `.safetensors` file (`container.py`), described byte by byte in docs/packed-files.md:

    SITE.packed     uint8, the integer codes of a weight (`packing.py`)
    scales          float32, the numbers of all quantizers' grids, one after the other, sites in alphabetical order
    KEY             biases, norms, embeddings, weights that stay in float: the float model's own keys and types
    __metadata__    format, version, and the documents of `documents.py`: plan, model, data_config, class_names,
                    provenance, network

One tensor for all scales, because 170 of them with a name each would take 17 kB in DeiT-T's header: 1 % of the model at
2 bits. In memory they are by site: `Artifact.scales["blocks.0.attn.query"]`.

`Artifact.model()` is the simulated model: codes times scales in place of the weights. Its outputs are those of the
frozen model that was packed, bit for bit: each weight is compared when it is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.data.open import data_config_of
from qvit.deploy.file import container
from qvit.deploy.file.documents import LARGEST, PACKED, SCALES, Documents, check_data_config, plan_to_text, to_text
from qvit.deploy.file.grids import by_kind, cut, grid_values, set_grid
from qvit.deploy.file.packing import code_dtype, pack_site, unpack_site
from qvit.deploy.file.skeleton import compare, float_tensors, grids_of, skeleton, weight_sites
from qvit.deploy.file.versions import FORMAT, VERSION, upgraded
from qvit.errors import QvitError, UsageError
from qvit.models.convert import Stage, plan_of, quantize, stage_of
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.models.layers import weight_of
from qvit.models.network import differences, network_of
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import Quantizer, create_quantizer, quantizers_of
from qvit.tensors import Contents
from qvit.version import __version__

#: In the provenance: arguments of the float model that its quantization changed, as they were; null for none.
FLOAT_ARGUMENTS = "float_arguments"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A packed model in memory.

    Attributes:
        plan: The resolved plan; no width is learned any more.
        model_name: timm's name.
        model_kwargs: Arguments of `timm.create_model`.
        data_config: How images are prepared, as timm says it.
        class_names: Names of the classes, or none.
        provenance: Where the model comes from.
        integers: The codes of each packed weight, in the shape of the site (a third of a fused q|k|v weight): int8
            where its grid fits, else int16 or int32.
        scales: The scale of each quantized tensor: broadcasts against the tensor as its `Layout` views it.
        offsets: The offset, in float units, where a grid has one: x̂ = scale·q + offset.
        extras: Other numbers of quantizers, `SITE.name`: see `grids.py`.
        floats: The float model's own tensors.
    """

    plan: QuantPlan
    model_name: str
    model_kwargs: dict[str, Any]
    data_config: dict[str, Any]
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    integers: dict[str, Tensor] = field(repr=False)
    scales: dict[str, Tensor] = field(repr=False)
    offsets: dict[str, Tensor] = field(repr=False)
    extras: dict[str, Tensor] = field(repr=False)
    floats: dict[str, Tensor] = field(repr=False)

    @classmethod
    @torch.no_grad()
    def from_model(
        cls,
        model: nn.Module,
        *,
        model_name: str,
        model_kwargs: Mapping[str, Any] | None = None,
        data_config: Mapping[str, Any] | None = None,
        class_names: tuple[str, ...] = (),
        provenance: Mapping[str, Any] | None = None,
        plan_name: str = "model",
    ) -> Artifact:
        """Packs a frozen model.

        Args:
            model: Calibrated, with integer widths. Nothing is changed but the scales of `statsq`, which are those of
                the present weights afterwards.
            model_name: The name that `timm.create_model` made the float model by.
            model_kwargs: The arguments that it got.
            data_config: How images are prepared; by default what timm says of the model.
            class_names: In order.
            provenance: Plain data. The versions of qvit, torch and timm are added as `packed_by`.
            plan_name: Name of the plan.

        Raises:
            UsageError: The model is not frozen, not in float32, or is not the one that name and arguments make.
            QvitError: NaN or infinite numbers.
        """
        _require_frozen(model)
        integers = {
            site: _codes(site, quantizer, weight_of(model, site)) for site, quantizer in weight_sites(model).items()
        }
        grids = {site: {key: _own(value) for key, value in values.items()} for site, values in grids_of(model).items()}
        artifact = cls(
            plan_of(model, plan_name, model_name),
            model_name,
            dict(model_kwargs or {}),
            check_data_config(_tuples(data_config_of(model) if data_config is None else data_config)),
            tuple(class_names),
            {"packed_by": _versions()} | dict(provenance or {}),
            integers,
            *by_kind(grids),
            {key: _own(value) for key, value in float_tensors(model).items()},
        )
        try:
            artifact._check(artifact.skeleton)
        except QvitError as error:
            raise UsageError(
                f"'{model_name}' with the arguments {dict(model_kwargs or {})} is not the model to be packed, "
                f"or it is not in float32: {error}"
            ) from None
        return artifact

    @property
    def float_kwargs(self) -> dict[str, Any]:
        """Arguments of the float model that it was made of: its own, but for those that its quantization changed."""
        before = self.provenance.get(FLOAT_ARGUMENTS)
        kwargs = dict(self.model_kwargs)
        for key, value in before.items() if isinstance(before, dict) else ():
            if key in kwargs and isinstance(value, str | int | float | None):  # a stranger's file adds no argument
                kwargs[key] = value
        return {key: value for key, value in kwargs.items() if value is not None}

    def save(self, path: str | Path) -> None:
        """Writes the file, atomically; the same model gives the same bytes. Raises QvitError naming the file."""
        container.write(Path(path), self._tensors(), self._texts())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return b"".join(container.sealed(self._tensors(), self._texts()))

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Reads a file that may come from anywhere.

        Raises QvitError, with the file and what is wrong, for anything that `save` did not write.
        """
        with container.opened(path) as contents:
            return cls._from_contents(contents)

    @torch.no_grad()
    def model(self) -> nn.Module:
        """The simulated model in eval mode: weights on their grids, their quantizers switched off; frozen."""
        with torch.random.fork_rng(devices=[]):
            model = create_model(self.model_name, **self.model_kwargs)
        model = quantize(model, self.plan, in_place=True)
        grids = self._grids()
        for site, quantizer in quantizers_of(model):
            set_grid(quantizer, grids[site])
        for key, tensor in float_tensors(model).items():
            tensor.copy_(self.floats[key])
        for site, quantizer in weight_sites(model).items():
            weight_of(model, site).copy_(quantizer.from_int(self.integers[site]))
            quantizer.enabled = False
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `model.safetensors`, `config.json` and a model card into a folder; see `qvit.deploy.file.hub`."""
        from qvit.deploy.file.hub import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Artifact:
        """Loads from such a folder, or from a repository of the Hugging Face hub; see `qvit.deploy.file.hub`."""
        from qvit.deploy.file.hub import from_pretrained

        return from_pretrained(source, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes, and returns the address; see `qvit.deploy.file.hub`."""
        from qvit.deploy.file.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def packed(self) -> dict[str, Tensor]:
        """The bytes of each weight, by site."""
        sites = inspect_model(self.skeleton).sites
        found = {}
        for site, codes in self.integers.items():
            spec = self.plan.sites[site]
            assert spec is not None
            found[site] = pack_site(codes, spec.widths, spec.signed, sites[site].layout)
        return found

    @cached_property
    def skeleton(self) -> nn.Module:
        """The quantized model without storage; made once."""
        tensors = len(self.integers) + len(self.floats) + 1
        return skeleton(self.model_name, self.model_kwargs, self.plan, tensors=tensors, file_bytes=1 << 40)

    def _grids(self) -> dict[str, dict[str, Tensor]]:
        """The numbers of each site's grid, in the order of the file."""
        grids: dict[str, dict[str, Tensor]] = {}
        for site in sorted(self.scales):
            grids[site] = {"scale": self.scales[site]}
            if site in self.offsets:
                grids[site]["offset"] = self.offsets[site]
        for key, value in self.extras.items():
            site, _, name = key.rpartition(".")
            grids[site][name] = value
        return grids

    def _tensors(self) -> dict[str, Tensor]:
        """What the file holds, by its names there."""
        numbers = [value.reshape(-1) for values in self._grids().values() for value in values.values()]
        tensors = {site + PACKED: packed for site, packed in self.packed().items()} | {SCALES: torch.cat(numbers)}
        twice = set(tensors) & set(self.floats)
        if twice:
            raise UsageError(f"a packed file needs the name '{min(twice)}', which the model has given to a tensor")
        return tensors | self.floats

    def _texts(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(VERSION),
            "plan": plan_to_text(self.plan, self._grids()),
            "model": to_text({"name": self.model_name, "kwargs": self.model_kwargs}, "the model's arguments"),
            "data_config": to_text(self.data_config, "the data configuration"),
            "class_names": to_text(list(self.class_names), "the class names"),
            "provenance": to_text(self.provenance, "the provenance"),
            "network": to_text(_network(self.skeleton), "the network"),
        }

    @classmethod
    def _from_contents(cls, contents: Contents) -> Artifact:
        texts, tensors = upgraded(contents.metadata, dict(contents.tensors))
        words = Documents.from_texts(texts)
        name, kwargs = words.model_name, words.model_kwargs
        model = skeleton(name, kwargs, words.plan, tensors=len(tensors), file_bytes=contents.file_bytes)
        sites = inspect_model(model).sites
        plan = words.plan.resolve(sites)
        grids = cut(tensors.pop(SCALES, None), words.shapes)
        integers = {}
        for site in weight_sites(model):
            packed, spec = tensors.pop(site + PACKED, None), plan.sites[site]
            if packed is None or spec is None:
                raise QvitError(f"it lacks the tensor {site + PACKED!r}")
            try:
                shape = weight_of(model, site).shape
                integers[site] = unpack_site(packed, shape, spec.widths, spec.signed, sites[site].layout)
            except QvitError as error:
                raise QvitError(f"site '{site}': {error}") from None
        artifact = cls(
            plan,
            name,
            kwargs,
            words.data_config,
            words.class_names,
            words.provenance,
            integers,
            *by_kind(grids),
            tensors,
        )
        artifact._check(model)
        if words.network is not None and words.network != _network(model):
            raise QvitError(f"its network is not that of '{name}'")
        return artifact

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        """Compares everything with a model without storage. Raises QvitError."""
        compare("tensor", float_tensors(model), self.floats)
        codes = {
            site: torch.empty(weight_of(model, site).shape, dtype=code_dtype(own.spec.widths, own.spec.signed))
            for site, own in weight_sites(model).items()
        }
        compare("codes of site", codes, self.integers)
        grids = self._grids()
        for site, quantizer in quantizers_of(model):
            blank = create_quantizer(quantizer.spec, quantizer.layout)
            own = grids.pop(site, {})
            compare(f"number of site '{site}':", grid_values(blank), own)
            try:
                set_grid(blank, own)
            except QvitError as error:
                raise QvitError(f"site '{site}': {error}") from None
        if grids:
            raise QvitError(f"it has numbers of '{min(grids)}', which has no quantizer")
        for key, tensor in self.floats.items():
            if tensor.is_floating_point() and not bool((tensor.abs() <= LARGEST).all()):
                raise QvitError(f"tensor '{key}' has NaN or infinite values, or some beyond {LARGEST:,.0f}")
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int) and len(self.class_names) > classes:
            raise QvitError(f"it names {len(self.class_names)} classes, the model has {classes}")


def _network(model: nn.Module) -> dict[str, Any] | None:
    """How a model is built, where a document can say it."""
    return network_of(model) if next(differences(model), None) is None else None


def _require_frozen(model: nn.Module) -> None:
    stage = stage_of(model)
    if stage is Stage.FLOAT:
        raise UsageError(
            "a float model has nothing to pack: call qvit.quantize(model, plan), then qvit.calibrate(model, batches)"
        )
    if stage is Stage.QUANTIZED:
        raise UsageError("packing needs scales: call qvit.calibrate(model, batches) or load a trained state first")
    if stage is Stage.CALIBRATED:
        raise UsageError("packing needs integer widths: call qvit.freeze(model) first")
    weights = weight_sites(model)
    off = [site for site, quantizer in quantizers_of(model) if not quantizer.enabled and site not in weights]
    if off:
        raise UsageError(
            f"the quantizer of '{off[0]}' is switched off: a packed model quantizes all that its plan says"
        )


def _codes(site: str, quantizer: Quantizer, weight: Tensor) -> Tensor:
    """The codes of a weight, certain to mean what the model computes with.

    The weight passes its quantizer first: `statsq` takes its scale from the weight it sees. Where the quantizer is
    switched off, as in `Artifact.model()`, the weight has to lie on its grid.
    """
    values = quantizer(weight)
    codes = quantizer.to_int(weight)
    if not torch.equal(quantizer.from_int(codes), values):
        reason = "the codes do not give the weight" if quantizer.enabled else "the quantizer is switched off"
        raise UsageError(f"site '{site}' cannot be packed: {reason}, or the weight is not finite or not in float32")
    return codes.to("cpu", code_dtype(quantizer.spec.widths, quantizer.spec.signed))


def _versions() -> dict[str, str]:
    return {"qvit": __version__, "torch": str(torch.__version__), "timm": version("timm")}


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in memory of its own."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
