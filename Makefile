# make demo: set up, build the embedded model, train it and show what it learned.   make test: set up and test.
PYTHON ?= python3.11
export PATH := $(CURDIR)/.venv/bin:$(PATH)
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test
demo: .venv/ready
	python examples/arithmetic.py
	examples/demo.sh $(DEMO)

test: .venv/ready-for-tests
	python -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready requirements-test.txt
	.venv/bin/pip install --quiet --requirement requirements-test.txt
	touch $@
