# make demo, make test: everything from a fresh checkout. PYTHON chooses the interpreter (3.11 to
# 3.14); without it, that of the venv, else the first below that is new enough and can make one.
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
# The extras to install, joined by "+". test has PyTorch, which test-core has not.
EXTRAS ?= test$(cuda)
PYTEST_ARGS ?=

comma := ,
bin := $(VENV)/bin
version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp := $(VENV)/installed-$(version)-
installed := $(stamp)$(EXTRAS)
# For what works with either: all of it where it is installed already, else the smaller part.
any := $(firstword $(wildcard $(installed)) $(stamp)test-core$(cuda))
compiled := pyproject.toml CMakeLists.txt jax_flashmla/_targets.py $(shell find cmake cuda -type f)
cxx := $(filter %.cu %.cuh %.h %.cc,$(compiled)) $(wildcard tests/*.cu)

ifeq ($(version),)
$(error there is no Python 3.11 or newer with venv; name one: make PYTHON=...)
endif

# The tests that depend most on the version of jax.
across := $(addprefix tests/test_,$(addsuffix .py,transforms sharding lowering decode merge cache schedule batching models deepseek_parts))

.PHONY: demo test test-gpu sanitize lint format clean

demo: $(any)
	$(if $(gpu),,JAX_PLATFORMS=cpu) $(bin)/python examples/decode_loop.py

# Linux's venv has what it takes to compile for an H200: there the tests that do must not be skipped.
# Nor must those that compare with transformers.
test: $(installed)
	JAX_PLATFORMS=cpu JAX_FLASHMLA_REQUIRE_H200_COMPILER=$(if $(filter Linux,$(shell uname)),1) \
	  JAX_FLASHMLA_REQUIRE_TRANSFORMERS=1 \
	  $(bin)/pytest -n auto --maxprocesses 8 -m "not gpu" $(PYTEST_ARGS)

# With another Python, from PATH or from pyenv: make test-on-3.13. Each gets the newest jax that
# there is for it; for 3.11 that is 0.10.2, the oldest supported.
test-on-%:
	for python in python$* $(wildcard $(HOME)/.pyenv/versions/$*.*/bin/python); do \
	  if $$python -c 'import ensurepip' 2> /dev/null; then \
	    $(MAKE) test VENV=.venv-$* PYTHON=$$python EXTRAS=test-core$(cuda) \
	      PYTEST_ARGS="$(across) $(PYTEST_ARGS)"; exit; \
	  fi; \
	done; echo "there is no Python $* with venv" >&2; exit 1

# On a machine with a Hopper GPU; without one it fails.
test-gpu: $(installed)
	JAX_FLASHMLA_REQUIRE_GPU=1 $(bin)/pytest -m gpu $(PYTEST_ARGS)

# With CUDA's compute-sanitizer on PATH. Of a schedule of garbage only the addresses matter.
sanitize: $(installed)
	for run in memcheck synccheck racecheck "memcheck --garbage"; do set -- $$run; \
	  compute-sanitizer --tool $$1 --kernel-regex kns=jax_flashmla --error-exitcode 1 \
	    $(bin)/python tests/sanitizer_sample.py $$2 || exit; \
	done

lint: $(any)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(cxx)

format: $(any)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cxx)

clean:
	rm -rf $(VENV) .venv-* build dist

# The install is editable: a change to Python code needs no other, a change to what is compiled
# makes one. A venv of another Python is made anew.
$(stamp)%: $(compiled)
	[ "$$($(bin)/python -V 2>&1)" = "$$($(PYTHON) -V)" ] || $(PYTHON) -m venv --clear $(VENV)
	rm -f $(VENV)/installed-*
	$(bin)/python -m pip install --verbose --disable-pip-version-check \
	  --config-settings cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON --editable '.[$(subst +,$(comma),$*)]'
	touch $@
