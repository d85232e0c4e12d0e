"""The runtimes that a quantized model competes with, a file each; `base.py` says what a peer is."""

from qvit.deploy.bench.peers.base import PEERS, Material, Peer, Prepared, Runner, peer, quiet

__all__ = ["PEERS", "Material", "Peer", "Prepared", "Runner", "peer", "quiet"]
