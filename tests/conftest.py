"""For all tests: no network and an empty cache, whoever starts them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
os.environ["CHIASM_HOME"] = tempfile.mkdtemp(prefix="chiasm-tests-")  # the doctor records vectors there
atexit.register(shutil.rmtree, os.environ["CHIASM_HOME"], ignore_errors=True)
