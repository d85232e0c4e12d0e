"""The native engine outside of Python: its C program, processes without PyTorch, wheels, sanitizers, AArch64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_file import mutations
from test_native import SWIN_NAME, frozen, images_for

from qvit import QuantPlan, Rule
from qvit.deploy.native import NativeModel, library, sources

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "examples" / "native" / "classify.c"
pytestmark = pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="needs a C++ compiler")


def run(*command: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    found = subprocess.run(
        words, capture_output=True, text=True, timeout=900, env=os.environ | environment, errors="replace"
    )
    assert found.returncode == expect, (words, found.stdout[-2000:], found.stderr[-4000:])
    return found


def program(folder: Path, *options: str, prefix: str = "") -> Path:
    """The C program with the engine inside, as other compilers and options make it."""
    cxx, include = f"{prefix}g++", f"-I{sources.HERE}"
    run(cxx, "-std=c++17", *options, "-ffp-contract=off", "-pthread", "-c", sources.SOURCE, "-o", folder / "engine.o")
    run(f"{prefix}gcc", include, *options, "-c", PROGRAM, "-o", folder / "classify.o")
    run(cxx, *options, "-pthread", folder / "classify.o", folder / "engine.o", "-o", folder / "classify")
    return folder / "classify"


def material(folder: Path) -> list[tuple[Path, Path, np.ndarray]]:
    """Packed files, images, and the answers to them: a ViT that pools by attention, and a Swin."""
    found = []
    plan = QuantPlan.preset("w4a4").with_rules(Rule("blocks.*.attn.probs", {"bit_width": (3, 4, 6)}))
    vit = {"probs": "log2", "global_pool": "map", "num_classes": 0}
    for name, side, own, options in (("vit_tiny_patch16_224", 32, plan, vit), (SWIN_NAME, 64, "w4a4", {})):
        images = images_for(3, side)
        content = frozen(own, images, name, **options).to_bytes()
        (folder / f"{side}.safetensors").write_bytes(content)
        images.numpy().tofile(folder / f"{side}.f32")
        expected = NativeModel(content, form="portable")(images.numpy())
        found.append((folder / f"{side}.safetensors", folder / f"{side}.f32", expected))
    return found


def answers(text: str, classes: int) -> np.ndarray:
    """The logits that the program printed, all of them."""
    blocks = [block.split()[1:] for block in text.split("image ")[1:]]
    logits = np.zeros((len(blocks), classes))
    for row, block in enumerate(blocks):
        logits[row, [int(word) for word in block[0::2]]] = [float(word) for word in block[1::2]]
    return logits


def test_the_c_program_on_the_installed_library(tmp_path: Path) -> None:
    built = Path(library.library()._name)
    include, runtime = f"-I{sources.HERE}", f"-Wl,-rpath,{built.parent}"
    run("gcc", "-Wall", "-Werror", include, PROGRAM, built, runtime, "-o", tmp_path / "classify")
    for file, image, expected in material(tmp_path):
        found = run(tmp_path / "classify", file, image, 100).stdout
        np.testing.assert_allclose(answers(found, expected.shape[1]), expected, atol=2e-2)
    assert run(tmp_path / "classify", file, image).stdout.count("\n") == 3 * 6
    assert "no packed model" in run(tmp_path / "classify", tmp_path / "x", image, expect=1).stderr
    assert "less than an image" in run(tmp_path / "classify", file, os.devnull, expect=1).stderr


WITHOUT_TORCH = """
import sys
for name in ("torch", "timm", "torchvision", "scipy", "pydantic"):
    sys.modules[name] = None
import numpy as np
from qvit.deploy.native import load
model = load(sys.argv[1], threads=1)
images = np.fromfile(sys.argv[2], np.float32).reshape(-1, *model.shape)
np.save(sys.argv[3], model(images))
"""


def test_a_process_without_torch(tmp_path: Path) -> None:
    (file, image, expected), _ = material(tmp_path)
    run(sys.executable, "-c", WITHOUT_TORCH, file, image, tmp_path / "logits.npy", PYTHONPATH=str(ROOT))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=2e-2)


def test_a_library_of_other_sources_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = Path(library.library()._name)
    monkeypatch.setattr(sources, "BUILT", tmp_path / "_engine.so")
    assert library._installed() is None
    shutil.copy(built, tmp_path / "_engine.so")
    assert library._installed() is not None
    monkeypatch.setattr(sources, "digest", lambda: "others")
    assert library._installed() is None
    monkeypatch.setattr(sources, "BUILT", tmp_path / "none.so")
    (tmp_path / "none.so").write_bytes(b"no library")
    assert library._installed() is None


@pytest.mark.slow
def test_a_wheel_needs_no_compiler(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "_engine.so", "site", "demo-output", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "there")
    (file, image, expected), _ = material(tmp_path)
    run(
        sys.executable, "-P", "-c", WITHOUT_TORCH, file, image, tmp_path / "logits.npy",
        PYTHONPATH=str(tmp_path / "there"), CXX="/bin/false", XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=2e-2)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Addresses and undefined behaviour, on files that are whole and on mutated ones."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    made = program(tmp_path, *flags)
    for file, image, expected in material(tmp_path):
        np.testing.assert_allclose(answers(run(made, file, image, 100).stdout, expected.shape[1]), expected, atol=2e-2)
    images = torch.full((1, 3, 32, 32), torch.nan).numpy()
    images.tofile(tmp_path / "nan.f32")
    run(made, tmp_path / "32.safetensors", tmp_path / "nan.f32")
    content = (tmp_path / "32.safetensors").read_bytes()
    for mutated in mutations(content, 400):
        (tmp_path / "mutated").write_bytes(mutated)
        found = subprocess.run([made, tmp_path / "mutated", tmp_path / "32.f32"], capture_output=True, timeout=120)
        assert found.returncode in (0, 1) and b"Sanitizer" not in found.stderr, found.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["max", "cortex-a53"])
def test_aarch64(processor: str, tmp_path: Path) -> None:
    """Under an emulator: with sdot, and on a processor that lacks it."""
    prefix = "aarch64-linux-gnu-"
    if not (shutil.which(f"{prefix}g++") and shutil.which("qemu-aarch64")):
        pytest.skip("needs a cross compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user")
    made = program(tmp_path, "-O2", "-static", prefix=prefix)
    for file, image, expected in material(tmp_path):
        found = run("qemu-aarch64", "-cpu", processor, made, file, image, 100).stdout
        np.testing.assert_allclose(answers(found, expected.shape[1]), expected, atol=2e-2)


@pytest.mark.slow
def test_the_avx_vnni_form_where_only_avx512_has_it(tmp_path: Path) -> None:
    """The same instruction in the encoding of AVX-512; processors with AVX-VNNI alone run the other one."""
    if "AVX-512 VNNI" not in library.forms():
        pytest.skip("needs a processor with AVX-512 VNNI")
    made = tmp_path / "engine.so"
    run("g++", *sources.FLAGS, "-DQVIT_EVEX", "-shared", "-fPIC", sources.SOURCE, "-o", made)
    script = (
        "import ctypes, sys\nengine = ctypes.CDLL(sys.argv[1])\nengine.qvit_form.restype = ctypes.c_char_p\n"
        "print([engine.qvit_form(index) for index in range(4)], engine.qvit_probe())\n"
    )
    found = run(sys.executable, "-c", script, made).stdout
    assert found.strip() == "[b'AVX-512 VNNI', b'AVX-VNNI', b'AVX2', b'portable'] 0"
