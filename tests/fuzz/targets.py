"""What is attacked: for each kind of file one that is whole, a mutation of it, and the calls that read it.

A target's `read` returns numbers that the mutated file led to, where it led to some: they must be finite. Whatever it
raises but `QvitError` is a defect, as is a command's answer that says so itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
from image_sets import CONFIG, make_images, make_shards
from label_stores import digits_request
from PIL import Image
from safetensors.torch import save_file
from tiny_models import SMALL, calibrated_model, digit_batches, digits_model, small_config
from torch import Tensor

from qvit import cli
from qvit.data.labels import SoftLabelStore, store
from qvit.data.labels.loading import StoredLabels
from qvit.data.open import AugmentConfig, data_config_of, eval_loader, open_data, open_source, train_loader
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError
from qvit.models.create import create_model
from qvit.plan.quant_plan import QuantPlan, Rule
from qvit.runs import labels as labels_run
from qvit.runs.finished import load_run
from qvit.runs.labels import LabelRequest
from qvit.runs.run import train

MODEL = ["vit_digits", *(word for key, value in SMALL.items() for word in ("-m", f"{key}={value}"))]
PLAN = QuantPlan.preset("w3a3").with_rules(
    Rule("blocks.*.attn.query", {"bit_width": [2, 3], "switchable_scale": True, "granularity": "per-tensor"}),
    Rule("blocks.*.attn.key", {"quantizer": "irm"}),
    Rule("blocks.*.mlp.fc1.weight", {"quantizer": "statsq"}),
    Rule("blocks.*.attn.qkv.input", {"switchable_scale": True, "token_bit_width": {"share": 0.5, "low": 2}}),
)


class DefectError(Exception):
    """An answer that is none: qvit's own word for a defect, a traceback, a number that is not finite."""


