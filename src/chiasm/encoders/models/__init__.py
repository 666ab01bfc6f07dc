"""The models that have a name: one file per family, each with its ``ENTRIES``. torch is not imported."""
