PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
# On Linux, TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the CUDA libraries.
TORCH_INDEX ?=
# Runs of studies at the same time, each with one thread
WORKERS ?= 2

.PHONY: setup demo test lint format check type docs benchmark evidence clean

setup: $(VENV)/.installed  ## a virtual environment with the package and all tools

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: use `make PYTHON=<python> setup`." % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e ".[dev]"
	@touch $@

demo: setup  ## pretrain on bundled data, finetune online while a champion serves, show what happened: about 3 minutes once all is installed
	$(PY) -m rl_zoo3.train --algo td3c --env Pendulum-v1 -P -n 20000 --eval-freq -1 --seed 0 -f logs/demo \
		--verbose 0 --log-interval -2 -params alpha:0.1 policy_kwargs:"dict(net_arch=[64,64])"
	$(VENV)/bin/sb3-offline-ft summary $$(ls -td logs/demo/td3c/Pendulum-v1_* | head -n 1)

test: setup  ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal --durations 30

lint: setup  ## style errors
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## repair the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

type: setup  ## static types
	$(PY) -m mypy

check: lint type test  ## what continuous integration checks, but for the installation

docs: setup  ## the documentation, in docs/_build/html
	$(PIP) --quiet -e ".[docs]"
	$(PY) -m sphinx -q -W -b html docs docs/_build/html

benchmark: setup  ## results, tables and figures of all benchmarks: many hours, much of it can be resumed
	$(PY) benchmarks/speed/run.py
	$(PY) benchmarks/speed/memory.py
	$(PY) benchmarks/speed/ablation.py
	$(PY) benchmarks/speed/subnormal.py
	$(PY) benchmarks/speed/precision.py
	$(PY) benchmarks/finetuning/hopper.py
	$(PY) benchmarks/speed/loading.py > benchmarks/speed/loading.json
	$(PY) benchmarks/detection/calibration.py
	$(PY) benchmarks/detection/delay_simulated.py
	$(PY) benchmarks/detection/rescue.py
	$(PY) benchmarks/detection/delay_recorded.py
	$(PY) benchmarks/detection/cost.py
	$(PY) benchmarks/deployment/promises.py
	$(PY) benchmarks/off_policy/accuracy.py
	$(PY) benchmarks/robust_files/run.py
	$(PY) benchmarks/studies/interval_coverage.py
	$(MAKE) evidence

evidence: setup  ## what is missing of all studies, then the tables of README.md and docs/findings.md: many hours, can be stopped and resumed
	for file in benchmarks/studies/*/study.yml; do \
		study=$$(dirname $$file); \
		if [ ! -e $$study/runs ] && [ -e $$study/runs.tar.xz ]; then tar -C $$study -xJf $$study/runs.tar.xz || exit 1; fi; \
		$(VENV)/bin/sb3-offline-ft study run $$study --workers $(WORKERS) && \
		$(VENV)/bin/sb3-offline-ft study report $$study && \
		tar -C $$study -cJf $$study/runs.tar.xz runs || exit 1; done
	$(PY) benchmarks/studies/findings.py

clean:  ## what the other targets made
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
