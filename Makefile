# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo   the main job on generated data        make test   all tests
# Each makes .venv first; the second time that costs nothing.
.PHONY: demo test pages venv clean-venv
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1

demo: venv
	.venv/bin/penaltyanon demo

test: venv
	$(PY) -m pytest

pages: venv
	$(PY) tools/pages.py

venv: .venv/installed
.venv/installed: constraints.txt settings.ini setup.py
	@for p in $(PYTHON) python3.11 python3 python; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then echo "error: Python 3.11 or newer is needed and none was found; install it or say make PYTHON=/path/to/python" >&2; exit 1; fi; \
	set -e; test -x $(PY) || $$found -m venv .venv; \
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean-venv:
	rm -rf .venv
