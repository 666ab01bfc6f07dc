"""Samples to tensors: transforms, tokenizers, splits, batches, phantoms."""
