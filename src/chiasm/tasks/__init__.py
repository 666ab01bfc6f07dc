"""Embeddings to results; a task never sees a model."""
