"""Packed models for other runtimes: ONNX graphs and OpenVINO models whose products run on integers."""
