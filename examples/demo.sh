#!/usr/bin/env bash
# A training run and its reference server, which ends with the script, whatever happens.
#   examples/demo.sh OUTPUT_DIR [NAME=value ...]                        the main job on the embedded model
#   MODEL=... PORT=... TRAINER=python examples/demo.sh OUTPUT_DIR ...   for the recipes
set -euo pipefail
MODEL=${MODEL:-examples/arithmetic/model} PORT=${PORT:-59875}
TRAINER=${TRAINER:-deepspeed --log_level warning --num_accelerators 1}
python ref_server.py MODEL="$MODEL" PORT="$PORT" &
trap 'kill $! 2>/dev/null; wait $!' EXIT
$TRAINER grpo_train.py MODEL="$MODEL" REF_SERVER="http://127.0.0.1:$PORT" OUTPUT_DIR="$@"
