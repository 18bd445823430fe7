# make train   environment, installation, and about five minutes of training on the CPU with real ARC data
# make test    the same environment, then linter, type checker and test suite
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test clean

train: $(VENV)/train.installed
	$(RUN) trainloop_complete_with_fixes.py --epochs 20 --device cpu --time_budget 300 --val_every 0 \
	    --val_views 4 $(ARGS)

test: $(VENV)/test.installed
	$(RUN) -m ruff check .
	$(RUN) -m mypy .
	$(RUN) -m pytest

$(VENV)/train.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -r requirements.txt
	touch $@

$(VENV)/test.installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
