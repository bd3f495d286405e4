#!/usr/bin/env bash
# Install into .venv-test and run every test. At each save: .venv-test/bin/pytest -n 2 -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/venv.sh
make_venv "${VENV:-.venv-test}" test
export HF_HUB_OFFLINE=1
exec "${VENV:-.venv-test}/bin/python" -m pytest -n 2 "$@"
