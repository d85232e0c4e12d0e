"""Weights that go back and forth between two grid points: measured for every run, and three remedies against it."""

from qvit.training.oscillation.remedies import Remedy, RemedyOptions, create_remedy
from qvit.training.oscillation.tracking import Diagnostics, Oscillations
from qvit.training.oscillation.weights import QuantizedWeight, quantized_weights

__all__ = [
    "Diagnostics",
    "Oscillations",
    "QuantizedWeight",
    "Remedy",
    "RemedyOptions",
    "create_remedy",
    "quantized_weights",
]
