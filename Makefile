# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
CLIENTS ?= tests/clients
BIN := .venv/bin

.PHONY: demo report docs figures test lint same slow mutants drills faults fuzz clients gpu performance wheel packaged clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: a plain request would bring the newest build with all of CUDA
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' -C editable_mode=strict
	touch $@

# The strict editable install links each file: a new file needs a new install.
MODULES := $(shell find exporter models calibration -name '*.py' -o -name '*.j2' -o -name '*.json')
.venv/linked: .venv/installed $(MODULES)
	$(BIN)/pip install --quiet --no-deps --editable . -C editable_mode=strict
	touch $@

demo: .venv/linked
	$(BIN)/python scripts/photographs.py demo/photographs
	$(BIN)/msn-export onnx random:vit-msn-small:0 --head tokens --images demo/photographs --output demo/vit-msn-small.onnx --force
	$(BIN)/msn-export trt demo/vit-msn-small.onnx --fp16 --backend tensorrt-rtx --compute-capability 8.9 --images demo/photographs --output demo/vit-msn-small.engine --force

# One page of the demo's artifacts: fp32 graph, fp16 graph, engine
report: demo
	$(BIN)/msn-export onnx random:vit-msn-small:0 --head tokens --dtype fp16 --images demo/photographs --output demo/vit-msn-small-fp16.onnx --force
	$(BIN)/msn-export report demo/vit-msn-small.onnx demo/vit-msn-small-fp16.onnx demo/vit-msn-small.engine --images demo/photographs --output demo/report.html --markdown demo/report.md --force

# The results that docs/performance.md is written from (make docs), on a machine that does nothing else
.venv-peer/installed: benchmarks/peer.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install --quiet --requirement benchmarks/peer.txt
	touch $@

performance: .venv/linked .venv-peer/installed
	$(BIN)/python benchmarks/forms.py
	$(BIN)/python benchmarks/block_forms.py
	$(BIN)/python benchmarks/foldings.py
	$(BIN)/python benchmarks/engine_kernels.py --optimum .venv-peer/bin/optimum-cli
	$(BIN)/python benchmarks/export.py --optimum .venv-peer/bin/optimum-cli
	$(BIN)/python benchmarks/calibrate.py --base e88d61d
	$(BIN)/python benchmarks/graphs.py --optimum .venv-peer/bin/optimum-cli --compile
	$(BIN)/python benchmarks/runtime_overhead.py
	$(BIN)/python benchmarks/runtime_overhead.py --provider openvino
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/embed_speed.py
	$(BIN)/python benchmarks/cpu_forms.py

# The pages that scripts write from results, docstrings and help, and the site of all pages in
# build/site (its front page: build/site/index.html). make figures writes the pages alone
figures: .venv/linked
	$(BIN)/python scripts/performance.py
	$(BIN)/python scripts/chart.py
	$(BIN)/python scripts/evidence.py
	$(BIN)/python scripts/commands.py
	$(BIN)/python scripts/json_schemas.py
	$(BIN)/python scripts/api.py

docs: figures
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/linked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core; a file's tests stay together, for they share what its fixtures made
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

# pandas and the others read what embed writes
slow: .venv/linked
	$(BIN)/pip install --quiet --constraint constraints.txt pandas polars duckdb faiss-cpu
	$(BIN)/python -m pytest -m slow

# Small faults planted in the core, those listed that no test notices; not part of CI, for it takes
# hours: MUTANTS='graph runtime --count 50 --seed 1 --processes 2' runs a part
mutants: .venv/linked
	$(BIN)/python scripts/mutants.py $(MUTANTS)

# The same commands in the working tree and in a commit: make same BASE=main~1; for changes that
# must change nothing
same: .venv/linked
	$(BIN)/python scripts/same.py $(BASE)

# Against a real tritonserver and a real Ray; their environments are made in build/ on the first run
drills: .venv/linked
	$(BIN)/python -m pytest -m slow tests/triton_server/test_repository_drills.py tests/cluster/test_cluster_drills.py tests/cluster/test_serve_drills.py

# In other runtimes of ONNX files, old and new; their environments are made in build/ on first use
clients: .venv/linked
	$(BIN)/python -m pytest -m 'slow or not slow' $(CLIENTS)

# Every command killed before every change it makes to files, and run in little memory
faults: .venv/linked
	$(BIN)/python -m pytest -m slow tests/contracts/test_kills.py tests/contracts/test_low_memory.py

# Files of every kind, mutated at random: FUZZ_CASES of each. python scripts/reliability.py runs both
# and writes docs/reliability.md
FUZZ_CASES ?= 1000
fuzz: .venv/linked
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest tests/contracts/test_fuzz.py

gpu: .venv/linked
	$(BIN)/python -m pytest -m gpu

# The tests against the built wheel, where the source tree cannot be imported; packaged: those of
# packaging alone, after the wheel's files were compared with the tree's
wheel packaged: .venv/linked
	rm -rf dist
	$(BIN)/python -m build --quiet --wheel --outdir dist
	$(BIN)/python scripts/test_wheel.py $(if $(filter packaged,$@),--packaged)

clean:
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
