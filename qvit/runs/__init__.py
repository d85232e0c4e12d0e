"""From options to a directory: one run each of training, post-training, labelling, analysis and measuring speed."""
