"""ONNX Runtime Web, the runtime that runs an exported graph in a browser: where its two files come from.

    ort.wasm.bundle.min.mjs        the interface, 73 kB
    ort-wasm-simd-threaded.wasm    the runtime compiled to WebAssembly, 14 MB (3.7 MB compressed)

They are files of the npm package `onnxruntime-web`. It is fetched once by `npm pack` and kept in the user's cache, or a
folder that has the files is named. A page carries this code to other people's browsers, so whatever the place, a file
counts only with the checksum noted here: one version, the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qvit.errors import QvitError
from qvit.files import cache_folder, make_private, read_bytes, write_atomically

_log = logging.getLogger(__name__)
NAME, VERSION = "onnxruntime-web", "1.30.0"
SCRIPT, PROGRAM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    PROGRAM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
LARGEST = 64 << 20
#: Seconds for the download of 33 MB.
TIME_LIMIT = 300.0


@dataclass(frozen=True)
class WebRuntime:
    """The two files.

    Attributes:
        script: A JavaScript module that exports `env`, `InferenceSession` and `Tensor`.
        program: The WebAssembly.
    """

    script: str = field(repr=False)
    program: bytes = field(repr=False)


def web_runtime(folder: str | Path | None = None, notify: Callable[[str], None] = _log.info) -> WebRuntime:
    """The runtime, from a folder, the cache, or npm.

    Args:
        folder: Where the files are (`dist` of the npm package); None for the cache, which npm fills if need be.
        notify: Is told of a download.

    Raises:
        QvitError: The files are not there, are others, or cannot be fetched.
    """
    if folder is not None:
        return _read(Path(folder))
    cached = cache_folder() / f"{NAME}-{VERSION}"
    try:
        return _read(cached)
    except QvitError:
        notify(f"fetching ONNX Runtime Web {VERSION} by npm, once (33 MB)")
        _fetch(cached)
    return _read(cached)


def _read(folder: Path) -> WebRuntime:
    contents = {name: read_bytes(folder / name, "file of ONNX Runtime Web", limit=LARGEST) for name in SHA256}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise QvitError(f"{folder / name} is not that of {NAME} {VERSION}: `npm pack {NAME}@{VERSION}` fetches it")
    return WebRuntime(contents[SCRIPT].decode(), contents[PROGRAM])


def _fetch(target: Path) -> None:
    """Puts the two files into the cache; nothing else of the package is unpacked."""
    npm = shutil.which("npm")
    elsewhere = f"or unpack {NAME} {VERSION} elsewhere, and name its folder `dist` with --runtime"
    if npm is None:
        raise QvitError(f"ONNX Runtime Web comes from npm, which is not installed: install it, {elsewhere}")
    with tempfile.TemporaryDirectory(prefix="qvit-npm-") as folder:
        command = [npm, "pack", f"{NAME}@{VERSION}", "--pack-destination", folder, "--fetch-retries=1"]
        try:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIME_LIMIT
            )
            reason = " ".join(done.stderr.split())[-300:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"it took more than {TIME_LIMIT:.0f} s"
        except OSError as error:
            reason = str(error)
        if reason:
            raise QvitError(f"npm cannot fetch {NAME} {VERSION}: {reason}; try again, {elsewhere}")
        try:
            make_private(target)
            with tarfile.open(Path(folder) / f"{NAME}-{VERSION}.tgz") as archive:
                for name in SHA256:
                    member = archive.extractfile(f"package/dist/{name}")
                    assert member is not None
                    content = member.read(LARGEST)
                    write_atomically(target / name, lambda file, content=content: file.write(content))
        except (OSError, KeyError, tarfile.TarError) as error:
            raise QvitError(f"npm's {NAME} {VERSION} cannot be unpacked: {error}") from error
