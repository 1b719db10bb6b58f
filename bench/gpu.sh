#!/usr/bin/env bash
# Everything that a GPU is needed for, in one call of less than nine minutes: tests on the device, ops, memory, training,
# profiles, and a report. Each part has a time limit of its own; one that fails or hangs does not lose the others.
#
#   OUT=out bash bench/gpu.sh
#
# OUT             folder of what comes out: summary.txt, tests.log, bench.log, profile.log, the results as JSON lines,
#                 report.html; eight files, all but the last written as it goes               default bench/results/gpu
# WHEELS          folder of wheels to put on the path first (peers and what is missing here; nothing is downloaded)
# DEVICE          cuda or cpu; cpu tries the script out                                        default cuda
# PYTHON          the interpreter                                                              default python3
# SECONDS_IN_ALL  time for everything                                                          default 510
# PARTS           which of: tests ops memory train profile                                     default all
# QUICK           set: one round of a few cases of each part
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results/gpu}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-510}
PARTS=" ${PARTS:-tests ops memory train profile} "
QUICK=${QUICK:-}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
SPARE=$(mktemp -d)
trap 'rm -rf "$SPARE"' EXIT
SUMMARY=$OUT/summary.txt
: >"$SUMMARY"
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SECONDS=0 RESERVE=0 FAILED=

say() { echo "[$SECONDS s] $*" | tee -a "$SUMMARY"; }

# part LOG LIMIT COMMAND...: at most LIMIT seconds, and no more than are left when the later parts keep their RESERVE;
# output is appended to OUT/LOG.log.
part() {
    local log=$OUT/$1.log limit=$2 left=$((SECONDS_IN_ALL - RESERVE - SECONDS)) began=$SECONDS code
    shift 2
    if ((left < 5)); then
        say "skipped, no time left: $*"
        FAILED=1
        return 0
    fi
    ((limit > left)) && limit=$left
    echo "+ $*" >>"$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    ((code == 124 || code == 137)) && say "STOPPED after $limit s: $*" || say "exit $code in $((SECONDS - began)) s: $*"
    ((code == 0)) || FAILED=1
    return 0
}

wanted() { [[ $PARTS == *" $1 "* ]]; }
# bench LOG LIMIT COMMAND...: one of the benchmark's commands.
bench() { part "$1" "$2" "$PYTHON" -W ignore -m bench "${@:3}" --device "$DEVICE"; }
# ops LIMIT PATTERN...: the cases of that name, recorded.
ops() { bench bench "$1" ops --only "$2" "${@:3}" --record --results "$OUT"; }

# --- what is here ------------------------------------------------------------------------------------------------------
if [[ -n ${WHEELS:-} ]]; then
    part bench 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$SPARE/site" "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$SPARE/site
fi
command -v nvidia-smi >/dev/null && part bench 20 nvidia-smi
command -v nvcc >/dev/null && part bench 20 nvcc --version
# The extension is built where it is missing; Triton and torch serve where that fails.
if ! "$PYTHON" -c "import fastalign._C" >/dev/null 2>&1; then
    part bench 150 "$PYTHON" setup.py build_ext --inplace
fi
part bench 60 "$PYTHON" -m fastalign info

# --- tests -------------------------------------------------------------------------------------------------------------
RESERVE=330
if wanted tests; then
    each=()
    "$PYTHON" -c "import pytest_timeout" 2>/dev/null && each=(--timeout 60)
    chosen=(tests -m gpu)
    [[ -n $QUICK ]] && chosen=(tests/test_layers.py)
    part tests 130 "$PYTHON" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${each[@]}" "${chosen[@]}"
fi

# --- ops: several processes, so that a broken device context ends one of them; each case is recorded when it is done -------
RESERVE=110
if wanted ops; then
    if [[ -n $QUICK ]]; then
        ops 60 'few,one-row,gae-one' --rounds 1 --no-compile
    else
        ops 100 'linear_loss-131072,linear_loss-qwen3-8b,linear_loss-frozen,linear_logps,adapter' --seconds 3 --no-compile
        ops 60 'token_logps,policy_loss,preference_loss' --seconds 2 --no-compile
        ops 40 'entropy-forward-131072,policy_loss-131072,linear_loss-131072' --seconds 2  # torch.compile, slow to start
        ops 40 'linear_loss-dpo,linear_loss-grpo,masked,llama3,gemma2,small,few' --seconds 2 --no-compile
        ops 25 'divergence' --seconds 1 --no-compile
        ops 20 'gae,segment_scan,attention' --seconds 1 --no-compile
    fi
fi

# --- memory, training, profiles -------------------------------------------------------------------------------------------
RESERVE=80
if wanted memory; then
    chosen=(--only 'linear_loss-131072,linear_loss-dpo-long' --who 'fastalign,TRL,Liger')
    [[ -n $QUICK ]] && chosen=(--only linear_loss-few --who fastalign --toy)
    bench bench 60 memory "${chosen[@]}" --no-compile --record --results "$OUT"
fi
RESERVE=30
if wanted train; then
    chosen=(--model 0.5b --dtype bfloat16 --steps 12)
    [[ -n $QUICK ]] && chosen=(--steps 3 --examples 2 --peer none)
    bench bench 90 train "${chosen[@]}" --record --results "$OUT"
fi
RESERVE=0
if wanted profile; then
    cases='linear_loss-131072,linear_loss-frozen-131072,policy_loss-131072,token_logps-entropy-backward-qwen3'
    [[ -n $QUICK ]] && cases=linear_loss-few
    bench profile 60 ops --only "$cases" --rounds 1 --no-compile --profile
fi

# --- the report of whatever was recorded ----------------------------------------------------------------------------------
SECONDS_IN_ALL=$((SECONDS_IN_ALL + 25))
part bench 25 "$PYTHON" -m bench report --results "$OUT" --out "$SPARE/report"
[[ -e $SPARE/report/index.html ]] && cp "$SPARE/report/index.html" "$OUT/report.html"
say "done: $(ls "$OUT" | tr '\n' ' ')"
[[ -z $FAILED ]]
