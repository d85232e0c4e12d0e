"""Which modules and matmuls a model has. One file per family of timm models; importing it registers it."""

from qvit.models.families import beit
from qvit.models.families import cait
from qvit.models.families import eva
from qvit.models.families import swin
from qvit.models.families import swin_v2
from qvit.models.families import vit
from qvit.models.families.base import Family, constructor_arguments, family_of, inspect_model, register_family

__all__ = ["Family", "constructor_arguments", "family_of", "inspect_model", "register_family"]
