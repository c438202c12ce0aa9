#!/usr/bin/env bash
# What the project does on an H100, in the order of its worth, within 540 s. In the root of a checkout:
#
#   bash benchmarks/gpu_check.sh
#   PARTS="2 9" bash benchmarks/gpu_check.sh     # some of its parts
#
# collect_wheels.sh, run before in the checkout's root, has filled .whl/; the machine with the GPU needs no network, but
# Python 3.12, torch 2.11 and transformers 5.17; OUT names the folder for results. Every part has a limit of its own and
# may fail alone; its output is in $OUT/log.txt, its figures are JSON lines in $OUT/results.jsonl, kernels in
# $OUT/profile.txt, the demo's steps in $OUT/metrics.jsonl. The last thing printed is a table of all figures.
# Without a GPU (OUT=/tmp/o W=/tmp/w LIMIT=3000 bash benchmarks/gpu_check.sh) the same parts run with tiny shapes.
#
# Seconds on an H100: 1 install 12 | 2 demo 65, resumed 20 | 3 tests 45 | 4 memory 25 | 5 longest completion 60 | 6 variants
# 60 | 7 compare: ours 45, with small micro-batches 45, TRL 55 | 8 0.5B 25 | 9 1.5B 50 | 10 SmolLM2 on word problems, if
# examples/smollm2 is there, 90 | 11 the same beside TRL 90; what is left over when LIMIT is up is skipped.
set -u
test -f grpo_train.py || { echo "run this in the root of the checkout"; exit 2; }
SECONDS=0
OUT=${OUT:-/tmp/out} W=${W:-/tmp/work} SITE=${SITE:-/tmp/site} LIMIT=${LIMIT:-530}
mkdir -p "$OUT" "$W/bin" "$W/v"
PROBE=benchmarks/gpu_probe.py
LOG=$OUT/log.txt
export OUT W RESULTS=$OUT/results.jsonl GPU_CHECK=$$
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false NCCL_DEBUG=WARN TQDM_MININTERVAL=5
test -n "${PARTS:-}" || rm -f "$LOG" "$RESULTS"
touch "$LOG" "$RESULTS"

note() { echo "[$SECONDS s] $*" | tee -a "$LOG"; }
say() { echo "$1" | tee -a "$LOG" >>"$RESULTS"; }
sweep() {  # what a part has left on the GPU, if this script started it
    local pid
    for pid in $(nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null); do
        grep -qz "^GPU_CHECK=$$\$" "/proc/$pid/environ" 2>/dev/null && kill -9 "$pid" && note "ended $pid, left over"
    done
    true
}
wants() { [[ " ${PARTS:-$1} " == *" $1 "* ]]; }
part() {  # NAME LIMIT COMMAND...; the name begins with its number
    wants "${1%% *}" || return 1
    local name=$1 limit=$2 began=$SECONDS code rest=$(( LIMIT - SECONDS - 8 )); shift 2
    if (( limit > rest )); then limit=$rest; fi
    if (( limit < 15 )); then note "$name: no time left"; say "{\"part\": \"$name\", \"code\": \"no time\"}"; return 1; fi
    note "== $name, at most $limit s"
    timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1; code=$?
    say "{\"part\": \"$name\", \"code\": $code, \"seconds\": $(( SECONDS - began ))}"
    note "   $name ended with $code"
    sweep
    return $code
}

# ------------------------------------------------------------------------------------------------ 1. what is there
if ! test -d "$SITE" && ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl >>"$LOG" 2>&1
    say "{\"part\": \"1 install\", \"code\": $?, \"seconds\": $SECONDS}"
