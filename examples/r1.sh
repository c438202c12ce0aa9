#!/usr/bin/env bash
# The four stages of DeepSeek-R1 (arXiv 2501.12948, section 2.3), made of commands, on the embedded model.
#   examples/r1.sh [NAME=value ...]      any constant below; the same command goes on where it was interrupted
#   examples/r1.sh MODEL=... DATASET=... EVAL_DATASET=... SOLUTIONS=... ANNOTATOR=... OUTPUT_DIR=...     with your own
set -euo pipefail

MODEL=examples/arithmetic/model  # local folder or hub name
DATASET=examples/arithmetic/train.jsonl
EVAL_DATASET=examples/arithmetic/heldout.jsonl
SOLUTIONS=  # clean ones, in a column `solution`; empty: DATASET's own, or those that examples/steps.py writes
QUESTIONS=  # those that are answered SAMPLES times in (c) and (d); empty: the first QUESTION_ROWS of DATASET
ANNOTATOR=examples.steps:reward_steps  # stands for people who compare completions: no policy is rewarded by it
RULES=reward_correct,reward_format
QUESTION_COLUMN=question
SYSTEM_PROMPT="First reason between <think> and </think>, then give the answer between <answer> and </answer>."
OUTPUT_DIR=runs/r1
TRAINER=python  # or "deepspeed --num_gpus 4"
PORT=59875  # of the reference server
COLD_ROWS=300
COLD_STEPS=4
COLD_LR=1e-4
RL_STEPS=40  # of (b), to a plateau
QUESTION_ROWS=400
SAMPLES=4
SFT_STEPS=80
SFT_LR=5e-4
JUDGE_STEPS=60
JUDGE_LR=5e-4
JUDGE_WEIGHT=0.5  # of the reward model beside RULES
LAST_STEPS=20  # of (d); the control takes RL_STEPS + LAST_STEPS
LR=5e-5  # of GRPO
BETA=0.005
MAX_PROMPT_TOKENS=128
MAX_COMPLETION_TOKENS=64
EVAL_SAMPLES=4
GRPO=  # more constants of grpo_train.py, with spaces between

mapfile -t names < <(sed -n '/^MODEL=/,/^GRPO=/s/^\([A-Z_]*\)=.*/\1/p' "$0")
for argument; do
  if [[ $argument != *=* || " ${names[*]} " != *" ${argument%%=*} "* ]]; then
    echo "unknown constant $argument: write NAME=value with one of ${names[*]}" >&2
    exit 1
  fi
  declare "$argument"
done

cd "$(dirname "$0")/.."
mkdir -p "$OUTPUT_DIR"
settings=$(for name in "${names[@]}"; do echo "$name=${!name}"; done)
if [[ -e $OUTPUT_DIR/settings && $settings != "$(< "$OUTPUT_DIR/settings")" ]]; then
  echo "OUTPUT_DIR=$OUTPUT_DIR holds another run of this recipe: choose another" >&2
  diff "$OUTPUT_DIR/settings" - <<< "$settings" >&2 || exit 1
fi
echo "$settings" > "$OUTPUT_DIR/settings"
export TRAINER  # for demo.sh

# What it is, what it leaves when it is done, and its command.
run() {
  local name=$1 result=$2
  if [[ ! -e $result ]]; then
    printf '\n=== %s\n' "$name"
    if ! "${@:3}" || [[ ! -e $result ]]; then
      echo "$name failed or was stopped, see above; the same command goes on there" >&2
      exit 1
    fi
  fi
}

common=("QUESTION_COLUMN=$QUESTION_COLUMN" "SYSTEM_PROMPT=$SYSTEM_PROMPT")
limits=("MAX_PROMPT_TOKENS=$MAX_PROMPT_TOKENS" "MAX_COMPLETION_TOKENS=$MAX_COMPLETION_TOKENS")
sft() {  # rows, folder, constants
  run "supervised fine-tuning: $2" "$2" $TRAINER examples/sft.py "${common[@]}" MODEL="$MODEL" DATASET="$1" \
    OUTPUT_DIR="$2" MAX_TOKENS=$((MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS)) "${@:3}"
}
grpo() {  # model, folder, steps, rewards
  run "GRPO: $2" "$2/step_$3" examples/demo.sh "$2" "${common[@]}" "${limits[@]}" MODEL="$1" STEPS="$3" REWARDS="$4" \
    REF_SERVER="http://127.0.0.1:$PORT" DATASET="$DATASET" EVAL_DATASET="$EVAL_DATASET" LR="$LR" BETA="$BETA" $GRPO
}
answers() {  # model, questions, folder, samples, rewards
  run "completions: $3" "$3/evaluation.html" python -m grpo.evaluate "${common[@]}" "${limits[@]}" MODEL="$1" \
    EVAL_DATASET="$2" OUTPUT_DIR="$3" EVAL_SAMPLES="$4" REWARDS="$5"
}

