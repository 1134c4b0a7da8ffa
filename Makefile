# On a fresh machine with Python 3.11+ and make, two commands do everything: `make demo` and `make test`.
# Without a GPU, a much smaller set-up:  TORCH_BACKEND=cpu make setup     (before anything else; then `make demo`)
# Another Python:                        make setup PYTHON=python3.12
# Words for the command behind a task:   make demo ARGS="--out elsewhere"
PYTHON ?= python3
TORCH_BACKEND ?=
ARGS ?=

READY := .venv/.ready
INSTALL = .venv/bin/uv pip install --python .venv/bin/python --constraints constraints.txt --build-constraints constraints.txt \
	$(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND))

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export UV_COMPILE_BYTECODE := 1
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
unexport PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_CONSTRAINT PIP_TARGET PIP_PREFIX PIP_USER

.PHONY: help setup demo test lab docs bench clean
.DELETE_ON_ERROR:

help:  ## What can be made (this list)
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## +/\t/' | expand -t 10

setup: $(READY)  ## Make .venv with everything for users and developers; skipped when nothing changed

demo: $(READY)  ## The main job, end to end, on a miniature world; prints where the report is
	geovision demo $(ARGS)

test: $(READY)  ## All tests: exports, ruff, floors, notebooks, pytest, pages; prints counts
	python .ci/checks.py $(ARGS)

lab: $(READY)  ## JupyterLab on the tutorials
	geovision lab $(ARGS)

docs: $(READY)  ## The site in _docs, where Quarto is installed; else prepare and check its pages
	python .ci/docs.py $(ARGS)

bench: $(READY)-bench  ## The benchmarks, beside other programs (installed first)
	python tests/bench/run.py $(ARGS)

clean:  ## Remove what tasks made, except .venv and your own demo, runs and data
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "geovision needs Python 3.11 or newer, but '$(PYTHON)' is missing or older."; \
		echo "Install one, or name one that is there:  make setup PYTHON=python3.12"; exit 1; }
	@.venv/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@test -x .venv/bin/uv || .venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	$(INSTALL) -e '.[dev]'
	@touch $@

$(READY)-bench: $(READY)
	$(INSTALL) -e '.[dev,bench]'
	@touch $@
