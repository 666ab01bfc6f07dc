"""For all tests: no network, an empty cache and one precision, whoever starts them and wherever."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
os.environ["CHIASM_PRECISION"] = "fp32"  # what `auto` means: the same on every machine
os.environ["CHIASM_HOME"] = tempfile.mkdtemp(prefix="chiasm-tests-")  # the doctor records vectors there
atexit.register(shutil.rmtree, os.environ["CHIASM_HOME"], ignore_errors=True)
