#!/usr/bin/env bash
# Training over two machines, on one: two network namespaces with a cable between them, and DeepSpeed's own launcher.
#
#   make .venv/ready && sudo tests/two_machines.sh     # 2 minutes; MODEL=folder: another model, train.jsonl beside it
#
# The reference server and a trainer are at 10.77.0.1, another trainer at 10.77.0.2; they are started in both ways, over
# ssh from the first machine, and by hand on each (--no_ssh). Exit status 0: both runs used the cable and have the
# weights of a run in one process; 77: there can be no namespaces here; else a sentence says what is wrong.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
[[ ! -d .venv/bin ]] || PATH=$PWD/.venv/bin:$PATH
export PYTHONDONTWRITEBYTECODE=1  # root leaves nothing in the checkout
tmp=$(mktemp -d) net=two-machines-$$ hosts=(10.77.0.1 10.77.0.2)

die() { echo "$1" >&2; exit "${2:-1}"; }
pids() { for host in "${hosts[@]}"; do ip netns pids "$net-$host"; done; }
cleanup() {
    until [[ -z $(jobs -pr; pids) ]]; do
        pids | xargs --no-run-if-empty kill -KILL || true
        sleep 0.2
    done
    for host in "${hosts[@]}"; do ip netns del "$net-$host" || true; done  # and the cable with them
    rm -rf "$tmp"
} 2>/dev/null
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

[[ $EUID == 0 ]] || die "skipped: only root can make network namespaces (sudo tests/two_machines.sh)" 77
{ ip netns add "$net-${hosts[0]}" && ip netns add "$net-${hosts[1]}" &&
    ip link add eth0 netns "$net-${hosts[0]}" type veth peer name eth0 netns "$net-${hosts[1]}"; } 2>"$tmp/error" ||
    die "skipped: there can be no network namespaces here: $(<"$tmp/error")" 77
for host in "${hosts[@]}"; do
    ip -n "$net-$host" addr add "$host/24" dev eth0
    for device in lo eth0; do ip -n "$net-$host" link set "$device" up; done
    echo "$host slots=1" >>"$tmp/hostfile"
done

# Stand-ins for ssh and, where it is missing, pdsh. As with the real ones, a command sees no variable but what the
# launcher hands on, and no process of another machine: the launcher of an interrupted run calls pkill -f.
mkdir "$tmp/bin"
export PATH=$tmp/bin:$PATH
cat >"$tmp/bin/ssh" <<EOF
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do [[ \$1 == -[op] ]] && shift; shift; done
exec ip netns exec "$net-\$1" unshare --pid --fork --kill-child --mount-proc \\
    env --ignore-environment HOME="$HOME" PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 bash -c "\${*:2}"
EOF
type -P pdsh >/dev/null || cat >"$tmp/bin/pdsh" <<'EOF'
#!/usr/bin/env bash
IFS=, read -ra hosts <<<"$5"  # pdsh -S -f 1024 -w HOST,HOST COMMAND, with %n for the number of the host
command="${*:6}"
for n in "${!hosts[@]}"; do ssh "${hosts[n]}" "${command//%n/$n}" & done
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "${status:-0}"
EOF
chmod +x "$tmp"/bin/*

start() {  # start NAME HOST COMMAND, in the background
    timeout --foreground --signal=KILL 300 ssh "$2" "cd '$PWD'; $3" >"$tmp/$1.log" 2>&1 &
}
finish() {  # finish NAME PID...
    for pid in "${@:2}"; do
        wait "$pid" || { tail -n 30 "$tmp/$1"*.log "$tmp/server.log" >&2; die "$1: failed, or took 300 s; see above"; }
    done
}

if [[ ! -e ${MODEL:=examples/arithmetic/model} ]]; then
    MODEL=$tmp/arithmetic/model
    timeout 900 python examples/arithmetic.py OUTPUT_DIR="$tmp/arithmetic" || die "the model could not be built"
fi
train="grpo_train.py MODEL=$MODEL DATASET=${MODEL%/*}/train.jsonl REF_SERVER=http://${hosts[0]}:59875"
train+=" STEPS=3 SAVE_EVERY=3 EVAL_EVERY=0 OUTPUT_DIR=$tmp"
# What each process needs. Gloo, which joins CPUs, else takes the address of the machine's name, often 127.0.0.1.
needs="REF_TOKEN=$RANDOM$RANDOM GLOO_SOCKET_IFNAME=eth0"
tr ' ' '\n' <<<"$needs" >"$tmp/deepspeed_env"

start server "${hosts[0]}" "$needs python ref_server.py MODEL=$MODEL HOST=${hosts[0]}"
start refused "${hosts[1]}" "python $train/refused"
wait $! && die "a trainer without REF_TOKEN was not refused"
grep "set REF_TOKEN" "$tmp/refused.log" || die "a trainer without REF_TOKEN: $(tail -n 5 "$tmp/refused.log")"

start one "${hosts[0]}" "$needs python $train/one"
finish one $!
start ssh "${hosts[0]}" "DS_ENV_FILE=$tmp/deepspeed_env deepspeed --hostfile $tmp/hostfile $train/ssh"
finish ssh $!
by_hand="$needs deepspeed --hostfile $tmp/hostfile --no_ssh --master_addr ${hosts[0]} --node_rank"
start no_ssh-0 "${hosts[0]}" "$by_hand 0 $train/no_ssh"
first=$!
start no_ssh-1 "${hosts[1]}" "$by_hand 1 $train/no_ssh"
finish no_ssh $first $!

ssh "${hosts[1]}" "cat /sys/class/net/eth0/statistics/{rx,tx}_bytes" >"$tmp/bytes"
timeout 100 python - "$tmp" "$MODEL" <<'EOF'
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file

def weights(folder):
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())])

def result(name):
    rows = [json.loads(line) for line in (tmp / name / "metrics.jsonl").open()]
    return weights(tmp / name / "step_3"), [row["completion_tokens_total"] for row in rows[1:]], rows[3]["kl"]

tmp = Path(sys.argv[1])
one, tokens, kl = result("one")
moved = (one - weights(Path(sys.argv[2]))).norm() / one.norm()
print(f"one process: 3 steps moved the weights by {moved:.0e}; completion tokens {tokens}, KL {kl:.3e}")
for name in "ssh", "no_ssh":
    two, its_tokens, its_kl = result(name)
    difference = (two - one).norm() / one.norm()
    print(f"{name}: weights within {difference:.0e} of those; completion tokens {its_tokens}, KL {its_kl:.3e}")
    if not (difference < min(1e-5, moved / 10) and its_tokens == tokens and abs(its_kl - kl) < kl / 100):
        sys.exit(f"{name}: this is not the run in one process")
received, sent = map(int, (tmp / "bytes").read_text().split())
print(f"over the cable: the second machine received {received / 1e6:.1f} MB, sent {sent / 1e6:.1f} MB")
if min(received, sent) < 2 * 3 * 4 * one.numel():
    sys.exit("that is less than the gradients of two runs of three steps")
EOF
