#!/usr/bin/env bash
# A training run and its reference server, which ends with the script, whatever happens.
#   examples/demo.sh OUTPUT_DIR [NAME=value ...]     the main job on the embedded model; or with a MODEL=, REF_SERVER=
#   TRAINER=python examples/demo.sh OUTPUT_DIR ...   without DeepSpeed's launcher
set -euo pipefail
server=(MODEL=examples/arithmetic/model) address=http://127.0.0.1:59875
for argument; do
    case $argument in
    MODEL=* | DTYPE=*) server+=("$argument") ;;
    REF_SERVER=*) address=${argument#*=} ;;
    esac
done
python ref_server.py "${server[@]}" PORT="${address##*:}" &
trap 'kill $! 2>/dev/null; wait $!' EXIT
${TRAINER:-deepspeed --log_level warning --num_accelerators 1} \
    grpo_train.py REF_SERVER="$address" OUTPUT_DIR="$@"
