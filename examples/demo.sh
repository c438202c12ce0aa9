#!/usr/bin/env bash
# The main job on the embedded model: reference server, training run; the server ends with the script, whatever happens.
#   examples/demo.sh OUTPUT_DIR [NAME=value ...]
set -euo pipefail
python ref_server.py &
trap 'kill $! 2>/dev/null; wait $!' EXIT
deepspeed --log_level warning --num_accelerators 1 grpo_train.py OUTPUT_DIR="$@"
