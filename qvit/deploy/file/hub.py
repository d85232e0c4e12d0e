"""Packed models on the Hugging Face hub, or in a folder of the same shape.

    model.safetensors   the packed file, all that is needed (docs/packed-files.md)
    config.json         the same facts for people and for searches; nothing is read from it
    README.md           a model card: widths, sizes, accuracy, how to load; one that is there is kept

The functions have the names and the arguments of `huggingface_hub.ModelHubMixin`; the mixin itself is not used because
it makes objects from `config.json`, and what makes a model is in the packed file, under its checksum.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.summary import describe, widths_by_kind
from qvit.errors import QvitError, UsageError, first_line
from qvit.files import write_atomically, write_json
from qvit.locks import writing
from qvit.models.features import answers_with_features
from qvit.version import __version__

MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_ACCURACIES = {
    "accuracy": "top-1 (%)", "top5": "top-5 (%)", "float_accuracy": "top-1 of the float model (%)",
    "agreement": "same answer as the float model (%)",
}  # fmt: skip


def save_pretrained(artifact: Artifact, folder: str | Path, *, repo_id: str | None = None) -> None:
    """Writes the three files.

    Args:
        artifact: The packed model.
        folder: Made if it is not there. A model card that is there is kept, the other files are replaced.
        repo_id: The repository that the card tells how to load from; by default the folder's name.

    Raises:
        QvitError: A file cannot be written.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: give a folder")
    with writing(target):
        artifact.save(target / MODEL)
        facts = describe(artifact, (target / MODEL).stat().st_size)
        write_json(target / CONFIG, _config(artifact, facts))
        if not (target / CARD).exists():
            text = model_card(artifact, facts, repo_id or target.resolve().name)
            write_atomically(target / CARD, lambda file: file.write(text.encode()))


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Artifact:
    """Loads a packed model.

    Args:
        source: A folder that `save_pretrained` wrote, or a repository of the hub, such as `someone/deit-tiny-3bit`.
        revision: Branch, tag or commit.
        token: For private repositories; by default the one that is logged in.
        cache_dir, force_download, local_files_only: See `huggingface_hub.hf_hub_download`.

    Raises:
        QvitError: There is no such repository or file, no network, or the file is not a packed model.
    """
    if Path(source).is_dir():
        return Artifact.load(Path(source) / MODEL)
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            str(source),
            MODEL,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            library_name="qvit",
            library_version=__version__,
        )
    except Exception as error:
        raise QvitError(f"cannot get '{source}': no such folder, and from the hub: {first_line(error)}") from error
    return Artifact.load(str(path))


def push_to_hub(
    artifact: Artifact,
    repo_id: str,
    *,
    commit_message: str = "Packed model",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Uploads what `save_pretrained` writes in one commit; the repository is made if it is not there.

    Args:
        artifact: The packed model.
        repo_id: Such as `someone/deit-tiny-3bit`.
        commit_message, private, token, branch, create_pr: As `huggingface_hub.ModelHubMixin.push_to_hub`.

    Returns:
        The address of the commit.

    Raises:
        QvitError: The upload failed; the reason is the hub's.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(artifact, folder, repo_id=repo_id)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                repo_type="model",
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        except Exception as error:
            raise QvitError(f"cannot upload to '{repo_id}': {first_line(error)}") from error
    return str(commit)


def _config(artifact: Artifact, facts: dict[str, Any]) -> dict[str, Any]:
    kept = ("format_version", "model", "model_kwargs", "plan", "data_config", "provenance", "file_bytes")
    return {
        "library_name": "qvit",
        **{key: facts[key] for key in kept},
        "class_names": list(artifact.class_names),
        "bit_width": {row["site"]: row["bit_width"] for row in facts["sites"]},
    }


def model_card(artifact: Artifact, facts: dict[str, Any], repo_id: str) -> str:
    """The text of a model card in Markdown, with the metadata that the hub reads."""
    widths = "\n".join(f"| `{kind}` | {sites} | {bits} |" for kind, sites, bits in widths_by_kind(artifact))
    elements = sum(codes.numel() for codes in artifact.integers.values())
    mean = f", {8 * facts['payload_bytes'] / elements:.2f} bits per packed weight" if elements else ""
    found = {
        text: artifact.provenance[key]
        for key, text in _ACCURACIES.items()
        if isinstance(artifact.provenance.get(key), (int, float))
    }
    accuracy = "\n".join(f"| {text} | {value:.2f} |" for text, value in found.items())
    task = "image-feature-extraction" if answers_with_features(artifact.skeleton) else "image-classification"
    measured = f"\n## Accuracy\n\n| | |\n|---|---:|\n{accuracy}\n" if accuracy else ""
    return f"""---
library_name: qvit
pipeline_tag: {task}
tags:
- {task}
- quantization
- timm
- qvit
---

# {artifact.model_name}, quantized by the plan `{artifact.plan.name}`

A Vision Transformer of timm in {facts["file_bytes"]:,} bytes{mean}. Weights are packed integers; activations are
quantized when it runs.
{measured}
## Use

```python
import qvit

artifact = qvit.Artifact.from_pretrained("{repo_id}")
model = artifact.model()  # a torch module in eval mode; images as in artifact.data_config
```

## Bit-widths

| tensors | sites | bits |
|---|---:|---:|
{widths}

## Size

| | bytes |
|---|---:|
| packed integers | {facts["payload_bytes"]:,} |
| scales | {facts["scale_bytes"]:,} |
| float tensors | {facts["float_bytes"]:,} |
| header | {facts["header_bytes"]:,} |
"""
