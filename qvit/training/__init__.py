"""Training on timm, torch and accelerate: configuration, data, optimizer, loop, checkpoints.

Methods plug in through `hooks.ComposedHooks`.
"""
