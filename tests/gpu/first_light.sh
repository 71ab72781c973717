#!/usr/bin/env bash
# What to run when a GPU is at hand: in ten minutes at most, numerics, trainings, benchmarks and memory.
#
#   tests/gpu/first_light.sh [FOLDER]        (default: bench/first-light)
#
# FOLDER/results.md has the card, the versions and what became of every part, for docs/benchmarks.md; FOLDER/PART.log
# has a part's output. A part that fails or takes too long does not stop the others. The exit status is 1 if one did.
# With FIRST_LIGHT=cpu the same parts run at tiny sizes on a CPU, to prove the script.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
python=${PYTHON:-.venv/bin/python}
limit=${FIRST_LIGHT_SECONDS:-600}
mkdir -p "${1:-bench/first-light}"
out=$(cd "${1:-bench/first-light}" && pwd)
results=$out/results.md
failures=0

# part NAME SECONDS COMMAND...: run a part for at most so long, and write a line about it.
part() {
    local name=$1 seconds=$2 began=$SECONDS status=0 verdict
    local left=$((limit - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        verdict="skipped: no time is left"
        status=1
    else
        [ "$left" -lt "$seconds" ] && seconds=$left
        echo "== $name, at most $seconds s"
        timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
        case $status in
            0) verdict=ok ;;
            124 | 137) verdict="not finished in $seconds s" ;;
            *) verdict="FAILED, exit status $status" ;;
        esac
    fi
    [ "$status" = 0 ] || failures=$((failures + 1))
    echo "   $verdict"
    echo "| $name | $verdict | $((SECONDS - began)) s |" >>"$results"
}

# excerpt NAME: the end of a part's output, for the results.
excerpt() {
    [ -s "$out/$1.log" ] || return 0
    {
        echo
        echo "### $1"
        echo
        echo '```'
        tail -n 40 "$out/$1.log"
        echo '```'
    } >>"$results"
}

longspan=("$python" -m longspan)
alone=(launch.processes=1 parallel.cp=1 parallel.ep=1 parallel.tp=1 parallel.pp=1 evaluation.interval=0)
if [ "${FIRST_LIGHT:-gpu}" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
    device=h100
    numerics=(tests/attention/test_rotary.py)
    steps=2
    sizes=(--lengths "256,512" --heads 2 --head-dim 16 --repeats 1)
    softmax=(--backend torch --kv-heads 1)
    model=(quickstart model.num_hidden_layers=4 training.seq_length=512)
else
    device=$("$python" tests/gpu/describe.py device)
    numerics=(-m gpu)
    steps=30
    sizes=(--lengths "32768,131072" --heads 32 --head-dim 128 --repeats 3)
    softmax=(--backend triton --kv-heads 8)
    model=(s2-llama-1.3b model.num_hidden_layers=4)
fi
model+=(
    "${alone[@]}" "data.sources={python-stdlib: 1.0}" data.validation=null data.tokenizer=bytes
    evaluation.ngram_baseline=false evaluation.sample_prompt=null run_dir="$out/memory"
    training.steps=4 training.micro_batch_size=1 training.global_batch_size=2 lr_scheduler.warmup_steps=1
    metrics.log_interval=1
)

{
    echo "# First light, $(date -u +%Y-%m-%d)"
    echo
    "$python" tests/gpu/describe.py machine
    echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
    echo "| part | | took |"
    echo "| --- | --- | --- |"
} >"$results"
rm -rf "$out/quickstart" "$out/experts" "$out/memory" "$out/rehearsal.json"

part doctor 60 "${longspan[@]}" doctor --folder "$out"
part numerics 180 "$python" -m pytest -q -n0 -p no:cacheprovider "${numerics[@]}"
part quickstart 60 "${longspan[@]}" train quickstart "${alone[@]}" evaluation.ngram_baseline=false \
    training.steps="$steps" run_dir="$out/quickstart"
part experts 60 "${longspan[@]}" train minimax-01-tiny "${alone[@]}" training.steps="$steps" run_dir="$out/experts"
part attention 100 "${longspan[@]}" bench attention --pattern 'S2(64, 16, 16)' "${softmax[@]}" "${sizes[@]}" --out "$out"
part linear 100 "${longspan[@]}" bench linear --mixer lightning --mixer gla --mixer gated_deltanet \
    --dense-up-to 32768 "${sizes[@]}" --out "$out"
part memory 60 "${longspan[@]}" train "${model[@]}"
part plan 30 "${longspan[@]}" plan "${model[@]}" --device "$device" -o "$out/plan.png"
part rehearsal 90 env CUDA_VISIBLE_DEVICES= "${longspan[@]}" rehearse "${model[@]}" --device "$device" \
    --json "$out/rehearsal.json"

"$python" tests/gpu/describe.py memory "$out" >>"$results"
for name in doctor numerics quickstart experts attention linear; do
    excerpt "$name"
done
echo "$results; $failures of 9 parts did not succeed"
[ "$failures" = 0 ]
