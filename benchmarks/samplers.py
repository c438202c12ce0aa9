"""Ways to sample: tokens a second of both samplers of this project and of transformers' own, in turns.

    python benchmarks/samplers.py                        # 512 entries
    python benchmarks/samplers.py vocab=151936 rounds=2

4 prompts x 8 completions of exactly 64 tokens, temperature 1, whole distribution, on what there is: all cores or a GPU.
"""
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import compare
import torch
from transformers import GenerationConfig

from grpo.policy import load_model, stop_ids
from grpo.sampling import graph as graph_sampler
from grpo.sampling import sample

PROMPTS, TOKENS = 4, 64


def main(vocab="512", rounds="5") -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        compare.build(folder, int(vocab), "exact")
        model, tokenizer = load_model(str(folder))
        lines = (folder / "data.jsonl").read_text().splitlines()[: PROMPTS]
        prompts = [tokenizer(json.loads(line)["prompt"], add_special_tokens=False).input_ids for line in lines]
    repeated = [prompt for prompt in prompts for _ in range(compare.GROUP)]
    longest, end = max(map(len, prompts)), tokenizer.eos_token_id
    padded = torch.tensor([[end] * (longest - len(row)) + row for row in repeated], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in repeated], device=model.device)
    settings = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=end)

    def generate(**options):
        return model.generate(padded, attention_mask=mask, **settings, **options)[:, longest:]

    def continuous():
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=TOKENS, eos_token_id=-1, pad_token_id=end)
        answers = model.generate_batch(inputs=repeated, generation_config=config, progress_bar=False)
        return [answer.generated_tokens for answer in answers.values()]

    def own(decode=None):
        return [completion.tokens for completion in sample(
            model, prompts, compare.GROUP, max_tokens=TOKENS, min_tokens=TOKENS + 1, stop=stop_ids(model, tokenizer),
            seeds=list(range(PROMPTS)), decode=decode)]

    ways = {
        "SAMPLER=transformers": own,
        "SAMPLER=graph, without CUDA no graph": lambda: own(graph_sampler.decode),
        "generate": generate,
        "generate, static cache": lambda: generate(cache_implementation="static", disable_compile=True),
        "generate, static cache, compiled": lambda: generate(cache_implementation="static"),
        "generate_batch": continuous,
    }
    if not torch.accelerator.is_available():
        del ways["generate, static cache, compiled"]  # transformers compiles on accelerators alone
    speeds, first = {name: [] for name in ways}, {}
    for number in range(int(rounds) + 1):
        for name, way in ways.items():
            model.set_attn_implementation("sdpa" if name.startswith("generate") else "packed")
            start = time.perf_counter()
            answers = way()
            seconds, count = time.perf_counter() - start, sum(map(len, answers))
            assert count == len(repeated) * TOKENS, (name, count)
            if number:
                speeds[name].append(count / seconds)
            else:  # warms up
                first[name] = [[int(token) for token in answer] for answer in answers[:3]]
    steps, graph = list(first.values())[:2]
    print(f"the graph draws {'the same' if steps == graph else 'OTHER'} tokens")  # in bfloat16 they may, in the end
    base = speeds["SAMPLER=transformers"]
    for name, measured in speeds.items():
        ratio = statistics.median(own / other for own, other in zip(base, measured))
        print(f"{name:37}{statistics.median(measured):8.0f} tokens a second{ratio:8.2f} times as long")


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))
