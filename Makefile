# make demo, make test: everything from a fresh checkout. PYTHON chooses the interpreter (3.11 to
# 3.14). Without it, the venv's own is taken, else the first below that is new enough and has venv.
VENV ?= .venv
ifndef PYTHON
pythons := $(VENV)/bin/python python3 python3.14 python3.13 python3.12 python3.11
PYTHON := $(shell for python in $(pythons); do \
  $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
  && echo $$python && break; done)
endif
gpu := $(wildcard /dev/nvidiactl)
# jax finds a GPU only with CUDA's libraries; without them its plugin would complain.
cuda := $(if $(gpu),+cuda13)
# The extras for the tests, joined by "+". `test` has PyTorch, `test-core` does not.
EXTRAS ?= test$(cuda)
PYTEST_ARGS ?=

comma := ,
bin := $(VENV)/bin
version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
compiled := pyproject.toml CMakeLists.txt jax_flashmla/_targets.py $(shell find cmake cuda -type f)
cxx := $(filter %.cu %.cuh %.h %.cc,$(compiled)) $(wildcard tests/*.cu)

# Empty files that say what is in the venv: the package, compiled or not, and sets of extras.
compiled_package := $(VENV)/package-$(version)
python_package := $(VENV)/python-package-$(version)
extras := $(VENV)/extras-
tests := $(extras)$(EXTRAS)
# Lint needs no kernels, and without a GPU the demo runs the references: for these nothing is compiled.
uses_kernels := $(wildcard $(compiled_package)) \
  $(filter-out lint format $(if $(gpu),,demo),$(or $(MAKECMDGOALS),demo))
ifdef JAX_FLASHMLA_PURE_PYTHON
uses_kernels :=
endif
package := $(if $(strip $(uses_kernels)),$(compiled_package),$(python_package))

ifeq ($(version),)
$(error $(if $(PYTHON),$(PYTHON) does not run,there is no Python 3.11 or newer with venv); name one: make PYTHON=...)
endif

# The tests that depend on the version of jax: all but those of benchmarks, machine code and PyTorch,
# and some that take long.
across := $(filter-out tests/test_benchmark% $(addprefix tests/test_,$(addsuffix .py,\
  batch_invariance build model_checkpoints model_families model_rope dense_decode_grid docs \
  examples sm90)),$(wildcard tests/test_*.py))

.PHONY: demo test test-gpu sanitize lint format clean

demo: $(if $(gpu),$(extras)cuda13,$(package))
	$(if $(gpu),,JAX_PLATFORMS=cpu) $(bin)/python examples/decode_loop.py

# On Linux the venv can compile for an H200, so tests that do must not be skipped. Nor must those
# that compare with transformers.
test: $(tests)
	JAX_PLATFORMS=cpu JAX_FLASHMLA_REQUIRE_H200_COMPILER=$(if $(filter Linux,$(shell uname)),1) \
	  JAX_FLASHMLA_REQUIRE_TRANSFORMERS=1 \
	  $(bin)/pytest -n auto --maxprocesses 8 -m "not gpu" $(PYTEST_ARGS)

# With another Python, from PATH or from pyenv: make test-on-3.13. Each gets the newest jax that
# supports it; for 3.11 that is 0.10.2, the oldest that we support.
test-on-%:
	for python in python$* $(wildcard $(HOME)/.pyenv/versions/$*.*/bin/python); do \
	  if $$python -c 'import ensurepip' 2> /dev/null; then \
	    $(MAKE) test VENV=.venv-$* PYTHON=$$python EXTRAS=test-core$(cuda) \
	      PYTEST_ARGS="$(across) $(PYTEST_ARGS)"; exit; \
	  fi; \
	done; echo "there is no Python $* with venv" >&2; exit 1

# On a machine with a Hopper GPU; without one it fails.
test-gpu: $(tests)
	JAX_FLASHMLA_REQUIRE_GPU=1 $(bin)/pytest -m gpu $(PYTEST_ARGS)

# Needs CUDA's compute-sanitizer on PATH. With --garbage the schedules are random numbers: then only
# the addresses are checked.
sanitize: $(tests)
	for run in memcheck synccheck racecheck "memcheck --garbage"; do set -- $$run; \
	  compute-sanitizer --tool $$1 --kernel-regex kns=jax_flashmla --error-exitcode 1 \
	    $(bin)/python tests/sanitizer_sample.py $$2 || exit; \
	done

lint: $(extras)lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(cxx)
	$(bin)/mypy

format: $(extras)lint
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cxx)

clean:
	rm -rf $(VENV) .venv-* build dist

pip_install := $(bin)/python -m pip install --disable-pip-version-check

# The install is editable: a change to Python code needs no new one, a change to what is compiled
# does. A venv of another Python is replaced.
$(package): $(compiled)
	[ "$$($(bin)/python -V 2>&1)" = "$$($(PYTHON) -V)" ] || $(PYTHON) -m venv --clear $(VENV)
	rm -f $(compiled_package) $(python_package) $(extras)*
	$(if $(filter $@,$(python_package)),JAX_FLASHMLA_PURE_PYTHON=1) $(pip_install) --verbose \
	  --config-settings cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON --editable .
	touch $@

# The package is there already, so this adds only what its extras name.
$(extras)%: $(package)
	$(pip_install) 'jax_flashmla[$(subst +,$(comma),$*)]'
	touch $@
