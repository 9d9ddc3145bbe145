#!/usr/bin/env bash
# Measure trees live with one worker per GPU of this machine, all in one study on PostgreSQL.
#
#   examples/many_workers.sh postgresql://USER@HOST/DATABASE TARGET DRAFT DATASET GPU
#
# Start it on as many machines with this kind of GPU as there are: who asks the same question joins
# the same study. Needs `pip install 'stree-tune[postgres]'`, a table and a trace of the pair. Each worker
# writes a profile from all trials; they are equal but for who made them.
set -euo pipefail

if [ $# -ne 5 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
storage=$1 target=$2 draft=$3 dataset=$4 gpu=$5
workers=()
for device in $(nvidia-smi --query-gpu=index --format=csv,noheader); do
    CUDA_VISIBLE_DEVICES=$device stree-tune --gpu "$gpu" --dataset "$dataset" \
        --target "$target" --draft "$draft" --measure --storage "$storage" \
        --output "stree-profile-$device.yaml" --force &
    workers+=($!)
done
failed=0
for worker in "${workers[@]}"; do
    wait "$worker" || failed=1
done
exit "$failed"
