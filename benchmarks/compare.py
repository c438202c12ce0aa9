"""The same work by this project, by TRL's GRPOTrainer and by simple_GRPO's algorithm, in turns: time, phases, memory.

    python benchmarks/compare.py                                          # 512 entries, every completion 64 tokens
    python benchmarks/compare.py vocab=151936 steps=3 rounds=2            # Qwen2.5's vocabulary
    python benchmarks/compare.py lengths=natural                          # EOS allowed: most are short, some 256 tokens
    python benchmarks/compare.py programs=ours,trl threads=1,2            # which, and with which numbers of threads
    python benchmarks/compare.py model=examples/smollm2/model data=examples/smollm2/train.jsonl prompts=8 tokens=48 \
        lengths=natural programs=ours,ours:MICRO_BATCH_TOKENS=2048,trl steps=3 rounds=1  # a model, questions for it
    python benchmarks/compare.py shape=1.5b vocab=151936 prompts=8 tokens=512 programs=ours,trl steps=4

The last one is for a GPU. Unless there is a `model`, its shape is Qwen2's (hidden 256, 4 layers). 4 prompts x 8
completions a step, AdamW in float32, a reference model, one update a step; needs tests/requirements.txt. Every program
runs alone and may use both cores; this project's reference server is a process beside the trainer, and counted. Of
several numbers of threads the best one is quoted. Behind `ours:` is a constant of it, as in ours:SAMPLER=transformers;
trl:parts=4 has TRL train on a fourth of a step's batch at a time, for less memory; trl:bf16=True and trl:dtype=bfloat16
are its mixed precision and weights in bfloat16.
"""
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GROUP, BETA, LR = 8, 0.04, 1e-5
SHAPES = {  # Qwen2's
    "small": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4),
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
}
PHASES = ("sample", "reference", "reward", "train")


def build(folder: Path, vocab: int, lengths: str, longest=1024, shape="small") -> None:
    """The model, its tokenizer, and prompts of some 25 tokens. For natural lengths it learns to end at any token with
    probability 1/40."""
    import arithmetic
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    rng = random.Random(0)
    problems = arithmetic.make_problems(200, rng)
    tokenizer = arithmetic.make_tokenizer(problems)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab, **SHAPES[shape], num_key_value_heads=2, max_position_embeddings=longest,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id))
    if lengths == "natural":
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(60):
            ids = torch.randint(vocab, (16, 64))
            ids[torch.rand(ids.shape) < 1 / 40] = tokenizer.eos_token_id
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [word for word in tokenizer.get_vocab() if word.isalnum()]
    rows = [{"prompt": "".join(rng.choices(words, k=25)), "answer": "1"} for _ in range(200)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def borrow(folder: Path, model: str, data: str) -> None:
    """A folder as `build` makes it, with the files of `model`, and the first questions of a data set for it."""
    from transformers import AutoTokenizer

    from grpo.data import load_prompts

    shutil.copytree(Path(model).resolve(), folder, copy_function=os.symlink)
    prompts = load_prompts(data, AutoTokenizer.from_pretrained(model), "", 128)[:200]
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts))


def peak_mb(pid: int) -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@contextmanager
def timed(seconds: Counter, name: str):
    """Adds the seconds that the block takes to `seconds[name]`, until the accelerator has done its work."""
    import torch

    start = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    seconds[name] += time.perf_counter() - start


def shares(step_seconds: list[float], phases: Counter) -> dict:
    """Of the steps but the first, which warms up: the median, and each phase's mean; train is what the others leave."""
    count, seconds = len(step_seconds) - 1, statistics.median(step_seconds[1:])
    means = {name: phases[name] / count for name in PHASES if name != "train"}
    return {"seconds": seconds, **means, "train": statistics.mean(step_seconds[1:]) - sum(means.values())}


# ------------------------------------------------------------------------------------------------- the programs

