"""Disk to images, text and stored embeddings, and back."""
