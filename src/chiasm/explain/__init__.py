"""Encoder, image and text to a heat map."""
