# `make demo` and `make test` each set up everything they need on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
DEMO   := src/lsync_compile/assets/sample

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench dist try-dist clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch 2.13.0 is inside the supported range; naming one release keeps installs alike.
$(BIN)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(BIN)/.installed  ## Lip-sync the bundled sample with the bundled model
	@mkdir -p $(OUT)
	$(BIN)/lsync sync $(DEMO)/talking.mp4 $(DEMO)/speech.wav -o $(OUT)/demo.mp4 \
		--report $(OUT)/demo.json
	@echo "video:  $(OUT)/demo.mp4"
	@echo "report: $(OUT)/demo.json"

# A process a core, each with one thread; a file's tests share what they capture. Files in their own
# order: by the number of tests the slowest would come last, and one core would wait for the other.
test: $(BIN)/.installed  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(BIN)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(BIN)/.installed  ## Build the documentation's site into out/site
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python docs/site/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir $(abspath $(OUT))/site
	@echo "site:   $(OUT)/site/index.html"

# What was measured before is kept: the same call goes on with what is missing.
bench: $(BIN)/.installed  ## Time and judge: LatentSync's full size on a GPU, a check on a CPU
	@mkdir -p $(OUT)
	$(BIN)/lsync bench --out $(OUT)/bench --size \
		$$($(BIN)/python -c 'import torch; print("full" if torch.cuda.is_available() else "small")')

dist: $(BIN)/.installed  ## Build the sdist, and from it the wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

try-dist: dist  ## Install the wheel into a clean environment and sync a second from another folder
	@mkdir -p $(OUT)
	rm -rf $(OUT)/clean
	$(PYTHON) -m venv $(OUT)/clean
	$(OUT)/clean/bin/python -m pip install --quiet torch==2.13.0
	$(OUT)/clean/bin/python -m pip install --quiet dist/*.whl
	bin=$(abspath $(OUT))/clean/bin && cd "$$(mktemp -d)" && $$bin/lsync doctor && \
		sample=$$($$bin/python -c 'import lsync_compile; print(lsync_compile.__path__[0])')/assets/sample && \
		$$bin/lsync sync $$sample/talking.mp4 $$sample/speech.wav --max-frames 25 --steps 4 \
			-o second.mp4 --quiet && ls -l second.mp4

clean:  ## Remove what the other targets made
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache
