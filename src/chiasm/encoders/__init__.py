"""Tensors to vectors: the towers, their assembly and the catalog."""
