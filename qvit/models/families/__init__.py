"""Which modules and matmuls a model has: one file per family of timm models."""

from qvit.models.families.base import Family, constructor_arguments, family_of, inspect_model, register_family

__all__ = ["Family", "constructor_arguments", "family_of", "inspect_model", "register_family"]
