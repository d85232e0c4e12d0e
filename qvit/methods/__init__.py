"""Methods: one paper, one file. A new method is one file with a class decorated by `register_method`."""

from qvit.methods.base import METHODS, Method, create_method, register_method

__all__ = ["METHODS", "Method", "create_method", "register_method"]
