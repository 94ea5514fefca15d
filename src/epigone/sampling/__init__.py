"""Writing text with a model: jitted decoding over a key/value cache."""
