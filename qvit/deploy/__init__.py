"""From a trained model to one that is small: packed files, engines, exports, measurements."""
