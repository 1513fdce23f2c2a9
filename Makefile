# `make` lists the targets. ARGS goes to the command: make test ARGS="-k masks"
.PHONY: help setup quickstart notebooks test test-slow lint docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

setup:  ## make .venv and install everything into it; at once when that is done
	@sh scripts/setup.sh

quickstart: setup  ## train a small DALL-E on this computer and sample from it, into runs/quickstart
	.venv/bin/python scripts/quickstart.py $(ARGS)

notebooks: setup  ## run all notebooks with the quick start's model and keep their outputs
	.venv/bin/jupyter nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
		--ClearMetadataPreprocessor.clear_notebook_metadata=False notebooks/*.ipynb $(ARGS)

test: setup  ## ruff, then every test that takes seconds
	.venv/bin/ruff check
	.venv/bin/python -m pytest $(ARGS)

test-slow: setup  ## the tests that take minutes
	.venv/bin/python -m pytest -m slow $(ARGS)

lint: setup  ## ruff's rules and its format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

docs: setup  ## the pages and the reference of the public names, as a site in docs/_build/index.html
	.venv/bin/uv pip install --quiet --python .venv/bin/python --group docs
	.venv/bin/sphinx-build -c docs -E -W --keep-going -q $(ARGS) . docs/_build
	@echo docs/_build/index.html

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
