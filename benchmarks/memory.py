"""What a GPU has to hold, by arithmetic: weights, gradients, AdamW's states, the cache of sampling, activations.

    python benchmarks/memory.py                                                  # the recipes of docs/gpus.md
    python benchmarks/memory.py model=7b gpus=7 zero=2 rows=64 tokens=2048       # one of your own; lora=32 for adapters

Training takes 16 bytes a parameter: 2 for the weight and 2 for its gradient in bfloat16, 12 for AdamW's states in
float32; stage 1 splits the states over the GPUs, 2 the gradients too, 3 the weights too (ZeRO, arXiv 1910.02054,
section 5), but sampling needs the weights whole. A token in the cache takes 2 x layers x key-value heads x head size x
2 bytes, for `rows` completions on each GPU, of `tokens` with their prompt. Activations, with gradient checkpointing,
are each layer's input for 8,192 tokens, and all of one layer. For AdamW's step DeepSpeed copies its share of the
gradients, flat, and again in float32: 6 bytes. One of these three at a time. Nothing here is measured; libraries and
fragments come on top.
"""
import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPES = {  # Qwen2.5's: hidden, MLP, layers, heads, key-value heads, tied LM head
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "3b": (2048, 11008, 36, 16, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
    "14b": (5120, 13824, 48, 40, 8, False),
}
RECIPES = [
    "model=0.5b rows=128 server=here", "model=1.5b rows=128 lora=32 server=here", "model=1.5b rows=128",
    "model=7b rows=128 lora=32", "model=7b gpus=7 zero=2 rows=64", "model=14b gpus=16 zero=3 rows=32",
]


def gigabytes(model="1.5b", gpus="1", zero="1", rows="64", tokens="1024", lora="0", server="elsewhere") -> dict:
    """What each of the trainer's GPUs holds; `server` "here" adds the reference server on the same GPU."""
    hidden, mlp, layers, heads, kv_heads, tied = SHAPES[model]
    with torch.device("meta"):
        config = Qwen2Config(vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                             num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
        count = Qwen2ForCausalLM(config).num_parameters()
    small = hidden * kv_heads // heads
    matrices = [(hidden, hidden)] * 2 + [(hidden, small)] * 2 + [(hidden, mlp)] * 3
    trained = layers * int(lora) * sum(map(sum, matrices)) if int(lora) else count
    weights, gradients, states = 2 * count, 2 * trained, 12 * trained
    stage, shares = int(zero), int(gpus)
    parts = {
        "weights": weights if stage < 3 else weights / shares,
        "gradients": gradients if stage < 2 else gradients / shares,
        "states": states if stage < 1 else states / shares,
        "reference": weights if server == "here" else 0,
        "sampling": int(rows) * int(tokens) * 4 * layers * small + (weights if stage == 3 else 0),
        "activations": 8192 * 2 * (layers * hidden + 6 * mlp),
        "step": 6 * trained / shares,
    }
    fixed = sum(parts[name] for name in ("weights", "gradients", "states", "reference"))
    parts["peak"] = fixed + max(parts["sampling"], parts["activations"], parts["step"])  # one after the other
    return {name: size / 1e9 for name, size in parts.items()}


def main(*words: str) -> None:
    recipes = [" ".join(words)] if words else RECIPES
    for number, recipe in enumerate(recipes):
        found = gigabytes(**dict(word.split("=") for word in recipe.split()))
        if number == 0:
            print(f"{'GB on each GPU':45}" + "".join(f"{name:>13}" for name in found))
        print(f"{recipe:45}" + "".join(f"{size:13.1f}" for size in found.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
