# Two commands for a machine that has Python 3.11 and pip: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	mkdir -p demo
	$(RUN)/fourierbias capture checkpoints/vit.ckpt --layers sublayers --images 64 -o demo/vit.h5 --overwrite
	$(RUN)/fourierbias plot demo/vit.h5 -o demo/vit.png --overwrite
	$(RUN)/fourierbias plot --compare --images 64 -o demo/compare.png --csv demo/compare.csv --overwrite

test: $(VENV)/installed
	$(RUN)/python -m pytest -q

test-slow: $(VENV)/installed
	$(RUN)/python -m pytest -q -m slow

lint: $(VENV)/installed
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

clean:
	rm -rf $(VENV) demo build dist *.egg-info
