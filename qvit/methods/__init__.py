"""Methods: one paper, one file. A new method is one file with a class decorated by `register_method`."""

from qvit.methods import dq, edmips, irm, lsq, ofq, qvit, vvtq
from qvit.methods.ptq import method as ptq
from qvit.methods import float as float_method  # noqa: F401  (registers the method)
from qvit.methods.base import Method, create_method, method_names, register_method

__all__ = ["Method", "create_method", "method_names", "register_method"]
