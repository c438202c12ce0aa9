"""On a GPU: how close decoding comes to the speed of its memory, training to that of its processor, and what fits.

    python benchmarks/gpu.py                             # Qwen2.5-1.5B's shape, random weights, bfloat16
    python benchmarks/gpu.py shape=0.5b tflops=989       # of the GPU in bfloat16, from its data sheet
    python benchmarks/gpu.py shape=small tokens=16       # tries this script where there is no GPU

8 prompts of 128 tokens x 8 completions. A decode step's floor is the bytes of weights and cache over the bandwidth that
copying reaches; MFU is 6 x parameters x tokens of a forward and backward pass, over the seconds and `tflops`. The
longest completion is that of one row with AdamW's states in memory and gradient checkpointing, in `gigabytes`; TRL's
with its own loss, in the same place (tests/requirements.txt).
"""
import sys
import time

import compare
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo.attention import pack_attention
from grpo.fused import fuse
from grpo.policy import token_logps
from grpo.sampling import graph, transformers
from grpo.types import Prompt

PROMPT, ROWS = 128, 64
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def clock(work, times=3) -> float:
    """Seconds; the first time is not counted."""
    for number in range(times + 1):
        if number == 1:
            start = time.perf_counter()
        work()
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()
    return (time.perf_counter() - start) / times