# The questions and the clean solutions.
embedded=examples/arithmetic/train.jsonl
if [[ -z $QUESTIONS ]]; then
  QUESTIONS=$OUTPUT_DIR/questions.jsonl
  python -m grpo.data "$DATASET" "$QUESTION_ROWS" > "$QUESTIONS"
fi
if [[ -z $SOLUTIONS && $DATASET == "$embedded" ]]; then
  SOLUTIONS=$OUTPUT_DIR/solutions.jsonl
  run "clean solutions" "$SOLUTIONS" python examples/steps.py ROWS="$COLD_ROWS" SOLUTIONS="$SOLUTIONS"
fi
SOLUTIONS=${SOLUTIONS:-$DATASET}
start=$MODEL cold=$OUTPUT_DIR/a_cold_start rl=$OUTPUT_DIR/b_rl new=$OUTPUT_DIR/c_sampled last=$OUTPUT_DIR/d_rl
control=$OUTPUT_DIR/only_rl

# (a) Cold start: a few clean solutions show the form in which the policy is to reason, before it explores.
sft "$SOLUTIONS" "$cold/model" STEPS="$COLD_STEPS" LR="$COLD_LR"

# (b) GRPO with rules finds out by itself which reasoning leads to right answers.
grpo "$cold/model" "$rl/run" "$RL_STEPS" "$RULES"

# (c) Rejection sampling: the start learns anew, from the best that (b) writes, without what (b) unlearned on its way.
answers "$rl/run/step_$RL_STEPS" "$QUESTIONS" "$new/completions" "$SAMPLES" "$RULES"
run "rejection sampling" "$new/kept.jsonl" python examples/rejection_sample.py \
  EVALUATION="$new/completions/evaluation.jsonl" SOLUTIONS="$new/kept.jsonl"
sft "$new/kept.jsonl" "$new/model" STEPS="$SFT_STEPS" LR="$SFT_LR"

# (d) GRPO with rules and a reward model: what people prefer, beyond what rules see.
# The policies of (a) and (c) write what is compared: those of (c) alone are too much alike to learn from.
answers "$cold/model,$new/model" "$QUESTIONS" "$last/completions" "$SAMPLES" "$ANNOTATOR"
run "reward model" "$last/judge" $TRAINER examples/preferences.py MODEL="$new/model" OUTPUT_DIR="$last/judge" \
  EVALUATION="$last/completions/evaluation.jsonl" STEPS="$JUDGE_STEPS" LR="$JUDGE_LR"
grpo "$new/model" "$last/run" "$LAST_STEPS" "$RULES,$JUDGE_WEIGHT*$last/judge"

# The control: as many steps of GRPO alone.
steps=$((RL_STEPS + LAST_STEPS))
grpo "$start" "$control/run" "$steps" "$RULES"

# Two models an evaluation.
measured=()
measure() {
  local folder=$OUTPUT_DIR/heldout_$((${#measured[@]} + 1))
  answers "$1" "$EVAL_DATASET" "$folder" "$EVAL_SAMPLES" "$RULES,0*$ANNOTATOR"
  measured+=("$folder")
}
measure "$start,$cold/model"
measure "$rl/run/step_$RL_STEPS,$new/model"
measure "$last/run/step_$LAST_STEPS,$control/run/step_$steps"
python examples/stages.py FOLDERS="$(IFS=,; echo "${measured[*]}")" \
  STAGES=start,a_cold_start,b_rl,c_sampled,d_rl,only_rl PICTURE="$OUTPUT_DIR/stages.png"
