#!/usr/bin/env bash
# How this folder was made, with commit 451e9d8: bash make.sh, in /tmp/m2f-past, with PYTHONPATH at that commit.
rm -f train.log
set -euo pipefail
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
m2f() { python -m cluster.cli "$@"; }
rm -rf shards runs dumps exported
m2f shard recipe.yaml
python -m cluster.cli train recipe.yaml --plain > train.log 2>&1 & run=$!
until grep -q "^step 1200" train.log; do sleep 0.05; done
kill -INT $run
wait $run
m2f eval recipe.yaml --dump dumps
m2f export recipe.yaml --format onnx --size 64 64 --output exported/model.onnx
gzip -9 exported/model.onnx
rm -r runs/past/traces train.log
find runs -name "*.html" -delete
