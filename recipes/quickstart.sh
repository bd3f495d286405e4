#!/usr/bin/env bash
# Install into .venv and fine-tune the embedded model on the embedded data: about two minutes of training on two cores.
# Arguments are passed on: bash recipes/quickstart.sh --train_file mine.csv --output_dir runs/mine
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/venv.sh
make_venv .venv recipes
exec .venv/bin/python recipes/text_classification.py "$@"
