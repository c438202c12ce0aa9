"""The embedded task: a small language model that half knows arithmetic, and problems for it. No download.

    python examples/arithmetic.py                  # writes examples/arithmetic/: model/, train.jsonl, heldout.jsonl

A question chains additions and subtractions whose results stay within one digit; the solution writes one step a line
between `<think>` and `</think>`, then the result between `<answer>` and `</answer>`. A short supervised run on a sloppy
student's solutions teaches the form and the arithmetic, and the bad habit of giving up at a subtraction. GRPO has to
find out that going on pays: completions become longer, and right. The same SEED gives the same files.
"""
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.sft import SYSTEM_PROMPT, supervised_loss, written  # noqa: E402
from grpo.constants import override_constants  # noqa: E402
from grpo.data import to_prompt  # noqa: E402
from grpo.policy import token_logps  # noqa: E402

OUTPUT_DIR = "examples/arithmetic"
SEED = 0
TRAIN_PROBLEMS = 4000
HELDOUT_PROBLEMS = 200
TERMS = 3  # additions and subtractions in a question
SLIPS = 0.6  # how often the solutions of the warm-up stop at a subtraction, which leaves the answer wrong
WARMUP_STEPS = 850  # supervised steps: fewer leave more for GRPO to teach, too few leave it nothing to start from
BATCH_SIZE = 16
LR = 2e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>"]


def make_problem(rng: random.Random) -> dict:
    """A question, its answer, and the solution of a sloppy student, who may give up at any but the first step."""
    total = written = rng.randint(1, 9)
    question, steps, gave_up = str(total), [], False
    for _ in range(TERMS):
        sign = rng.choice("+-") if 0 < total < 9 else "+-"[total > 0]
        term = rng.randint(1, total if sign == "-" else 9 - total)
        result = total + term if sign == "+" else total - term
        gave_up = gave_up or (sign == "-" and steps != [] and rng.random() < SLIPS)
        if not gave_up:
            steps.append(f"{total} {sign} {term} = {result}")
            written = result
        question += f" {sign} {term}"
        total = result
    solution = "<think>\n" + "\n".join(steps) + f"\n</think>\n<answer>{written}</answer>"
    return {"question": f"What is {question}?", "answer": str(total), "solution": solution}


def make_problems(count: int, rng: random.Random, make=make_problem) -> list[dict]:
    """`count` problems of a task, no question twice."""
    problems = {}
    while len(problems) < count:
        problem = make(rng)
        problems[problem["question"]] = problem
    return list(problems.values())


def make_tokenizer(problems: list[dict]) -> Qwen2Tokenizer:
    """Byte-level BPE as Qwen2's, trained on the task's words; digits stay single tokens."""
    blank = Qwen2Tokenizer(vocab={}, merges=[])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    words = [SYSTEM_PROMPT, "system\nuser\nassistant\n"] * len(problems)
    bpe.train_from_iterator(words + [p["question"] + "\n" + p["solution"] for p in problems], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]],
                               eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def warm_up(model, tokenizer, problems: list[dict], rng: random.Random) -> None:
    """Supervised training on the written solutions, the questions themselves left out of the loss."""
    prompts = [to_prompt(problem, 0, tokenizer, SYSTEM_PROMPT, "question") for problem in problems]
    samples = [written(prompt, prompt.columns["solution"], tokenizer) for prompt in prompts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    for step in tqdm(range(WARMUP_STEPS), desc="supervised warm-up", unit="step"):
        rows = rng.sample(samples, BATCH_SIZE)
        tokens = sum(len(row.tokens) for row in rows)
        loss = supervised_loss(partial(token_logps, model), rows, tokens)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / 20, 1 - step / WARMUP_STEPS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main():
    if os.path.exists(f"{OUTPUT_DIR}/model"):
        print(f"{OUTPUT_DIR} is already there")
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this at once, as long as there is nothing to clean up
    torch.set_num_threads(2)  # sums depend on the number of threads, and the files are to depend on SEED alone
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    problems = make_problems(TRAIN_PROBLEMS + HELDOUT_PROBLEMS, rng)
    train, heldout = problems[:TRAIN_PROBLEMS], problems[TRAIN_PROBLEMS:]
    tokenizer = make_tokenizer(train)
    model = make_model(tokenizer)
    warm_up(model, tokenizer, train, rng)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    Path(OUTPUT_DIR).parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=".unfinished-", dir=Path(OUTPUT_DIR).parent)
    try:
        built = Path(unfinished, "built")  # others may read it; what mkdtemp makes is for its user alone
        model.save_pretrained(built / "model")
        tokenizer.save_pretrained(built / "model")
        for name, part in ("train", train), ("heldout", heldout):
            with open(built / f"{name}.jsonl", "w") as file:
                file.writelines(json.dumps({"question": p["question"], "answer": p["answer"]}) + "\n" for p in part)
        built.rename(OUTPUT_DIR)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {OUTPUT_DIR}/model, train.jsonl ({len(train)} problems), heldout.jsonl ({len(heldout)} problems)")


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    main()
