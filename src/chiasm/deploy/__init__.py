"""A trained classifier for use: what it costs, that it needs no text, and ONNX."""
