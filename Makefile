# make train   set up and train the embedded default (on a GPU if there is one)
# make test    set up and run the tests that need no GPU, without the slow ones: minutes
# make test-all    the same with the slow ones
# make docs    set up, build docs/ as a site in build/docs and check every link
# make gpu-check   check everything that needs an NVIDIA card, in under ten minutes; installs nothing
#                  make gpu-check ARGS="--only training": train GPT-2 here and in PyTorch, in another ten
# make profile     profile training steps with Nsight Systems; installs nothing
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# For targets that install nothing: the given Python, else that of .venv if it exists, else python3.
CARD_PYTHON = $(if $(filter file,$(origin PYTHON)),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)),$(PYTHON))

.PHONY: train test test-all lint docs clean gpu-check profile

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@extra=$$($(BIN)/python -m cllm_gpu.devices.driver); if [ -n "$$extra" ]; then \
	  echo "NVIDIA driver found: installing the extra $$extra"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extra]"; fi
	@touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

$(VENV)/ready-lint: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[lint]"
	@touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

train: $(VENV)/ready
	$(BIN)/cllm-gpu train $(ARGS)

test: $(VENV)/ready-test
	$(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(VENV)/ready-test
	$(BIN)/python -m pytest -n auto --slow $(ARGS)

lint: $(VENV)/ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without --quiet, with which MkDocs would not count the warnings that mkdocs.yml turns into errors.
docs: $(VENV)/ready-docs
	$(BIN)/python -m mkdocs build

gpu-check:
	$(CARD_PYTHON) -m bench.gpu_check $(ARGS)

profile:
	$(CARD_PYTHON) -m bench.training.nsight $(ARGS)

clean:
	rm -rf $(VENV) build dist
