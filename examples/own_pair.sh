#!/usr/bin/env bash
# Tune a pair of your own on the GPU of this machine, and check the answer live.
#
#   examples/own_pair.sh TARGET DRAFT PROMPTS.jsonl GPU
#
# TARGET and DRAFT are model folders or Hugging Face ids, PROMPTS has one JSON object a line with
# `prompt`, `question` or `turns`, GPU is a short name such as h200. Tables and traces go to
# ./stree-data, the answer to ./stree-profile.yaml and ./report.html.
set -euo pipefail

if [ $# -ne 4 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
target=$1 draft=$2 prompts=$3 gpu=$4
pair=(--target "$target" --draft "$draft")

# Once per GPU and pair of shapes: minutes.
stree-tune probe --gpu "$gpu" "${pair[@]}"

# Once per kind of text; 64 prompts are the least for an interval that can be believed.
stree-tune trace "${pair[@]}" --dataset mine --prompts "$prompts" --max-new-tokens 256

# Seconds, on any machine that has ./stree-data.
stree-tune --gpu "$gpu" "${pair[@]}" --dataset mine

# Predicted against measured, for the record and the report.
stree-tune validate "${pair[@]}" --dataset mine --prompts "$prompts" --limit 64 --write
stree-tune report stree-profile.yaml
