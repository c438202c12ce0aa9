#!/usr/bin/env bash
# SmolLM2 learns to solve word problems, or to write 200 characters as in TRL's tutorial: training, then an evaluation
# of before and after.
#   examples/smollm2.sh words OUTPUT_DIR [NAME=value ...]
#   examples/smollm2.sh length OUTPUT_DIR [NAME=value ...]
set -euo pipefail
task=$1 output=$2
shift 2
here=examples/smollm2
case $task in
words)  # the second reward ends the habit of explaining until the limit
    asked=(EVAL_DATASET=$here/heldout.jsonl SYSTEM_PROMPT="Answer with one short calculation." MAX_COMPLETION_TOKENS=32
        REWARDS=examples.smollm2:reward_number,0.3*examples.smollm2:reward_form)
    training=(DATASET=$here/train.jsonl STEPS=40 EVAL_EVERY=10 PROMPTS_PER_STEP=8 LR=1e-5 WARMUP_STEPS=3) ;;
length)
    asked=(EVAL_DATASET=$here/topics-heldout.jsonl SYSTEM_PROMPT= MAX_COMPLETION_TOKENS=96 REWARDS=reward_len)
    training=(DATASET=$here/topics.jsonl STEPS=20 EVAL_EVERY=5 PROMPTS_PER_STEP=4 LR=2e-5 WARMUP_STEPS=2) ;;
*)
    echo "task $task: expected words or length" >&2
    exit 2 ;;
esac
start=$here/model
for argument; do  # the evaluation asks as the training does
    case $argument in
    MODEL=*) start=${argument#*=} ;;
    DTYPE=* | EVAL_DATASET=* | QUESTION_COLUMN=* | SYSTEM_PROMPT=* | REWARDS=* | TEMPERATURE=* | MAX_PROMPT_TOKENS=* | \
        MAX_COMPLETION_TOKENS=* | TRUST_REMOTE_CODE=*) asked+=("$argument") ;;
    esac
done
python examples/smollm2.py
examples/demo.sh "$output" MODEL=$here/model "${asked[@]}" "${training[@]}" BETA=0.02 MICRO_BATCH_TOKENS=2048 "$@"
last=$(ls -d "$output"/step_* | sort -V | tail -1)
python -m grpo.evaluate MODEL="$start,$last" "${asked[@]}" EVAL_SAMPLES=2 OUTPUT_DIR="$output"
if [ "$task" = length ]; then python examples/smollm2.py "$output/evaluation.jsonl"; fi
