#!/usr/bin/env bash
# Check and time every Triton kernel on this machine's GPU, in under ten minutes:
#     bash experiments/gpu/check.sh [--smoke] [agree] [laws] [bench] [train]
# All stages by default; none stops the others. See README.md beside this.
set -uo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
smoke=() stages=()
for word in "$@"; do
    case $word in
        --smoke) smoke=(--smoke) ;;
        agree | laws | bench | train) stages+=("$word") ;;
        *) sed -n '2,4p' "$0"; exit 2 ;;
    esac
done
[ ${#stages[@]} -gt 0 ] || stages=(agree laws bench train)
asked() { [[ " ${stages[*]} " == *" $1 "* ]]; }

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
if [ -n "${WHEELS:-}" ]; then # a folder of wheels to use without installing them for good
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$parts/site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$parts/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export FLA_DISABLE_BACKEND_DISPATCH=1 # flash-linear-attention's own Triton kernels, whatever else is installed

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")') || exit 1
if [ -z "$gpu" ]; then
    [ ${#smoke[@]} -gt 0 ] || { echo "torch sees no GPU; --smoke runs the scripts in Triton's interpreter"; exit 2; }
    export TRITON_INTERPRET=1
fi
OUT=${OUT:-experiments/gpu/results-${gpu:-smoke}-$(date +%Y-%m-%d)}
mkdir -p "$OUT"
log=$OUT/log.txt
: >"$log"

run() { # name, seconds, script, arguments: its rows go to $parts/name.json
    local name=$1 seconds=$2 script=$3
    shift 3
    echo "== $name" >>"$log"
    timeout -k 5 $((seconds + 15)) "$PYTHON" "experiments/gpu/$script.py" "$parts/$name.json" --seconds "$seconds" \
        "${smoke[@]}" "$@" >"$parts/$name.log" 2>&1
    echo "== $name ended with code $? after ${SECONDS} s" | tee -a "$log"
    cat "$parts/$name.log" >>"$log"
}
report() { "$PYTHON" experiments/gpu/report.py "$parts" "$OUT" >"$parts/report.txt" 2>>"$log"; }

if [ ${#smoke[@]} -gt 0 ]; then
    asked agree && run agree 300 agree
    asked laws && run laws 300 laws
    asked bench && run bench 300 bench
else # what is not timed runs side by side: most of it is compilation, which the kernels' cache keeps
    ops=$("$PYTHON" -c 'from hybridlab.kernels.ops import OPS; print(*(op.name for op in OPS if "triton" in op.versions))')
    for op in $ops; do
        if asked agree; then
            run "agree-$op-fp32" 200 agree --op "$op" --dtype float32 &
            run "agree-$op-bf16" 200 agree --op "$op" --dtype bfloat16 &
        fi
        asked laws && run "laws-$op" 200 laws --op "$op" &
    done
    if asked bench; then
        for family in ssd retention "scalar decay" gla "gated delta" "kimi delta" scan conv; do
            run "warm-${family// /_}" 180 bench --family "$family" --warm &
        done
    fi
    wait
    rm -f "$parts"/warm-*.json
    report
    asked bench && run bench 230 bench
fi
report
asked train && run train 75 training
report
status=$?
tail -n +1 "$parts/report.txt"
echo "results in $OUT"
exit $status
