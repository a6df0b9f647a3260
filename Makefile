# Everything runs from .venv, which is made once and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow test-transformers pretrained lint clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audio,train,dev]'
	touch $@

# Transcribes examples/audio with the shipped model, then streams the same recording.
demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The long tests that `make test` leaves out.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# transformers' own model tests, from its source distribution (fetched through pip, so this one needs a package index).
test-transformers: $(READY)
	$(BIN)/python tests/fetch_transformers_tests.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_transformers_mixin.py

# Bring the code inside the shipped model folders up to date with the package.
pretrained: $(READY)
	$(BIN)/python -m hf_speechllm.hub.refresh pretrained/*/

lint: $(READY)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist
