#!/usr/bin/env bash
# Look at a search in Optuna's dashboard, from the journal that its trials are kept in.
#
#   examples/dashboard.sh GPU DATASET [further flags of stree-tune]
#
# Needs `pip install optuna-dashboard`. One study per batch size; with --measure the journal lies in
# stree-data/studies and can be opened while the search is running.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
gpu=$1 dataset=$2
shift 2
stree-tune --gpu "$gpu" --dataset "$dataset" --storage trials.journal "$@"
exec optuna-dashboard trials.journal
