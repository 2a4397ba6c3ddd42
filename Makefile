# What a change must pass besides its tests. CI runs `make checks`; each part can be run alone.
#
#   make checks    all of them
#   make lint      ruff check
#   make format    ruff format, which writes; `make checks` only compares
#   make types     mypy, set up in pyproject.toml
#   make law       which room may import which
#   make docs      the documentation
#
# The environment is that of tools/setup_env.sh with the extras `dev`, `docs` and `test`; make LCCP_PYTHON=... takes
# another interpreter.

extras = $${LCCP_EXTRAS:+$$LCCP_EXTRAS,}dev,docs,test
LCCP_PYTHON = $(or $(shell LCCP_EXTRAS=$(extras) bash tools/setup_env.sh),$(error no environment))

SOURCES = megatron_lccp tests tools examples setup.py

.PHONY: checks lint format format-check types law docs
checks: lint format-check types law docs

lint:
	$(LCCP_PYTHON) -m ruff check .

format:
	$(LCCP_PYTHON) -m ruff format $(SOURCES)

format-check:
	$(LCCP_PYTHON) -m ruff format --check $(SOURCES)

types:
	$(LCCP_PYTHON) -m mypy

law:
	$(LCCP_PYTHON) -m pytest -q tests/test_import_law.py

docs:
	bash tools/build_docs.sh
