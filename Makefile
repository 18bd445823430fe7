# make train   environment, installation, and about five minutes of training on the CPU with real ARC data
# make test    the same environment, then linter, type checker and test suite
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test chromium clean

train: $(VENV)/train.installed
	$(RUN) trainloop_complete_with_fixes.py --epochs 20 --device cpu --time_budget 300 --val_every 0 \
	    --val_views 4 $(ARGS)

test: $(VENV)/test.installed chromium
	$(RUN) -m ruff check .
	$(RUN) -m mypy .
	$(RUN) -m pytest

# For the test that opens the report in a browser; where no Chromium is and none can be installed, pytest skips it.
chromium:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    chromium; } >/dev/null || echo "chromium could not be installed: the browser test will be skipped"; fi

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
