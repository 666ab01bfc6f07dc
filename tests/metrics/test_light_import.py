"""Metrics stay NumPy only: a page of results must not wait for torch, SciPy or scikit-learn."""

from __future__ import annotations

import subprocess
import sys


def test_metrics_import_numpy_and_nothing_heavy():
    names = "bootstrap calibration classification compare labels localization paired retrieval weighted"
    code = f"import sys, {', '.join(f'chiasm.metrics.{n}' for n in names.split())}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "scipy", "sklearn", "pandas", "matplotlib", "PIL"}
    assert not {name.split(".")[0] for name in loaded} & heavy
