"""What the native engine is compiled from and with; read by setup.py, too, before qvit is installed."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "engine.cpp"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
)
#: A wheel brings the C++ runtime along, so that it does not need that of the machine it was made on.
LINK_FLAGS = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s") if sys.platform == "linux" else ()
#: The library that an installation with a compiler puts beside the sources.
BUILT = HERE / "_engine.so"


def headers() -> list[Path]:
    """All files that `SOURCE` includes."""
    return sorted(HERE.glob("*.h"))


def digest() -> str:
    """What identifies the sources; a library that was made of others is not loaded."""
    content = b"".join(path.read_bytes() for path in (SOURCE, *headers()))
    return hashlib.sha256(content).hexdigest()[:20]
