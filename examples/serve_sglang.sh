#!/usr/bin/env bash
# Start SGLang with the setting that is best over a profile's batch sizes.
#
#   examples/serve_sglang.sh PROFILE TARGET DRAFT [further flags of SGLang]
#
# The export is a launch script by itself; this keeps it beside the profile for a second look.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
profile=$1 target=$2 draft=$3
shift 3

# Exit code 1 says that there is nothing to set: off is best.
code=0
stree-tune export "$profile" --to sglang --target "$target" --draft "$draft" \
    --output sglang.sh --force || code=$?
case $code in
    0) exec sh sglang.sh "$@" ;;
    1) exec python -m sglang.launch_server --model-path "$target" "$@" ;;
    *) exit "$code" ;;
esac