def command(*arguments: Any) -> str:
    """Runs a command in this process and returns what it printed. Raises QvitError for a failure told as promised."""
    words, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["qvit", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = words
    message = err.getvalue()
    if "this is a defect" in message or "Traceback" in message:
        raise DefectError(f"{' '.join(sys.argv[:2])}: {message[-600:]}")
    if code:
        raise QvitError(message)
    return out.getvalue()


class Target:
    """One kind of file."""

    #: Cases of the whole fuzz test.
    cases = 1000

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prepare()

    def prepare(self) -> None:
        """Writes files that are whole."""

    def mutate(self, chance: random.Random) -> str:
        """Puts a mutated file where `read` looks; returns what was done."""
        raise NotImplementedError

    def read(self) -> Iterable[Tensor]:
        """Reads it."""
        raise NotImplementedError


class File(Target):
    """A target that is one file."""

    name = "file"
    mutation: Callable[[random.Random, bytes], bytes] = staticmethod(mutations.json_of)

    def prepare(self) -> None:
        self.path = self.folder / self.name
        self.write()
        self.whole = self.path.read_bytes()

    def write(self) -> None:
        """Writes the whole file to `path`."""
        raise NotImplementedError

    def mutate(self, chance: random.Random) -> str:
        self.path.write_bytes(type(self).mutation(chance, self.whole))
        return self.name


class Packed(File):
    cases = 4000
    name = "model.safetensors"
    mutation = staticmethod(lambda chance, content: mutations.safetensors_of(chance, content, mutations.sealed))

    def write(self) -> None:
        model = calibrated_model(PLAN)
        Artifact.from_model(model, model_name="vit_digits", model_kwargs=SMALL, class_names=("a", "b")).save(self.path)

    def read(self) -> Iterable[Tensor]:
        yield Artifact.load(self.path).model()(digit_batches(1, 2)[0])
        command("inspect", self.path, "--json")


class Plan(File):
    cases = 2500
    name = "plan.json"

    def write(self) -> None:
        model = digits_model()
        from qvit.models.families import inspect_model

        PLAN.resolve(inspect_model(model).sites).save(self.path)
        shutil.copy(self.path, self.folder / "other.json")

    def read(self) -> Iterable[Tensor]:
        command("plan", "diff", self.path, self.folder / "other.json")
        command("plan", "show", self.path)
        command("cost", *MODEL, "--plan", self.path, "--json")
        return ()


class Recipe(File):
    cases = 1500
    name = "recipe.toml"
    mutation = staticmethod(mutations.toml_of)

    def write(self) -> None:
        options = "model_kwargs = { depth = 1, embed_dim = 16, num_heads = 2 }\nmethod_options = { head_wise = true }\n"
        numbers = "epochs = 1\nbatch_size = 200\nlr = 0.002\ncalibration_images = 32\nthreads = 1\nseed = 0\n"
        words = 'model = "vit_digits"\nmethod = "qvit"\nbudget = "3bit"\ndata = "digits"\naugment = "none"\n'
        self.path.write_text(words + 'opt = "adamw"\nsched = "cosine"\ndevice = "cpu"\n' + numbers + options)

    def read(self) -> Iterable[Tensor]:
        command("train", self.path, "--dry-run", "--json")
        return ()


class Sensitivities(File):
    cases = 2000
    name = "sensitivity.json"

    def write(self) -> None:
        save_file(digits_model().state_dict(), self.folder / "float.safetensors")
        words = ("--weights", self.folder / "float.safetensors", "--data", "digits", "--images", 16, "--device", "cpu")
        command("sensitivity", *MODEL, *words, "--metric", "hessian", "--out", self.path)

    def read(self) -> Iterable[Tensor]:
        command("allocate", self.path, *MODEL[1:], "--budget", "4bit", "--out", self.folder / "made.json", "--json")
        return ()


class Run(Target):
    """A finished run, of which one file is mutated; then it is drawn, loaded and scored."""

    cases = 2500
    documents = ("config.json", "result.json", "plan.json", "cost.json", "log.jsonl")

    def prepare(self) -> None:
        self.run = self.folder / "run"
        train(small_config(method="qvit", budget="3bit", epochs=2), self.run, overwrite=True, quiet=True)
        self.whole = {path.name: path.read_bytes() for path in self.run.iterdir() if path.is_file()}

    def mutate(self, chance: random.Random) -> str:
        name = chance.choice(self.documents)
        for other, content in self.whole.items():
            (self.run / other).write_bytes(content)
        change = mutations.lines_of if name.endswith(".jsonl") else mutations.json_of
        if name.endswith(".safetensors"):
            change = mutations.safetensors_of
        (self.run / name).write_bytes(change(chance, self.whole[name]))
        return name

    def read(self) -> Iterable[Tensor]:
        command("report", self.run, "--out", self.folder / "page.html")
        return ()


class LoadedRun(Run):
    cases = 1000
    documents = ("config.json", "plan.json", "model.safetensors", "result.json")

    def read(self) -> Iterable[Tensor]:
        yield load_run(self.run)(digit_batches(1, 2)[0])
        command("pack", self.run, "--overwrite")


class InterruptedRun(Target):
    """A run that stopped after its first epoch; one file is mutated, its checkpoint above all, and it is resumed."""

    cases = 700

    def prepare(self) -> None:
        from qvit.training.loop import Trainer

        self.run = self.folder / "run"
        whole_epoch, count = Trainer.save, 0

        def save_and_stop(trainer: Trainer) -> Any:
            nonlocal count
            whole_epoch(trainer)
            count += 1
            raise KeyboardInterrupt

        Trainer.save = save_and_stop  # type: ignore[method-assign]
        try:
            train(
                small_config(method="qvit+vvtq", budget="3bit", epochs=2, ema_decay=0.9),
                self.run,
                overwrite=True,
                quiet=True,
            )
        except KeyboardInterrupt:
            pass
        finally:
            Trainer.save = whole_epoch  # type: ignore[method-assign]
        self.kept = self.folder / "kept"
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.run, self.kept)

    def mutate(self, chance: random.Random) -> str:
        shutil.rmtree(self.run)
        shutil.copytree(self.kept, self.run)
        files = sorted(path for path in (self.run / "checkpoints").iterdir())
        chosen = chance.choice([*files * 4, self.run / "config.json", self.run / "log.jsonl", self.run / "plan.json"])
        content = chosen.read_bytes()
        if chosen in files:
            change = mutations.safetensors_of if chosen.suffix == ".safetensors" else mutations.zip_of
            changed = change(chance, content)
            digest = hashlib.sha256(changed).hexdigest()[:16]
            chosen.unlink()
            stem = chosen.stem.rpartition("-")[0]
            (chosen.parent / f"{stem}-{digest}{chosen.suffix}").write_bytes(changed)
        else:
            chosen.write_bytes(
                (mutations.lines_of if chosen.suffix == ".jsonl" else mutations.json_of)(chance, content)
            )
        return chosen.name

    def read(self) -> Iterable[Tensor]:
        command("train", "--resume", self.run, "--quiet")
        yield load_run(self.run)(digit_batches(1, 2)[0])


