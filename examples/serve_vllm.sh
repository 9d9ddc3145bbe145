#!/usr/bin/env bash
# Start vLLM with a profile's chains; where the profile says off, without speculation.
#
#   examples/serve_vllm.sh PROFILE TARGET DRAFT [further flags of vllm serve]
#
# TARGET and DRAFT are what vLLM loads: folders or Hugging Face ids. What vLLM cannot run, such as
# a tree, gives way to the fastest chain, with a note on stderr.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
profile=$1 target=$2 draft=$3
shift 3

# Exit code 1 says that there is nothing to set: off is best.
code=0
config=$(stree-tune export "$profile" --to vllm --target "$target" --draft "$draft") || code=$?
case $code in
    0) exec vllm serve "$target" --speculative-config "$config" "$@" ;;
    1) exec vllm serve "$target" "$@" ;;
    *) exit "$code" ;;
esac
