"""Quantizers: the visible submodules that hold scale, offset and bit-width of one site.

A new quantizer is one file with a registered class.
"""

from qvit.quantizers.base import Quantizer, create_quantizer, quantizers_of, register_quantizer
from qvit.quantizers.dq import RangeQuantizer
from qvit.quantizers.edmips import MixtureQuantizer
from qvit.quantizers.irm import RectifiedQuantizer
from qvit.quantizers.log2 import Log2Quantizer, LogSqrt2Quantizer
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.observers import HistogramObserver
from qvit.quantizers.statsq import StatsQuantizer

__all__ = [
    "HistogramObserver",
    "LSQQuantizer",
    "Log2Quantizer",
    "LogSqrt2Quantizer",
    "MixtureQuantizer",
    "Quantizer",
    "RangeQuantizer",
    "RectifiedQuantizer",
    "StatsQuantizer",
    "create_quantizer",
    "quantizers_of",
    "register_quantizer",
]
