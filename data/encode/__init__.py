"""From a sample to token ids, loss weights, positions and patches."""
