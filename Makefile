# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo install test test-all lint bench bench-peers check-wheel test-oldest clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[slides,encoder,dev]"
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m apps.demo

# Two files at a time, a core each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks all

# The comparisons with their peers, which are no dependency of ours and live in an environment of their own with it:
# `.venv-peers/bin/python -m benchmarks NAME`
PEERS := .venv-peers/.installed

bench-peers: $(PEERS)

$(PEERS): pyproject.toml benchmarks/peers.txt constraints.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q --upgrade pip
	.venv-peers/bin/python -m pip install -q -c constraints.txt -e . -r benchmarks/peers.txt
	touch $@

# The built wheel, in an environment that has never seen the checkout
check-wheel: $(STAMP)
	rm -rf build/wheel && $(BIN)/python -m build -q --wheel --outdir build/wheel
	$(BIN)/python -m tests.check_wheel build/wheel

# The fast tests with the oldest dependencies that pyproject.toml allows; by hand
test-oldest:
	$(PYTHON) -m tests.oldest > build-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -r build-oldest.txt
	.venv-oldest/bin/python -m pip install -q -e ".[slides,encoder,dev]" -c build-oldest.txt
	.venv-oldest/bin/python -m pytest -m "not slow"

clean:
	rm -rf build dist .venv .venv-peers .venv-oldest build-oldest.txt