@contextmanager
def reference_server(folder: Path, environment: dict, dtype="auto"):
    """Its process and address, while the block runs."""
    with tempfile.NamedTemporaryFile() as said:
        server = subprocess.Popen([sys.executable, "ref_server.py", f"MODEL={folder}", f"DTYPE={dtype}", "PORT=0"],
                                  cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not (url := re.search(r"http://[\d.:]+", Path(said.name).read_text())):
                assert time.monotonic() < deadline and server.poll() is None, Path(said.name).read_text()
                time.sleep(0.1)
            yield server, url[0]
        finally:
            server.kill()
            server.wait()


def train(output: str, environment: dict, ranks=1, **constants) -> list[dict]:
    """The metrics of a run of grpo_train.py with these constants: a row for the start, and one a step."""
    import torch

    start = [f"{Path(sys.executable).parent}/deepspeed", "--num_accelerators", "2"] if ranks == 2 else [sys.executable]
    # 0 on a CPU, where one process has nothing to split; in bfloat16 DeepSpeed needs 1
    stage = int(torch.accelerator.is_available() or constants.get("DTYPE") == "bfloat16")
    constants = dict(OUTPUT_DIR=output, REWARDS="reward_len", EVAL_EVERY=0, SAVE_EVERY=0, WARMUP_STEPS=0, BETA=BETA,
                     LR=LR, ZERO_STAGE=stage) | constants
    words = [f"{name}={value}" for name, value in constants.items()]
    done = subprocess.run([*start, "grpo_train.py", *words], cwd=ROOT, env=environment, timeout=3000, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return [json.loads(line) for line in open(f"{output}/metrics.jsonl")]


def ours(folder: Path, steps: int, prompts: int, tokens: int, exact: bool, threads: int, **constants) -> dict:
    environment, dtype = os.environ | {"OMP_NUM_THREADS": str(threads)}, constants.get("DTYPE", "auto")
    with tempfile.TemporaryDirectory() as output, reference_server(folder, environment, dtype) as (server, url):
        rows = train(output, environment, MODEL=folder, DATASET=f"{folder}/data.jsonl", REF_SERVER=url, STEPS=steps,
                     PROMPTS_PER_STEP=prompts, GROUP_SIZE=GROUP, MAX_COMPLETION_TOKENS=tokens,
                     MIN_COMPLETION_TOKENS=tokens if exact else 0, **constants)[1:]
        phases = Counter({"sample": sum(row["seconds_sample"] for row in rows[1:]),
                          "reference": sum(row["seconds_ref_wait"] for row in rows[1:]),
                          "reward": sum(row["seconds_reward"] for row in rows[1:])})
        return shares([row["seconds"] for row in rows], phases) | {
            "trainer_mb": rows[-1]["peak_memory_mb"], "server_mb": peak_mb(server.pid),
            "tokens": statistics.mean(row["completion_tokens_total"] for row in rows[1:])}


def trl_config(**options):
    """What TRL needs for the loss and the optimizer of this project, and to be quiet."""
    import torch
    from trl import GRPOConfig

    gpu = torch.accelerator.is_available()
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="grpo", use_bias_correction_kl=False, max_grad_norm=1.0,
        use_cpu=not gpu, gradient_checkpointing=False, report_to=[], logging_steps=1000, save_strategy="no",
        disable_tqdm=True, seed=0, **{"bf16": gpu} | options)


def trl(folder: Path, steps: int, prompts: int, tokens: int, exact: bool, threads: int, dtype="float32",
        parts="", **options) -> dict:
    """`dtype` is that of the weights; option bf16=True computes products in bfloat16 from weights in float32. A step's
    batch goes through the model in so many `parts`, by default one on a CPU, a prompt's completions on a GPU."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from grpo.metrics import peak_memory_mb
    from rewards import reward_len

    torch.set_num_threads(threads)
    parts = int(parts or (prompts if torch.accelerator.is_available() else 1))
    seconds, phases, lengths = [], Counter(), []

    class Watch(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            self.start = time.perf_counter()

        def on_step_end(self, *arguments, **options):
            seconds.append(time.perf_counter() - self.start)
            if len(seconds) == 1:
                phases.clear()
                lengths.clear()

    rows = [{"prompt": json.loads(line)["prompt"]} for line in open(folder / "data.jsonl")]
    trainer = GRPOTrainer(
        str(folder), [reward_len], train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
        args=trl_config(
            per_device_train_batch_size=prompts * GROUP // parts, gradient_accumulation_steps=parts,
            num_generations=GROUP, max_steps=steps, learning_rate=LR, lr_scheduler_type="constant", beta=BETA,
            max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens} if exact else {},
            model_init_kwargs={"dtype": dtype}, **options))

    def rewarded(inputs, prompts, completions, ids, *_):
        lengths.append(sum(map(len, ids)))
        return "reward"

    def watch(name, phase_of):
        method = getattr(trainer, name)

        def watched(*arguments, **options):
            with timed(phases, phase_of(*arguments)):
                return method(*arguments, **options)
        setattr(trainer, name, watched)

    watch("_generate_single_turn", lambda *_: "sample")
    watch("_calculate_rewards", rewarded)
    watch("_get_per_token_logps_and_entropies",
          lambda model, *_: "reference" if model is trainer.ref_model else "policy")
    trainer.train()
    return shares(seconds, phases) | {"trainer_mb": peak_memory_mb(), "tokens": statistics.mean(lengths)}


def simple(folder: Path, steps: int, prompts: int, tokens: int, exact: bool, threads: int) -> dict:
    """The algorithm of simple_GRPO as it is publicly described: generate, decode, tokenise the text again, log-probs
    from the logits of all positions, a group at a time. In one process, which spares it the transfer to its server."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rewards import reward_len

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0)
    data = [json.loads(line)["prompt"] for line in open(folder / "data.jsonl")]
    seconds, phases, lengths = [], Counter(), []

    def logps_of(model, ids):
        return model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    for step in range(steps):
        start = time.perf_counter()
        for prompt in data[step * prompts : (step + 1) * prompts]:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
            with timed(phases, "sample"), torch.no_grad():
                answers = model.eval().generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=GROUP,
                    max_new_tokens=tokens, min_new_tokens=tokens if exact else 0)[:, ids.shape[1] :]
            lengths.append(sum((row != tokenizer.eos_token_id).sum().item() + 1 for row in answers) if not exact
                           else answers.numel())
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            with timed(phases, "reward"):
                rewards = torch.tensor(reward_len(texts), dtype=torch.float)
            again = [tokenizer(text, add_special_tokens=False).input_ids[:tokens] for text in texts]
            # Random tokens are not always what their text is tokenised to: as many of them as were sampled.
            longest = answers.shape[1]
            again = torch.tensor([(row + [tokenizer.eos_token_id] * longest)[:longest] for row in again])
            batch = torch.cat([ids.expand(GROUP, -1), again], 1)
            with timed(phases, "reference"), torch.no_grad():
                ref_logps = logps_of(reference, batch)[:, ids.shape[1] - 1 :]
            logps = logps_of(model.train(), batch)[:, ids.shape[1] - 1 :]
            advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
            difference = ref_logps - logps
            kl = difference.exp() - difference - 1
            mask = (again != tokenizer.eos_token_id).float()
            loss = -(((logps - logps.detach()).exp() * advantages - BETA * kl) * mask).sum(1) / mask.sum(1).clamp(1)
            (loss.mean() / prompts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if step == 0:
            phases.clear()
            lengths.clear()
    tokens = statistics.mean(lengths) * prompts
    return shares(seconds, phases) | {"trainer_mb": peak_mb(os.getpid()), "tokens": tokens}


# ------------------------------------------------------------------------------------------------- in turns

def main(vocab="512", lengths="exact", steps="6", rounds="3", programs="ours,trl,simple", threads="2", shape="small",
         prompts="4", tokens="", model="", data="") -> None:
    tokens, results = tokens or {"exact": "64", "natural": "256"}[lengths], {}
    with tempfile.TemporaryDirectory() as temporary:
        if model:
            borrow(Path(temporary) / "model", model, data)
        else:
            build(Path(temporary) / "model", int(vocab), lengths, shape=shape)
        for number in range(int(rounds)):
            for program in programs.split(","):
                for count in threads.split(","):
                    print(f"round {number + 1}: {program}, {count} threads", file=sys.stderr, flush=True)
                    work = program, f"{temporary}/model", steps, prompts, tokens, lengths, count
                    said = subprocess.run([sys.executable, __file__, "run", *work], stdout=subprocess.PIPE, check=True,
                                          text=True, timeout=3600).stdout
                    results.setdefault((program, count), []).append(json.loads(said.splitlines()[-1]))
    print(f"\n{model or f'{vocab} entries'}, {lengths} lengths, medians of {rounds} runs of {steps} steps, "
          "the first left out\n")
    print(f"{'':40}{'s a step':>9}{'ratio':>7}" + "".join(f"{name:>10}" for name in (*PHASES, "tokens"))
          + f"{'trainer MB':>12}{'server MB':>11}")
    best = min((key for key in results if key[0] == "ours"), default=next(iter(results)),
               key=lambda key: statistics.median(run["seconds"] for run in results[key]))
    for (program, count), runs in results.items():
        ratio = statistics.median(run["seconds"] / base["seconds"] for run, base in zip(runs, results[best]))
        median = {name: statistics.median(run.get(name, float("nan")) for run in runs)
                  for name in ("seconds", *PHASES, "tokens", "trainer_mb", "server_mb")}
        print(f"{program + ', ' + count + ' threads':40}{median['seconds']:9.2f}{ratio:7.2f}"
              + "".join(f"{median[name]:10.2f}" for name in PHASES) + f"{median['tokens']:10.0f}"
              + f"{median['trainer_mb']:12.0f}{median['server_mb']:11.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        _, _, program, where, *numbers, kind, cores = sys.argv
        name, *words = program.split(":")
        constants = dict(word.split("=") for word in words)
        print(json.dumps(globals()[name](Path(where), *map(int, numbers), kind == "exact", int(cores), **constants)))
    else:
        main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
