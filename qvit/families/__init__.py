"""Which modules and matmuls a model has. One file per family of timm models; importing it registers it."""

from qvit.families import beit, cait, eva, swin, swin_v2, vit  # noqa: F401  (registers the families)
from qvit.families.base import Family, constructor_arguments, family_of, inspect_model, register_family

__all__ = ["Family", "constructor_arguments", "family_of", "inspect_model", "register_family"]
