"""What runs a packed model: engines with one interface, a file each; `base.py` says what one is."""

from qvit.deploy.engines.base import ENGINES, Engine, available_engines, create_engine, load, register_engine

__all__ = ["ENGINES", "Engine", "available_engines", "create_engine", "load", "register_engine"]
