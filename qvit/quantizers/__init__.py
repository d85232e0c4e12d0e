"""Quantizers: the visible submodules that hold scale, offset and bit-width of one site.

A new quantizer is one file with a registered class.
"""

from qvit.quantizers.base import Quantizer, create_quantizer, quantizers_of, register_quantizer

__all__ = ["Quantizer", "create_quantizer", "quantizers_of", "register_quantizer"]
