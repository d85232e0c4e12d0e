"""Soft labels of a teacher for many crops of each image, made once, and training from them without the teacher.

    crops.py      which crops there are, and the pixels of one
    store.py      the files: format, checks, reading
    writer.py     writing them shard by shard, so that a kill loses one shard at most
    recovery.py   a distribution over all classes from the few that are kept, and its loss
    loading.py    batches for the teacher, and batches for training

Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition" (ECCV 2022); as multi-crop knowledge
distillation part of "Quantization Variation" (Huang, Shen et al., 2023).
"""

from qvit.data.labels.store import SoftLabelStore

__all__ = ["SoftLabelStore"]
