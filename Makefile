# `make demo` and `make test` set up everything they need; Python 3.10 or later is all that has to be there.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RANKS ?= 2
MINUTES ?= 3
VERSIONS ?= lowest

.PHONY: demo test chaos compat lint docs clean

demo: $(READY)
	@mkdir -p out
	@echo "9 frames go through a small VAE on $(RANKS) ranks, then on one rank to compare: less than a minute."
	$(VENV)/bin/halovae roundtrip media/bigbuckbunny.mp4 -o out/demo.mp4 --frames 108:117 --height 256 --width 448 \
		--ranks $(RANKS) --compare --report out/demo-report

# Three workers keep two cores busy: some tests wait, for servers and for ranks that were stopped.
test: $(READY)
	$(VENV)/bin/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder --durations=25

# Random faults in random calls, see docs/internals/reliability.md.
chaos: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/chaos.py --minutes $(MINUTES)

# The core of the tests on the lowest or the newest versions of what is asked for, see docs/compat.md.
compat:
	$(PYTHON) tests/compat.py $(VERSIONS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# The pages of docs/ with the API out of the docstrings, as out/site/index.html. A broken link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "out/site/index.html"

$(READY): pyproject.toml constraints.txt
	@echo "Installing torch, diffusers and what tests need into $(VENV), once: some GiB, which takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
