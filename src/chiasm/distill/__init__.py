"""CLIP-IT: images paired with unpaired reports by a CLIP teach a classifier that needs no text afterwards."""
