"""Seconds of training to a held-out accuracy: this project and TRL from the same start.

    python benchmarks/learning.py                        # needs tests/requirements.txt and examples/arithmetic.py
    python benchmarks/learning.py rounds=3 until=0.9
    python benchmarks/learning.py task=smollm2 rounds=1 until=0.335      # after python examples/smollm2.py

The same prompts a step, group size, limits, rewards, optimizer, learning rate, warm-up and KL weight. Both are judged
after every step by the same greedy evaluation, outside their time. The reference server shares this machine.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import compare

EXAMPLES = compare.ROOT / "examples"
TASKS = {
    "arithmetic": dict(
        MODEL=f"{EXAMPLES}/arithmetic/model", DATASET=f"{EXAMPLES}/arithmetic/train.jsonl",
        EVAL_DATASET=f"{EXAMPLES}/arithmetic/heldout.jsonl", REWARDS="reward_correct,reward_format", STEPS=30,
        EVAL_EVERY=1, BETA=0.005, LR=5e-5, WARMUP_STEPS=10, PROMPTS_PER_STEP=16, MAX_COMPLETION_TOKENS=64),
    "smollm2": dict(  # as examples/smollm2.sh
        MODEL=f"{EXAMPLES}/smollm2/model", DATASET=f"{EXAMPLES}/smollm2/train.jsonl",
        EVAL_DATASET=f"{EXAMPLES}/smollm2/heldout.jsonl", STEPS=40, EVAL_EVERY=5, BETA=0.02, LR=1e-5, WARMUP_STEPS=3,
        REWARDS="examples.smollm2:reward_number,0.3*examples.smollm2:reward_form", PROMPTS_PER_STEP=8,
        SYSTEM_PROMPT="Answer with one short calculation.", MAX_COMPLETION_TOKENS=32, MICRO_BATCH_TOKENS=2048),
}


def seconds_until(history: list[tuple[float, float]], until: float) -> float:
    """History has the seconds of each step, and the accuracy after it where there is one."""
    spent = 0.0
    for seconds, accuracy in history:
        spent += seconds
        if accuracy is not None and accuracy >= until:
            return spent
    return float("inf")


def ours(task: dict, until: float) -> dict:
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as output, compare.reference_server(task["MODEL"], environment) as (_, url):
        rows = compare.train(output, environment, **task, REF_SERVER=url)[1:]
    return {"seconds": seconds_until([(row["seconds"], row.get("eval_accuracy")) for row in rows], until),
            "step": statistics.median(row["seconds"] for row in rows)}


def trl(task: dict, until: float) -> dict:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from grpo.data import load_prompts
    from grpo.policy import load_model, stop_ids
    from grpo.sampling import rollouts
    from grpo_train import SYSTEM_PROMPT
    from grpo.metrics import Metrics
    from grpo.scoring import load_rewards, score

    torch.set_num_threads(os.cpu_count())
    model, tokenizer = load_model(task["MODEL"])
    prompts, heldout = (load_prompts(task[name], tokenizer, task.get("SYSTEM_PROMPT", SYSTEM_PROMPT), 128)
                        for name in ("DATASET", "EVAL_DATASET"))
    rewards, tokens = load_rewards(task["REWARDS"].split(",")), task["MAX_COMPLETION_TOKENS"]

    def judge(model):
        groups = sum(rollouts(model, heldout, 1, temperature=0, max_tokens=tokens, stop=stop_ids(model, tokenizer)), [])
        score(groups, rewards, tokenizer, Metrics())
        return statistics.fmean(group.samples[0].rewards[0] > 0 for group in groups)

    history = []

    class Watch(TrainerCallback):
        def on_step_begin(self, arguments, state, control, optimizer=None, **options):
            for group in optimizer.param_groups:  # TRL's own warm-up begins at 0, and its first step would do nothing
                group["lr"] = task["LR"] * min(1, (state.global_step + 1) / task["WARMUP_STEPS"])
            self.start = time.perf_counter()

        def on_step_end(self, arguments, state, control, model, **options):
            seconds, accuracy = time.perf_counter() - self.start, None
            if state.global_step % task["EVAL_EVERY"] == 0:
                accuracy = judge(model)
                print(f"step {state.global_step}: {accuracy:.1%}", file=sys.stderr, flush=True)
                control.should_training_stop = accuracy >= until
            history.append((seconds, accuracy))

    def with_tags(function):  # TRL leaves out special tokens, which the tags are to this tokenizer
        def reward(completion_ids, completions, **columns):
            ids = [[token for token in row if token != tokenizer.eos_token_id] for row in completion_ids]
            return function([tokenizer.decode(row) for row in ids], completion_ids=completion_ids, **columns)
        reward.__name__ = function.__name__
        return reward

    rows = [{"prompt": prompt.text} | prompt.columns for prompt in prompts]
    trainer = GRPOTrainer(
        task["MODEL"], [with_tags(reward.function) for reward in rewards],
        train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
        args=compare.trl_config(
            per_device_train_batch_size=task["PROMPTS_PER_STEP"] * 8, num_generations=8, max_steps=task["STEPS"],
            learning_rate=task["LR"], beta=task["BETA"], reward_weights=[reward.weight for reward in rewards],
            lr_scheduler_type="constant", max_completion_length=tokens))
    trainer.train()
    return {"seconds": seconds_until(history, until), "step": statistics.median(seconds for seconds, _ in history)}


def main(rounds="2", until="0.9", task="arithmetic") -> None:
    results = {"ours": [], "trl": []}
    for _ in range(int(rounds)):
        for program, runs in results.items():
            said = subprocess.run([sys.executable, __file__, "run", program, task, until], check=True, text=True,
                                  stdout=subprocess.PIPE, timeout=7200).stdout
            runs.append(json.loads(said.splitlines()[-1]))
            print(f"{program}: {float(until):.0%} after {runs[-1]['seconds']:.1f} s of training, a step takes "
                  f"{runs[-1]['step']:.2f} s", flush=True)
    ratio = statistics.median(t["seconds"] / o["seconds"] for o, t in zip(results["ours"], results["trl"]))
    print(f"median ratio: TRL takes {ratio:.2f} times as long")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(globals()[sys.argv[2]](TASKS[sys.argv[3]], float(sys.argv[4]))))
    else:
        main(**dict(argument.split("=") for argument in sys.argv[1:]))
