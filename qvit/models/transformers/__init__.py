"""Checkpoints of Hugging Face `transformers`, read without it: one file per type of model."""

from qvit.models.transformers.base import Checkpoint, is_checkpoint, open_checkpoint, resolved

__all__ = ["Checkpoint", "is_checkpoint", "open_checkpoint", "resolved"]
