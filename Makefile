# Everything a user or developer runs. `make` alone lists it.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash -o pipefail

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PROTOS := protos/inference.proto protos/model_config.proto protos/bundle.proto protos/parity.proto \
	protos/onnx.proto
SERVICES := protos/inference.proto protos/parity.proto
STRANGERS := .venv-conformance/.installed
KSERVE := .venv-kserve/.installed
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-annotate --no-header
COMPILE := $(LOCK) pyproject.toml
COMMA := ,
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
PEERS := mosec mlserver kserve litserve bentoml ray
ARGS ?=
JOBS ?= 2

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-13s %s\n", $$1, $$2 }'

.PHONY: run
run: $(STAMP) ## train, export, prove parity, publish and serve once: the whole flow (ARGS="--preset smoke")
	$(BIN)/train-export run $(ARGS)

.PHONY: test
test: $(STAMP) $(STRANGERS) $(KSERVE) ## the whole test suite but compose, with coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --ignore=tests/compose --durations=25 \
		--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.PHONY: quick
quick: $(STAMP) ## the tests that take a minute: none that trains
	$(BIN)/pytest -m "not slow"

.PHONY: conformance
conformance: $(STAMP) $(STRANGERS) ## clients nobody here wrote, against the real server
	$(BIN)/pytest tests/conformance

.PHONY: test-compose
test-compose: $(STAMP) ## docker compose for real, on the engine that answers: half an hour
	$(BIN)/pytest tests/compose

.PHONY: bench
bench: $(STAMP) ## what serving costs, beside naive servers and the model itself: half an hour (needs h2load)
	$(BIN)/python benchmarks/serving.py $(ARGS)

.PHONY: bench-peers
bench-peers: $(STAMP) ## the same beside mosec, MLServer, KServe, LitServe, BentoML, Ray Serve: half an hour
	for name in $(PEERS); do benchmarks/peers/setup.sh $$name || exit 1; done
	$(BIN)/python benchmarks/serving.py --peers $(subst $(SPACE),$(COMMA),$(PEERS)) $(ARGS)

.PHONY: bench-parity
bench-parity: $(STAMP) ## what the load gate costs for BUNDLE=models/NAME/VERSION, and sampling for a shadow
	$(BIN)/python benchmarks/gate.py $(BUNDLE)
	$(BIN)/python benchmarks/sampling.py

.PHONY: bench-scaling
bench-scaling: $(STAMP) ## what instances and workers give, how cost grows; the exported graph; a request's way
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/graph.py
	$(BIN)/python benchmarks/path.py

.PHONY: stress
stress: $(STAMP) ## what twice the load, and versions that change under load, do to requests
	$(BIN)/python benchmarks/overload.py
	$(BIN)/python benchmarks/swaps.py

.PHONY: soak
soak: $(STAMP) ## a million requests while memory is watched, then a million broken ones a target: hours
	$(BIN)/python benchmarks/soak.py $(ARGS)
	FUZZ_RUNS=1000000 $(BIN)/pytest tests/fuzz -k guided

.PHONY: check
check: $(STAMP) ## format, lint, types, layers, and that what is generated is fresh
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/Dockerfile
	$(MAKE) --no-print-directory protos
	git diff --exit-code -- protos

.PHONY: format
format: $(STAMP) ## format and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: docs
docs: $(STAMP) ## the documentation as a site, in site/; a warning or a broken link fails
	$(BIN)/python -m sphinx --quiet --fail-on-warning --fresh-env --write-all docs site
	@echo "the site is in site/index.html"

.PHONY: protos
protos: export PATH := $(CURDIR)/$(BIN):$(PATH)
protos: $(STAMP) ## write the generated code again
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --mypy_out=quiet:. $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I . --grpc_python_out=. --mypy_grpc_out=quiet:. $(SERVICES)
	sed -i 's/^from google.protobuf import descriptor_pool as/from protos import pool as/' protos/*_pb2.py

.PHONY: lock
lock: $(STAMP) ## resolve the requirements again (ARGS=--upgrade for newer versions)
	$(COMPILE) --extra pipeline --extra telemetry --group dev --output-file requirements/dev.txt $(ARGS)
	$(COMPILE) --extra pipeline --constraints requirements/dev.txt --output-file requirements/pipeline.txt
	$(COMPILE) --extra service --constraints requirements/dev.txt --output-file requirements/service.txt
	$(LOCK) tests/conformance/requirements.in --output-file tests/conformance/requirements.txt $(ARGS)
	$(LOCK) --no-deps tests/conformance/perf_analyzer.in --output-file tests/conformance/perf_analyzer.txt $(ARGS)
	$(LOCK) --no-deps tests/deploy/requirements.in --output-file tests/deploy/requirements.txt $(ARGS)
	for name in $(PEERS); do $(LOCK) benchmarks/peers/$$name.in --output-file benchmarks/peers/$$name.txt $(ARGS) || exit 1; done
	$(COMPILE) --extra service --extra s3 --constraints requirements/dev.txt --output-file requirements/service-s3.txt
	$(COMPILE) --extra pipeline --extra cuda --constraints requirements/dev.txt --output-file requirements/pipeline-gpu.txt
	$(LOCK) --group build --constraints requirements/dev.txt --output-file requirements/build.txt
	awk '/^uv==/ { on = 1 } on { print } on && !/\\$$/ { exit }' requirements/dev.txt > requirements/uv.txt

.PHONY: setup
setup: $(STAMP) ## install everything into .venv, from the locks

$(STAMP): requirements/dev.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "error: TensorFlow needs Python 3.11 to 3.13, found $$($(PYTHON) --version 2>&1);" \
			"name another with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
			&& apt-get --quiet update && apt-get --quiet install --yes python3-venv; } || { \
		echo "error: Python's venv is missing; install it with:" \
			"sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/uv.txt
	@echo "installing 270 packages, 3.8 GB on the disk: a minute, and the network's speed"
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $(STAMP)

$(STRANGERS): $(STAMP) tests/conformance/requirements.txt tests/conformance/perf_analyzer.txt tests/conformance/setup.sh
	tests/conformance/setup.sh

$(KSERVE): $(STAMP) tests/deploy/requirements.txt tests/deploy/setup.sh
	tests/deploy/setup.sh

.PHONY: clean
clean: ## remove what make made, but neither models/ nor runs/
	rm -rf .venv .venv-conformance .venv-kserve .venv-peers site .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
