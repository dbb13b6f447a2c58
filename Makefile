# make demo     set-up, then tokenizer, HMAR, refinement and samples on the built-in shapes; pictures in demo/
# make test     the tests
# make check    lint, format and types
# make install  the set-up alone: .venv with the package and its tools
#
# The set-up runs on the first call, and again only when pyproject.toml has changed.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.installed
HMAR := $(BIN)/hmar

.PHONY: demo test check install clean

install: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(READY)
	rm -rf demo/run demo/*.png
	$(HMAR) train --recipe msvq-tiny --out demo/run/tokenizer
	$(HMAR) tokenize builtin:shapes --tokenizer demo/run/tokenizer --limit 4000 --out demo/run/cache
	$(HMAR) train --recipe hmar-tiny --data demo/run/cache --out demo/run/hmar
	$(HMAR) finetune-masked demo/run/hmar --data demo/run/cache --out demo/run/masked
	$(HMAR) sample --checkpoint demo/run/masked --count 64 --schedule none --out demo/run/samples-draft
	$(HMAR) sample --checkpoint demo/run/masked --count 64 --out demo/run/samples-refined
	$(HMAR) curves demo/run/hmar --out demo/accuracy.png
	cp demo/run/tokenizer/samples/step-00000800.png demo/reconstructions.png
	cp demo/run/samples-draft/grid.png demo/hmar.png
	cp demo/run/samples-refined/grid.png demo/hmar-refined.png
	@echo "Look at demo/reconstructions.png, demo/hmar.png, demo/hmar-refined.png and demo/accuracy.png"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
