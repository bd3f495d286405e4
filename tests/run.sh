#!/usr/bin/env bash
# Install into .venv-test and run the tests, all but the slow ones; arguments go to pytest: bash tests/run.sh -m slow
# TRANSFORMERS=4.57.6 tests another release. At each save: .venv-test/bin/pytest -n 2 -m "not slow and not trains"
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/venv.sh
. recipes/debian.sh
make_venv "${VENV:-.venv-test}" test ${TRANSFORMERS:+"transformers==$TRANSFORMERS"}
python="${VENV:-.venv-test}/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps -r tests/no_deps.txt
debian_packages "${VENV:-.venv-test}" dataset-fashion-mnist asterisk-core-sounds-en asterisk-core-sounds-en-wav
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # in recipes and notebooks that a test starts: threads of two at a time spin against each other
[ $# -gt 0 ] || set -- -m "not slow"
exec "$python" -m pytest -n 2 --dist loadgroup "$@"
