"""Ways to sample: tokens a second of `sampler.sample`, of three of transformers' own and of a CUDA graph, in turns.

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
from transformers import GenerationConfig, StaticCache

from sampler import draw, load_model, sample, stop_ids

PROMPTS, TOKENS = 4, 64


@torch.inference_mode()
def replay(model, padded, mask, uniforms, stop) -> torch.Tensor:
    """Completions of the padded prompts, each as long as its row of uniforms and without a token of `stop`. A step has
    fixed shapes and reads no value, so that a GPU captures it once and repeats it without Python."""
    length, tokens = padded.shape[1], uniforms.shape[1]
    mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
    position, columns = mask.cumsum(1).sub(1).clamp(min=0), torch.arange(mask.shape[1], device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=mask.shape[1])
    logits = model(padded, attention_mask=mask[:, :length], position_ids=position[:, :length], past_key_values=cache,
                   logits_to_keep=1).logits[:, -1].clone()
    drawn, place = torch.empty_like(uniforms, dtype=torch.long), torch.zeros(1, dtype=torch.long, device=model.device)

    def step():
        logits.index_fill_(1, stop, -torch.inf)
        token = draw(logits.float(), uniforms.index_select(1, place)[:, 0])[0][:, None]
        drawn.index_copy_(1, place, token)
        seen = (mask > 0) & (columns <= length + place)
        logits.copy_(model(token, attention_mask=seen[:, None, None], past_key_values=cache,
                           position_ids=position.index_select(1, length + place)).logits[:, -1])
        place.add_(1)

    step()  # also warms up what must not be prepared during a capture
    again = step
    if torch.cuda.is_available():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        again = graph.replay
    for _ in range(tokens - 1):
        again()
    return drawn


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

    stop = stop_ids(model, tokenizer)
    stopping = torch.tensor(stop, device=model.device)
    generators = [torch.Generator().manual_seed(seed) for seed in range(PROMPTS)]
    uniforms = torch.cat([torch.rand(compare.GROUP, TOKENS, dtype=torch.float64, generator=generator)
                          for generator in generators]).to(model.device)
    ways = {
        "sampler.sample": lambda: [completion.tokens for completion in sample(
            model, prompts, compare.GROUP, max_tokens=TOKENS, min_tokens=TOKENS + 1, stop=stop,
            seeds=list(range(PROMPTS)))],
        "fixed shapes, CUDA graph on a GPU": lambda: replay(model, padded, mask, uniforms, stopping),
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
    own, fixed = list(first.values())[:2]
    print(f"fixed shapes draw {'the same' if own == fixed else 'OTHER'} tokens")  # in bfloat16 they may, in the end
    base = speeds["sampler.sample"]
    for name, measured in speeds.items():
        ratio = statistics.median(own / other for own, other in zip(base, measured))
        print(f"{name:34}{statistics.median(measured):8.0f} tokens a second{ratio:8.2f} times as long")


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))
