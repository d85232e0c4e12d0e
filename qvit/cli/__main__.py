"""`python -m qvit.cli` is the command `qvit`; also what `accelerate launch -m qvit.cli` starts in each process."""

from qvit.cli import main

main()
