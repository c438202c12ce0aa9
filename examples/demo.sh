#!/usr/bin/env bash
# A training run and its reference server, which ends with the script, whatever happens.
#   examples/demo.sh OUTPUT_DIR [NAME=value ...]     the main job on the embedded model; or with a MODEL=, REF_SERVER=
#   TRAINER=python examples/demo.sh OUTPUT_DIR ...   without DeepSpeed's launcher
set -euo pipefail
server=(MODEL=examples/arithmetic/model) address=http://127.0.0.1:59875
for argument; do
    case $argument in
    MODEL=* | DTYPE=* | TRUST_REMOTE_CODE=*) server+=("$argument") ;;
    REF_SERVER=*) address=${argument#*=} ;;
    esac
done
if (exec 3<>"/dev/tcp/127.0.0.1/${address##*:}") 2>/dev/null; then
    echo "something runs at $address already: end it, or choose another REF_SERVER=http://127.0.0.1:PORT" >&2
    exit 1
fi
# Ctrl-C is for the trainer, whose last step still needs the server: bash has it ignored by what is in the background
python ref_server.py "${server[@]}" PORT="${address##*:}" &
trap 'kill $! 2>/dev/null || true; wait $! || true' EXIT
${TRAINER:-deepspeed --log_level warning --num_accelerators 1} \
    grpo_train.py REF_SERVER="$address" OUTPUT_DIR="$@"