def rows_of(count: int, tokens: int, vocab: int) -> list[torch.Tensor]:
    prompts = torch.randint(vocab, (-(-count // 8), PROMPT)).repeat_interleave(8, 0)[:count]
    packed = torch.cat([prompts, torch.randint(vocab, (count, tokens))], 1).flatten()
    lens = (torch.full((count,), PROMPT), torch.full((count,), tokens))
    return [tensor.to(DEVICE) for tensor in (packed, *lens)]


def make_model(shape: str, fused=True):
    """Random weights in the shape of a Qwen2, made on the device, and ready as `load_model` makes a model."""
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen2ForCausalLM(Qwen2Config(
            **compare.SHAPES[shape], num_key_value_heads=2, vocab_size=512 if shape == "small" else 151936,
            max_position_embeddings=2**20, tie_word_embeddings=True))
    model.to(torch.float32 if DEVICE.type == "cpu" else torch.bfloat16).eval()
    pack_attention(model)
    if fused and DEVICE.type == "cuda":
        fuse(model)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return model


def speed(model, tokens: int, tflops: float, update) -> dict[str, float]:
    """Decode steps by both samplers over their floor, and forward and backward passes of 16,000 tokens."""
    vocab, parameters, item, found = model.config.vocab_size, model.num_parameters(), model.dtype.itemsize, {}
    block = torch.empty(2**28 if DEVICE.type != "cpu" else 2**22, device=DEVICE)
    bandwidth = 2 * block.nbytes / clock(block.clone)
    del block
    prompts = [Prompt(row) for row in torch.randint(vocab, (ROWS // 8, PROMPT)).tolist()]
    decoded = max(tokens, 4 * transformers.BLOCK)
    uniforms = torch.rand(ROWS, decoded, dtype=torch.float64)

    def decode(decoder) -> float:
        """Seconds of a step, from one look for finished groups to another: without the prompts and the first steps."""
        looks = [time.perf_counter() for _ in decoder(model, prompts, 8, decoded, [0], 1.0, decoded, uniforms)]
        return (looks[-2] - looks[0]) / (transformers.BLOCK * (len(looks) - 2))

    config = model.config
    size = 2 * config.num_key_value_heads * config.hidden_size / config.num_attention_heads  # of a token in a layer
    cache = ROWS * (PROMPT + decoded / 2) * config.num_hidden_layers * size * item
    floor = (parameters * item + cache) / bandwidth
    for name, decoder in ("transformers", transformers.decode), ("graph", graph.decode):
        step = [decode(decoder) for _ in range(2)][-1]  # the first time it warms up
        print(f"SAMPLER={name}: decode step {1e3 * step:.2f} ms, {step / floor:.1f} times the floor at "
              f"{bandwidth / 1e9:.0f} GB/s ({ROWS / step:.0f} tokens a second)", flush=True)
        found |= {f"{name}_ms": 1e3 * step, f"{name}_over_floor": step / floor, "copy_gb_s": bandwidth / 1e9}

    rows = rows_of(16000 // (PROMPT + tokens) if DEVICE.type != "cpu" else 8, tokens, vocab)
    seconds, computed = clock(lambda: update(rows)), -(-len(rows[1]) // 8) * PROMPT + int(rows[2].sum())
    mfu = 6 * parameters * computed / seconds / tflops / 1e12
    print(f"training: {computed / seconds:.0f} tokens a second, MFU {mfu:.1%} of {tflops} TFLOPS", flush=True)
    found |= {"train_tokens_s": computed / seconds, "mfu_percent": 100 * mfu}
    return found


def main(shape="1.5b", tokens="512", tflops="989", gigabytes="80", parts="speed,longest") -> dict[str, float]:
    """Prints the figures and returns those of decoding and training."""
    tokens, model, found = int(tokens), make_model(shape), {}
    vocab, parameters = model.config.vocab_size, model.num_parameters()
    print(f"{shape}: {parameters / 1e9:.2f} billion parameters, {DEVICE}, {model.dtype}", flush=True)

    def update(rows):
        token_logps(model, *rows).mean().backward()
        model.zero_grad()

    if "speed" in parts:
        found = speed(model, tokens, float(tflops), update)
    if "longest" not in parts:
        return found

    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    updates = {"TRL": trl_update(model, vocab), "ours": lambda length: update(rows_of(1, length, vocab))}
    if DEVICE.type != "cuda":
        for name, work in updates.items():
            print(f"{name}: a row of {tokens} tokens takes {clock(lambda: work(tokens), 1):.1f} s")
        return found
    torch.cuda.set_per_process_memory_fraction(min(1, float(gigabytes) * 1e9 / torch.cuda.mem_get_info()[1]))
    states = torch.empty(3 * parameters, device=DEVICE)  # weights in float32, AdamW's two moments
    for name, work in updates.items():
        print(f"{name}: longest completion in {gigabytes} GB, beside {states.nbytes / 1e9:.0f} GB of states: "
              f"{longest(work)} tokens", flush=True)
    return found


def trl_update(model, vocab: int):
    """Forward and backward pass of TRL's loss for one row of so many tokens."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 0}, "<end>")), eos_token="<end>",
                                        pad_token="<end>")
    trainer = GRPOTrainer(
        model, lambda completions, **columns: [0.0] * len(completions), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "<end>"}] * 8),
        args=compare.trl_config(per_device_train_batch_size=8, num_generations=8, beta=0.0))
    trainer.current_gradient_accumulation_steps = 1

    def update(length):
        ids = [torch.randint(vocab, (1, count), device=DEVICE) for count in (PROMPT, length)]
        zeros = torch.zeros(1, length, device=DEVICE)
        inputs = {f"{name}_{kind}": value for name, row in zip(("prompt", "completion"), ids)
                  for kind, value in (("ids", row), ("mask", torch.ones_like(row)))}
        model.set_attn_implementation("sdpa")
        advantages = torch.ones(1, device=DEVICE)
        inputs |= {"advantages": advantages, "old_per_token_logps": zeros, "num_items_in_batch": length}
        trainer._compute_loss(model, inputs).backward()
        model.zero_grad()
        pack_attention(model)
    return update


def longest(work, most=2**17) -> int:
    """Tokens of the longest completion, within 1,024, that `work` has the memory for; no more than `most` are tried."""
    fits, fails = 1024, None
    while fits < most and (fails is None or fails - fits > 1024):
        length = 2 * fits if fails is None else (fits + fails) // 2
        try:
            work(length)
            fits = length
        except torch.OutOfMemoryError:
            fails = length
        torch.cuda.empty_cache()
    return fits


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))
