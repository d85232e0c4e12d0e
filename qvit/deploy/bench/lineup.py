"""Who takes part in a benchmark: our engines and the peers, chosen by name, prepared once and started per batch size.

What cannot take part does not stop the others. It is noted with the reason: a package or a compiler is missing, an
engine of ours cannot run this artifact and says so, or a peer fails on this model, in whatever way. Any other failure
of an engine of ours is a defect and is raised.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch import Tensor

from qvit.deploy.bench.peers.base import PEERS, Material, Prepared, Runner, quiet, without_gradients
from qvit.deploy.bench.timing import Contender, Progress
from qvit.errors import QvitError, UsageError, first_line, nearest

if TYPE_CHECKING:
    from qvit.deploy.file.artifact import Artifact

_log = logging.getLogger(__name__)
PREFIX = "qvit-"


@dataclass(frozen=True)
class Packed:
    """A model of ours, quantized by one plan.

    Attributes:
        plan: The plan's name, another one for each.
        artifact: What our engines run.
        precision: What rows say, such as `w8a8`.
        file_bytes: Size of the artifact's file; None if unknown.
    """

    plan: str
    artifact: Artifact
    precision: str
    file_bytes: int | None = None


def chosen(wanted: Sequence[str] | None, *, peers: bool = True, device: str = "cpu") -> list[str]:
    """Names of those who take part.

    Args:
        wanted: Names such as `openvino-int8` or `qvit-torch`; a runtime such as `openvino` stands for all of it, `qvit`
            for all engines of ours that are installed. None: all.
        peers: Whether peers take part.
        device: Only who runs on this kind of device takes part.

    Raises:
        UsageError: An unknown name, or a peer although there are to be none.
    """
    from qvit.deploy.engines import available_engines

    ours = [PREFIX + name for name in available_engines(device)]
    there = {name: peer for name, peer in PEERS.items() if device in peer.devices}
    if wanted is None:
        return ours + (list(there) if peers else [])
    found: list[str] = []
    for name in wanted:
        of_runtime = [key for key, peer in there.items() if name in (key, peer.engine)]
        own = ours if name == "qvit" else [name] if name.startswith(PREFIX) else of_runtime
        if not own:
            known = list(dict.fromkeys([*ours, *(peer.engine for peer in there.values()), *there]))
            raise UsageError(f"unknown engine '{name}'{nearest(name, known)}; allowed are qvit, {', '.join(known)}")
        if of_runtime and not peers:
            raise UsageError(f"'{name}' is a peer: name it, or leave the peers out, not both")
        found += own
    return list(dict.fromkeys(found))


class Lineup:
    """Those who take part, and who does not and why.

    Attributes:
        skipped: Rows of `engine`, `precision`, `plan` (of ours) and `reason`.
    """

    def __init__(self, names: Sequence[str], packed: Sequence[Packed], material: Material) -> None:
        """Prepares nothing yet.

        Args:
            names: As from `chosen`.
            packed: What our engines run, each of them all of it.
            material: What peers are made from.
        """
        self.names, self.packed, self.material = names, packed, material
        self.skipped: list[dict[str, str | None]] = []
        self._prepared: dict[str, Prepared] = {}
        self._engines: dict[tuple[str, str], Any] = {}

    def prepare(self, progress: Progress) -> None:
        """Converts and quantizes the peers; takes minutes for large models."""
        names = [name for name in self.names if name in PEERS]
        for done, name in enumerate(names):
            peer = PEERS[name]
            progress(f"preparing {name}", done, len(names))
            obstacle = peer.obstacle()
            if obstacle is not None:
                self._note(peer.engine, peer.precision, obstacle)
                continue
            with self._noting(peer.engine, peer.precision, any_failure=True), quiet():
                self._prepared[name] = peer.prepare(self.material)

    def start(self, images: Tensor) -> list[Contender]:
        """Who is ready for this batch (B, channels, height, width), on the device; each has answered it once."""
        from qvit.deploy.engines import available_engines

        started: list[Contender] = []
        installed = [PREFIX + name for name in available_engines(self.material.device)]
        for name in self.names:
            if name not in PEERS:
                for packed in self.packed:
                    noting = self._noting(name, packed.precision, packed.plan, refuses=name in installed)
                    with noting, self._compiling(), quiet():
                        started.append(self._engine(name, packed, images))
            elif name in self._prepared:
                peer = PEERS[name]
                with self._noting(peer.engine, peer.precision, any_failure=True), self._compiling(), quiet():
                    started.append(self._peer(name, images))
        return started

    def _engine(self, name: str, packed: Packed, images: Tensor) -> Contender:
        from qvit.deploy.engines import create_engine

        key = (name, packed.plan)
        if key not in self._engines:
            engine = create_engine(packed.artifact, name.removeprefix(PREFIX), threads=self.material.threads)
            self._engines[key] = engine
        engine = self._engines[key]
        run = self._finished(without_gradients(engine))
        run(images)
        return Contender(
            name, packed.precision, engine.arithmetic, run, packed.file_bytes, ours=True, plan=packed.plan,
            profile=getattr(engine, "profile", None),
        )  # fmt: skip

    def _peer(self, name: str, images: Tensor) -> Contender:
        peer, ready = PEERS[name], self._prepared[name]
        run = self._finished(ready.start(len(images)))
        run(images)
        return Contender(peer.engine, peer.precision, ready.arithmetic, run, ready.file_bytes)

    def _finished(self, run: Runner) -> Runner:
        """`run`, which returns when the answer is there: a GPU works on while Python has it already."""
        if self.material.device == "cpu":
            return run

        def wait(images: Tensor) -> Tensor:
            answer = run(images)
            torch.cuda.synchronize(images.device)
            return answer

        return wait

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """torch.compile keeps 8 forms of a function and leaves the ninth uncompiled; here every plan has its own."""
        most = torch._dynamo.config.recompile_limit + 2 * len(self.packed)
        with torch._dynamo.config.patch(recompile_limit=most):
            yield

    @contextmanager
    def _noting(
        self, engine: str, precision: str, plan: str | None = None, *, any_failure: bool = False, refuses: bool = False
    ) -> Iterator[None]:
        """Notes a QvitError, or any failure; a UsageError where that says what an engine refuses."""
        try:
            yield
        except Exception as error:
            if isinstance(error, UsageError) and not refuses or not (any_failure or isinstance(error, QvitError)):
                raise
            first = first_line(error)
            _log.debug("%s %s is left out", engine, precision, exc_info=True)
            reason = first if isinstance(error, QvitError) else f"{type(error).__name__}: {first}"
            self._note(engine, precision, reason, plan)

    def _note(self, engine: str, precision: str, reason: str, plan: str | None = None) -> None:
        row = {"engine": engine, "precision": precision, "plan": plan, "reason": reason}
        if row not in self.skipped:
            self.skipped.append(row)
