"""Builds the native engine into the package where there is a C++ compiler; everything else is in pyproject.toml.

Without a compiler the installation goes on: the engine is then compiled on first use, or another engine serves.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
NATIVE = runpy.run_path(str(ROOT / "qvit" / "deploy" / "native" / "sources.py"))


class BuildEngine(build_ext):
    """A library with a C interface, not a module of Python: its name and content are the same for every Python."""

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(
                f"qvit: the native engine is not built ({error}); it is compiled on first use where there is a C++ "
                "compiler by then, otherwise OpenVINO, ONNX Runtime or PyTorch run packed models",
                file=sys.stderr,
            )


class PlatformWheel(bdist_wheel):
    """One wheel for all Pythons of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "qvit.deploy.native._engine",
            [str(NATIVE["SOURCE"].relative_to(ROOT.resolve()))],
            depends=[str(path.relative_to(ROOT.resolve())) for path in NATIVE["headers"]()],
            language="c++",
            extra_compile_args=[*NATIVE["FLAGS"], f"-DQVIT_SOURCES={NATIVE['digest']()}"],
            extra_link_args=["-pthread", *NATIVE["LINK_FLAGS"]],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildEngine, "bdist_wheel": PlatformWheel},
)