class Labels(Target):
    """A store of soft labels: header or records changed, with checksums that are right."""

    cases = 1500

    def prepare(self) -> None:
        self.store = self.folder / "labels"
        labels_run.write_labels(
            LabelRequest.create(**digits_request(self.folder, crops=3, images_per_shard=600)), self.store
        )
        self.whole = {path.name: path.read_bytes() for path in self.store.iterdir() if path.is_file()}
        self.source = open_data("digits").train
        self.call = store.read_header(self.store).call

    def mutate(self, chance: random.Random) -> str:
        name = chance.choice(["labels.json", "labels-00000.bin", "labels-00001.bin", "labels-00000.bin"])
        for other, content in self.whole.items():
            (self.store / other).write_bytes(content)
        change = (
            mutations.json_of
            if name == "labels.json"
            else self.records
            if chance.random() < 0.8
            else mutations.bytes_of
        )
        (self.store / name).write_bytes(change(chance, self.whole[name]))
        with contextlib.suppress(Exception):  # where the header still is one
            header = json.loads((self.store / "labels.json").read_bytes())
            for number, shard in enumerate(header["shards"]):
                shard["sha256"] = store.shard_digest(self.store, number)
            header.pop("checksum")
            header["checksum"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
            (self.store / "labels.json").write_text(json.dumps(header))
        return name

    def records(self, chance: random.Random, content: bytes) -> bytes:
        """A shard with numbers of some crops replaced."""
        number = 0 if content == self.whole["labels-00000.bin"] else 1
        count = self.call.images_in(number)
        images = np.frombuffer(content, store.IMAGE, count).copy()
        crops = np.frombuffer(content, self.call.crop_dtype, offset=images.nbytes).copy().reshape(count, -1)
        strange = (math.nan, math.inf, -math.inf, -1.0, 2.0, 0.0, 65504.0, 6e-8)
        for _ in range(chance.choice((1, 3, 300))):
            image = chance.randrange(count)
            row = crops[image : image + 1, chance.randrange(crops.shape[1])]
            field = chance.choice(row.dtype.names)
            if row[field].dtype.kind == "f":
                row[field].reshape(-1)[chance.randrange(row[field].size)] = chance.choice(strange)
            else:
                largest = np.iinfo(row[field].dtype).max
                row[field].reshape(-1)[chance.randrange(row[field].size)] = chance.choice(
                    (0, 1, 7, 9, 10, 200, largest)
                )
            images["checksum"][image] = store.image_checksum(images[image], crops[image])
        return images.tobytes() + crops.tobytes()

    def read(self) -> Iterable[Tensor]:
        labels = StoredLabels(SoftLabelStore(self.store), 10, crops_per_image=3)
        config = data_config_of(digits_model())
        loader = train_loader(self.source, config, batch_size=300, augment=AugmentConfig.preset("none"), labels=labels)
        for batch in loader:
            yield from (part for part in batch if part.is_floating_point())


class ClassMap(File):
    cases = 600
    name = "classes.txt"
    mutation = staticmethod(mutations.bytes_of)

    def write(self) -> None:
        make_images(self.folder / "images", {"cat": 2, "dog": 2, "eel": 2})
        self.path.write_text("7\tcat\textra\n12\tdog\n3\teel\n")

    def mutate(self, chance: random.Random) -> str:
        content = mutations.bytes_of(chance, self.whole)
        if chance.random() < 0.4:
            number = chance.choice(("99999999999", "9" * 5000, "-1", "1e9", "٣", "²", "1000000", "70000", "0x7"))
            content = content.replace(b"12", number.encode(), 1)
        self.path.write_bytes(content)
        return self.name

    def read(self) -> Iterable[Tensor]:
        bundle = open_data(str(self.folder / "images"), class_map=self.path, test_share=0.4)
        if bundle.num_classes > 1_000_000:
            raise DefectError(f"{bundle.num_classes} classes")
        for images, _ in eval_loader(bundle.train, CONFIG, batch_size=4):
            yield images


class Weights(File):
    cases = 1000
    name = "weights.safetensors"
    mutation = staticmethod(mutations.safetensors_of)

    def write(self) -> None:
        save_file(digits_model().state_dict(), self.path)

    def read(self) -> Iterable[Tensor]:
        yield from create_model("vit_digits", weights=self.path, **SMALL).state_dict().values()


class PickledWeights(Weights):
    cases = 1500
    name = "weights.pth"
    mutation = staticmethod(mutations.zip_of)

    def write(self) -> None:
        torch.save({"model": digits_model().state_dict(), "epoch": 3}, self.path)


class Tar(File):
    cases = 1000
    name = "images.tar"
    mutation = staticmethod(mutations.tar_of)

    def write(self) -> None:
        folder = make_images(self.folder / "images", {"cat": 3, "dog": 3})
        with tarfile.open(self.path, "w") as tar:
            tar.add(folder, ".")

    def read(self) -> Iterable[Tensor]:
        bundle = open_data(str(self.path), test_share=0.4)
        for images, _ in eval_loader(bundle.train, CONFIG, batch_size=4):
            yield images


class Shards(File):
    cases = 1000
    name = "wds/000000.tar"
    mutation = staticmethod(mutations.tar_of)

    def write(self) -> None:
        make_shards(self.folder / "wds", [0, 1, 2, 0, 1, 2], 6)

    def read(self) -> Iterable[Tensor]:
        source = open_source(f"wds/{self.folder / 'wds'}", class_names=["a", "b", "c"])
        for images, _ in eval_loader(source, CONFIG, batch_size=4):
            yield images


class Picture(File):
    """One image of a folder, in each of the usual formats."""

    cases = 1500
    formats = ("jpeg", "png", "webp", "bmp", "gif", "tiff")

    def prepare(self) -> None:
        make_images(self.folder / "images", {"cat": 2, "dog": 2})
        self.path = self.folder / "images" / "cat" / "cat_0.jpg"
        self.whole_of = {}
        picture = Image.open(self.path).convert("RGB")
        for kind in self.formats:
            buffer = io.BytesIO()
            picture.save(buffer, kind)
            self.whole_of[kind] = buffer.getvalue()

    def mutate(self, chance: random.Random) -> str:
        kind = chance.choice(self.formats)
        self.path.write_bytes(mutations.bytes_of(chance, self.whole_of[kind]))
        return kind

    def read(self) -> Iterable[Tensor]:
        bundle = open_data(str(self.folder / "images"), test_share=0.4)
        for source in (bundle.train, bundle.test):
            for images, _ in eval_loader(source, CONFIG, batch_size=4):
                yield images


TARGETS: dict[str, type[Target]] = {
    cls.__name__: cls
    for cls in (
        *(Packed, Plan, Recipe, Sensitivities, Run, LoadedRun, InterruptedRun, Labels, ClassMap),
        *(Weights, PickledWeights, Tar, Shards, Picture),
    )
}
