# make test    sets up what is missing, builds, runs the tests
# make bench   the same, then measures fastclip against torch
# make gpu     builds for the card at hand, tests over CUDA, compute-sanitizer, benchmark (PYTHON: one with torch)
# make lint    ruff, clang-format and mypy, without changing anything
# make docs    the documentation as a site, into build/site
# make matrix  builds and tests with the oldest and the newest torch and Python, each in an environment of its own
# make fuzz    clips 20,000 random lists and compares with float64: N=1000000 for more, SEED=… repeats one that failed
# make sanitize  builds the CPU part with sanitizers, runs tests under them (ARGS=--program, --quick: parts)
# make soak    100,000 calls with models that change: nothing may grow (N=…)
# make docs-figures  puts the figures of benchmarks/results into README.md and docs
#
# PYTHON=…     the Python to start from (python3)
# TORCH=…      the torch to put into a new virtual environment ("torch==2.13.0")
# ARGS=…       further arguments: make bench ARGS=--quick, make test ARGS="-k value"

PYTHON ?= python3
TORCH ?= torch
ARGS ?=
export TORCH
# Idle threads sleep: spinning ones slow everything down where others use the cores too.
test: export OMP_WAIT_POLICY = passive

PREPARED = py="$$($(PYTHON) tools/prepare.py)" && "$$py" -m
CPP = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: test bench gpu matrix docs docs-figures fuzz sanitize soak lint
test:
	@$(PREPARED) pytest $(ARGS)

bench:
	@$(PREPARED) benchmarks $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs:
	@$(PREPARED) mkdocs build --strict --quiet $(ARGS)

docs-figures:
	@$(PREPARED) benchmarks.docs_figures $(ARGS)

fuzz:
	@py="$$($(PYTHON) tools/prepare.py)" && "$$py" tests/fuzz $(if $(N),--lists $(N)) $(if $(SEED),--seed $(SEED))

sanitize:
	@py="$$($(PYTHON) tools/prepare.py)" && tools/sanitize.sh "$$py" $(ARGS)

soak:
	@py="$$($(PYTHON) tools/prepare.py)" && OMP_WAIT_POLICY=passive "$$py" tests/soak.py $(if $(N),--calls $(N))

gpu:
	@PYTHON=$(PYTHON) tools/gpu.sh $(ARGS)

matrix:
	@$(PYTHON) tools/matrix.py $(ARGS)

lint:
	@$(PREPARED) ruff check .
	@$(PREPARED) ruff format --check .
	@$(PREPARED) mypy
	@py="$$($(PYTHON) tools/prepare.py)" && "$$(dirname "$$py")/clang-format" --dry-run --Werror $(CPP)
