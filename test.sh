#!/usr/bin/env bash
# The tests, in the environment that setup.sh makes: `bash test.sh`. Flags go to pytest;
# --long also runs the tests that take minutes or wait until something is learned.
set -euo pipefail
cd "$(dirname "$0")"
bash setup.sh --dev
exec "${VENV:-.venv}/bin/python" -m pytest -q "$@"