fi
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PATH=$W/bin:$SITE/bin:$PATH
if ! python -c "import torch" 2>/dev/null; then printf '#!/bin/sh\nexec python3 "$@"\n' >"$W/bin/python"; chmod +x "$W/bin/python"; fi
{ nvidia-smi; nproc; free -g; df -h /tmp; command -v python python3 deepspeed nvcc gcc; } >>"$LOG" 2>&1
part "1 versions" 60 python -c "
import json, os, platform, torch
from importlib.metadata import version
print(json.dumps({'part': 'versions', 'python': platform.python_version(), **{name: version(name) for name in (
    'torch', 'transformers', 'deepspeed', 'numpy', 'accelerate', 'peft', 'trl')}, 'cuda': torch.version.cuda,
    'cudnn': torch.backends.cudnn.version(), 'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None}),
    file=open(os.environ['RESULTS'], 'a'))"
if python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then GPU=1; else GPU=; fi
if test -n "$GPU"; then SHAPE=0.5b VOCAB=151936 PROMPTS=8 TOKENS=512 STEPS=3 THREADS=4; else
    SHAPE=small VOCAB=512 PROMPTS=1 TOKENS=8 STEPS=2 THREADS=1; export OMP_NUM_THREADS=1; fi
touch -c examples/arithmetic/model/config.json  # newer than its script, or the tests would build it again
test -f examples/arithmetic/model/config.json || PARTS= part "1 embedded model" 120 python examples/arithmetic.py  # if not carried
# The model of parts 4 and 7, by the CPU meanwhile (20 s).
BUILD=
if ! test -d "$W/model" && { wants 4 || wants 7; }; then
    CUDA_VISIBLE_DEVICES= timeout 150 python -c "
import sys; sys.path[:0] = ['benchmarks']
from pathlib import Path
import compare
compare.build(Path('$W/making'), $VOCAB, 'exact', shape='$SHAPE')
Path('$W/making').rename('$W/model')" >"$W/build.log" 2>&1 &
    BUILD=$!
fi

# ------------------------------------------------------------------------------------------------ 2. the main job, and going on with it
if test -n "$GPU"; then
    part "2 demo" 120 bash examples/demo.sh "$W/demo" STEPS=12
else  # another port, since this machine is shared
    part "2 demo" 400 bash -c 'python ref_server.py PORT=59991 & trap "kill $!" EXIT
        deepspeed --log_level warning --master_port 29801 --num_accelerators 1 grpo_train.py OUTPUT_DIR=$W/demo STEPS=2 \
            EVAL_EVERY=0 REF_SERVER=http://127.0.0.1:59991'
fi
if test -n "$GPU" && wants 2; then
    python $PROBE demo "$W/demo" >>"$LOG" 2>&1
    part "2 resumed" 60 bash examples/demo.sh "$W/demo" STEPS=20
fi
wants 2 && python $PROBE demo "$W/demo" >>"$LOG" 2>&1; cp "$W/demo/metrics.jsonl" "$OUT/" 2>/dev/null

# ------------------------------------------------------------------------------------------------ 3. tests, 4. memory, 5. the longest completion
test -n "$BUILD" && wait $BUILD; cat "$W/build.log" >>"$LOG" 2>/dev/null
part "3 tests" $(test -n "$GPU" && echo 90 || echo 300) env ON_GPU=1 python -m pytest -q -s -p no:cacheprovider \
    -k "not zero_stage and not first_update_starts_at_the_reference[transformers]" tests/test_gpu.py
# Micro-batches of a million tokens: the first that fits, found before the first step (here there is none).
part "4 memory" $(test -n "$GPU" && echo 60 || echo 200) python grpo_train.py MODEL="$W/model" DATASET="$W/model/data.jsonl" \
    OUTPUT_DIR="$W/memory" BETA=0 STEPS=0 EVAL_EVERY=0 SAVE_EVERY=0 PROMPTS_PER_STEP=128 \
    MAX_COMPLETION_TOKENS=896 MICRO_BATCH_TOKENS=$(test -n "$GPU" && echo 1000000 || echo 4000)
part "5 longest completion" $(test -n "$GPU" && echo 150 || echo 100) python benchmarks/gpu.py parts=longest \
    $(test -n "$GPU" && echo shape=1.5b || echo shape=small tokens=16)

# ------------------------------------------------------------------------------------------------ 6. every path of the trainer
# Two steps of each on the embedded model, in one process. One that fails ends that process; the others get another.
COMMON="BETA=0 REF_SERVER=http://127.0.0.1:9 STEPS=2 WARMUP_STEPS=0 EVAL_EVERY=0 SAVE_EVERY=0"
declare -A WAY=([zero1]="" [eager]="SAMPLER=transformers" [float32]="DTYPE=float32" [zero2]="ZERO_STAGE=2" [zero3]="ZERO_STAGE=3"
    [checkpointing]="GRADIENT_CHECKPOINTING=True" [lora]="LORA_RANK=8 LR=5e-4" [micro]="MICRO_BATCH_TOKENS=1024"
    [gspo]="IMPORTANCE=sequence UPDATES_PER_BATCH=2" [zero3save]="ZERO_STAGE=3 SAVE_EVERY=2")
TODO=(zero1 eager zero3 float32 zero2 checkpointing lora micro gspo zero3save)
test -n "$GPU" || TODO=(zero1 eager zero3)
DONE=("${TODO[@]}")
wants 6 && for _ in 1 2 3; do
    (( ${#TODO[@]} )) || break
    TURNS=()
    for name in "${TODO[@]}"; do TURNS+=(-- "OUTPUT_DIR=$W/v/$name" ${WAY[$name]}); done
    part "6 variants ${TODO[*]}" $(test -n "$GPU" && echo 80 || echo 400) python tests/in_turn.py $COMMON "${TURNS[@]}" && break
    LEFT=() FAILED=
    for name in "${TODO[@]}"; do  # the first that has not two steps is the one that failed
        if test "$(grep -c '"step": 2' "$W/v/$name/metrics.jsonl" 2>/dev/null)" = 1; then continue; fi
        if test -z "$FAILED"; then FAILED=$name; note "   $name failed"; else LEFT+=("$name"); fi
    done
    TODO=("${LEFT[@]}")
done
wants 6 && python $PROBE variants "${DONE[@]/#/$W/v/}" >>"$LOG" 2>&1

# ------------------------------------------------------------------------------------------------ 7. beside TRL
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1  # for TRL too: without it torch 2.11 plans attention anew at each decoded token
for program in ours ours:MICRO_BATCH_TOKENS=1024 trl; do
    part "7 compare $program" $(test -n "$GPU" && echo 110 || echo 300) bash -c \
        "python benchmarks/compare.py run $program $W/model $STEPS $PROMPTS $TOKENS exact $THREADS >$W/$program.json" &&
        python $PROBE compare $program "$W/$program.json" >>"$LOG" 2>&1
done

# ------------------------------------------------------------------------------------------------ 8. 0.5B, 9. 1.5B
part "8 shape 0.5b" 100 python $PROBE shape 0.5b
part "9 shape 1.5b" 170 python $PROBE shape 1.5b

# ------------------------------------------------------------------------------------------------ 10. SmolLM2 on word problems
if test -d examples/smollm2; then
    if test -n "$GPU"; then
        part "10 smollm2" 200 bash examples/smollm2.sh words "$W/smollm2" EVAL_EVERY=5
    else
        part "10 smollm2" 400 bash examples/smollm2.sh words "$W/smollm2" STEPS=1 EVAL_EVERY=0 PROMPTS_PER_STEP=1
    fi
    if wants 10; then
        python $PROBE demo "$W/smollm2" >>"$LOG" 2>&1
        cp "$W/smollm2/metrics.jsonl" "$OUT/smollm2.jsonl"; cp "$W"/smollm2/evaluation.* "$OUT/"
    fi
    test -n "$GPU" && for program in ours trl; do
        part "11 smollm2 until +20 points, $program" 120 bash -c \
            "python benchmarks/learning.py run $program smollm2 0.335 >$W/learning_$program.json" &&
            python $PROBE compare "learning $program" "$W/learning_$program.json" >>"$LOG" 2>&1
    done
fi

note "done"
python $PROBE table
