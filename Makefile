# Thin: everything real is in longalign_lib. `make course` and `make test` are the two commands.
PYTHON ?= python3
PROFILE ?= ci
SEED ?= 0
ONLY ?=
ONLINE ?=
PY := .venv/bin/python
INSTALLED := .venv/.installed
COURSE = $(PY) -m longalign_lib.course --profile "$(PROFILE)" --seed "$(SEED)" --only "$(ONLY)" $(if $(ONLINE),--online)

.PHONY: course test test-slow test-all lab outputs bench model clean

course: model  ## run the notebooks in order: executed copies and pages in build/
	$(COURSE)

test: model  ## the tests, in minutes
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m "not slow"

test-slow: model  ## the others: killed runs, several processes
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m slow

test-all: test test-slow  ## both

lab: model  ## JupyterLab on the notebooks
	$(PY) -m jupyter lab --notebook-dir=notebooks

outputs: model  ## run the course and put its outputs into notebooks/
	$(COURSE) --write-back

bench: $(INSTALLED)  ## packing algorithms beside their peers: results/packing.json
	@$(PY) -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(PY) benchmarks/packing.py

model: $(INSTALLED)  ## the default model, fetched once
	@$(PY) -m longalign_lib.models

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else 'Python %d.%d found, 3.11 to 3.13 needed: make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv .venv
	@echo "installing the tested set of packages into .venv, a minute or two ..."
	@$(PY) -m pip install --quiet -c constraints.txt -e ".[deepspeed,retention,serving,test]"
	@touch $@

clean:  ## everything that was built, not the environment
	rm -rf build
