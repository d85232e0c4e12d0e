"""From a trained model to one that is small: packed files. What they hold is said in `artifact.py`."""

from qvit.deploy.file.artifact import Artifact

__all__ = ["Artifact"]
