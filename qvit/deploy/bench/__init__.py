"""Speed: our engines and their peers, in turns, on the same threads."""
