# `make` lists the targets. ARGS is passed to the command: make test ARGS="-k masks"
.PHONY: help setup quickstart notebooks test test-slow torture lint docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

setup:  ## create .venv and install everything into it, if it is not up to date
	@sh scripts/setup.sh

quickstart: setup  ## train a small DALL-E on this computer and sample from it, into runs/quickstart
	.venv/bin/python scripts/quickstart.py $(ARGS)

notebooks: setup  ## execute all notebooks with the quick start's model and store their outputs
	PYTHONPATH=notebooks .venv/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb $(ARGS) \
		--NotebookExporter.preprocessors=png_only.PNGOnly --ClearMetadataPreprocessor.enabled=True \
		--ClearMetadataPreprocessor.clear_notebook_metadata=False

test: setup  ## run ruff and the fast tests, on at most four processes
	.venv/bin/ruff check
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: setup  ## run the slow tests
	.venv/bin/python -m pytest -m slow $(ARGS)

torture: setup  ## damage every kind of input and interrupt every stage for five minutes
	.venv/bin/python -m pytest tests/torture -m slow --minutes 5 $(ARGS)

lint: setup  ## check ruff's rules and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

docs: setup  ## build the pages and the API reference as a site in docs/_build/index.html
	.venv/bin/uv pip install --quiet --python .venv/bin/python --group docs
	.venv/bin/sphinx-build -c docs -E -W --keep-going -q $(ARGS) . docs/_build
	@echo docs/_build/index.html

clean:  ## remove .venv and all caches, but not runs/
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
