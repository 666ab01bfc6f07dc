"""Batches, encoder and loss to weights."""
