#!/usr/bin/env bash
# The main job on the built-in model, each command line printed before it runs. Works in a new folder, demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf demo
mkdir demo
export PATH="$PWD/.venv/bin:$PATH"
cd demo

run() {
  printf '\n$ %s\n' "$1"
  bash -c "set -o pipefail; $1"
}

run 'python ../scripts/make_products.py reddot.csv'
run 'head -n 2 reddot.csv'
run 'ftkit prep reddot.csv --template alpaca > train.jsonl'
run 'ftkit estimate-memory --qlora --r 8 --targets all-linear --gpu t4'
run 'ftkit train train.jsonl --qlora --r 8 --targets all-linear'
run 'ftkit eval --baseline > predictions.jsonl'
run 'head -n 2 predictions.jsonl | python ../scripts/side_by_side.py'
run 'ftkit merge'
run 'echo "Write the description. product: Veltano Arc; category: Table Lamp" | ftkit chat'
