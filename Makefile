# `make demo` and `make test` set up everything they need; Python 3.10 or later is all that has to be there.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RANKS ?= 2

.PHONY: demo test lint clean

demo: $(READY)
	mkdir -p out
	$(VENV)/bin/halovae roundtrip media/bigbuckbunny.mp4 -o out/demo.mp4 --frames 108:125 --height 256 --width 448 \
		--ranks $(RANKS) --compare

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
