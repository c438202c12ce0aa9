"""Seconds of training to 90 % held-out accuracy on the embedded task: this project and TRL from the same start.

    python benchmarks/learning.py                        # needs tests/requirements.txt and examples/arithmetic.py
    python benchmarks/learning.py rounds=3 until=0.9

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

MODEL, HELDOUT = (str(compare.ROOT / "examples/arithmetic" / name) for name in ("model", "heldout.jsonl"))
TRAIN = str(compare.ROOT / "examples/arithmetic/train.jsonl")
EVERY, MOST = 1, 30


def seconds_until(history: list[tuple[float, float]], until: float) -> float:
    """History has the seconds of each step, and the accuracy after it where there is one."""
    spent = 0.0
    for seconds, accuracy in history:
        spent += seconds
        if accuracy is not None and accuracy >= until:
            return spent
    return float("inf")


def ours(until: float) -> dict:
    with tempfile.TemporaryDirectory() as output, compare.reference_server(MODEL, dict(os.environ)) as (_, url):
        rows = compare.train(output, dict(os.environ), MODEL=MODEL, DATASET=TRAIN, EVAL_DATASET=HELDOUT, REF_SERVER=url,
                             REWARDS="reward_correct,reward_format", STEPS=MOST, EVAL_EVERY=EVERY, BETA=0.005, LR=5e-5,
                             WARMUP_STEPS=10)[1:]
    return {"seconds": seconds_until([(row["seconds"], row.get("eval_accuracy")) for row in rows], until),
            "step": statistics.median(row["seconds"] for row in rows)}


def trl(until: float) -> dict:
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
    from rewards import reward_correct, reward_format

    torch.set_num_threads(os.cpu_count())
    model, tokenizer = load_model(MODEL)
    prompts, heldout = (load_prompts(name, tokenizer, SYSTEM_PROMPT, 128) for name in (TRAIN, HELDOUT))
    rewards = load_rewards([reward_correct, reward_format])

    def judge(model):
        groups = sum(rollouts(model, heldout, 1, temperature=0, max_tokens=64, stop=stop_ids(model, tokenizer)), [])
        score(groups, rewards, tokenizer, Metrics())
        return statistics.fmean(group.samples[0].rewards[0] > 0 for group in groups)

    history = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            self.start = time.perf_counter()

        def on_step_end(self, arguments, state, control, model, **options):
            seconds, accuracy = time.perf_counter() - self.start, None
            if state.global_step % EVERY == 0:
                accuracy = judge(model)
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
        MODEL, [with_tags(reward_correct), with_tags(reward_format)],
        train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
        args=compare.trl_config(
            per_device_train_batch_size=128, num_generations=8, max_steps=MOST, learning_rate=5e-5, beta=0.005,
            lr_scheduler_type="constant_with_warmup", warmup_steps=10, max_completion_length=64))
    trainer.train()
    return {"seconds": seconds_until(history, until), "step": statistics.median(seconds for seconds, _ in history)}


def main(rounds="2", until="0.9") -> None:
    results = {"ours": [], "trl": []}
    for _ in range(int(rounds)):
        for program, runs in results.items():
            said = subprocess.run([sys.executable, __file__, "run", program, until], stdout=subprocess.PIPE, check=True,
                                  text=True, timeout=1800).stdout
            runs.append(json.loads(said.splitlines()[-1]))
            print(f"{program}: {float(until):.0%} after {runs[-1]['seconds']:.1f} s of training, a step takes "
                  f"{runs[-1]['step']:.2f} s", flush=True)
    ratio = statistics.median(t["seconds"] / o["seconds"] for o, t in zip(results["ours"], results["trl"]))
    print(f"median ratio: TRL takes {ratio:.2f} times as long")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(globals()[sys.argv[2]](float(sys.argv[3]))))
    else:
        main(**dict(argument.split("=") for argument in sys.argv[1:]))
