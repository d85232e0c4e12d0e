"""Which machine a speed was measured on: its processor, and the instructions that decide how fast 8 bits can be.

Products of 8-bit integers are several times faster with VNNI (`avx512_vnni`, `avx_vnni`), AMX (`amx_int8`) or, on Arm,
`asimddp` and `i8mm` than without; bf16 is only fast with `avx512_bf16`, `amx_bf16` or `bf16`. A ratio of engines holds
for processors with the same instructions.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip
_CPUINFO = Path("/proc/cpuinfo")


def hardware() -> str:
    """Processor, cores, architecture."""
    name = _cpu_line("model name") or platform.processor() or "CPU"
    return f"{name}, {os.cpu_count()} cores, {platform.machine()}"


def cpu_instructions() -> list[str] | None:
    """Those of `INSTRUCTIONS` that this processor has; None where the system is not Linux, which lists them."""
    flags = _cpu_line("flags", "features")
    return None if flags is None else [name for name in INSTRUCTIONS if name in flags.split()]


def _cpu_line(*keys: str) -> str | None:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((text.strip() for key, _, text in pairs if key.strip().lower() in keys), None)
