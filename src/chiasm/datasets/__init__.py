"""Data sets as they lie on disk, read into tables of samples."""
