# Two commands for a machine that has Python 3.11 and pip: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test test-slow checkpoints lint clean

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

# Remakes the checkpoints that ship: DATA=cifar10 (downloaded), or an image folder with train/ and test/.
# What is done is skipped, what was interrupted goes on; `make checkpoints/vit.ckpt` makes one of them. What
# ships is the last epoch, never the best.
EPOCHS ?= 12
cnn := cnn
vit := vit
prs := prs --schedule late-first
prs-uniform := prs --schedule uniform:50%
eit := eit
lsra := lsra
vit-bootstrapped := bootstrap
CHECKPOINTS := cnn vit prs prs-uniform eit lsra vit-bootstrapped

checkpoints: $(CHECKPOINTS:%=checkpoints/%.ckpt)
	$(RUN)/python examples/cards.py checkpoints/*.ckpt > checkpoints/README.md

$(CHECKPOINTS:%=checkpoints/%.ckpt): checkpoints/%.ckpt: $(VENV)/installed FORCE
	$(RUN)/fourierbias train $($*) --data "$(DATA)" --epochs $(EPOCHS) --half --resume -o $@
	rm -f checkpoints/$*.best.ckpt

FORCE:

lint: $(VENV)/installed
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

clean:
	rm -rf $(VENV) demo build dist *.egg-info
