"""Samplers: generators of finished groups. The default on a CPU is `rollouts` with `transformers.decode`."""
from contextlib import nullcontext
from functools import partial

import torch

from grpo.sampling import generate, graph, transformers
from grpo.types import Prompt, Sample

MAX_SEQUENCES = 512  # decoded at a time; more are taken one slice after the other


def open_sampler(name: str, policy, max_tokens: int, vllm_memory: float):
    """SAMPLER=`name` as `rollouts(prompts, group_size, temperature, seeds=None, min_tokens=0)`.

    All processes call it together. It yields lists of finished groups, sampled from the policy's weights as they are
    then, of at most `max_tokens` tokens.
    """
    if name == "vllm":
        from grpo.sampling.vllm import Engine  # here, because vLLM is optional
        sampler, whole = Engine(policy, vllm_memory).rollouts, nullcontext  # it copies the weights
    else:
        model = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model  # LoRA's
        sampler, whole = partial(rollouts, model, decode=decoder(name, model)), policy.gathered

    def with_weights(prompts, group_size, temperature, seeds=None, min_tokens=0):
        with whole():
            yield from sampler(prompts, group_size, temperature=temperature, seeds=seeds, max_tokens=max_tokens,
                               min_tokens=min_tokens, stop=policy.stop_ids)
    return with_weights


def decoder(name: str, model):
    """The function that decodes for SAMPLER=`name`. On a GPU "auto" takes the graph if the model allows it: on an H100
    a step of 0.5 to 1.5 billion parameters then takes a quarter of the time."""
    if name == "graph" or name == "auto" and model.device.type == "cuda" and not graph.obstacle(model):
        return graph.decode
    return transformers.decode if model.config._attn_implementation == "packed" else generate.decode


def rollouts(model, prompts: list[Prompt], group_size: int, *, max_tokens: int, stop: list[int], temperature=1.0,
             min_tokens=0, seeds: list[int] | None = None, decode=None):
    """Yields lists of finished groups, `group_size` samples for each prompt; temperature 0 is greedy, without `seeds`.

    No sample ends before `min_tokens` tokens. The random numbers belong to the prompt's seed, not to the batch: a
    prompt gets the same samples however the prompts are spread over processes. The model is in eval mode meanwhile:
    dropout is not part of the policy.
    """
    was_training = model.training
    model.eval()
    decode, longest = decode or decoder("transformers", model), max((len(prompt.ids) for prompt in prompts), default=0)
    chunk = max(1, at_once(model, longest + max_tokens) // group_size)
    for start in range(0, len(prompts), chunk):
        some = slice(start, start + chunk)
        uniforms = torch.cat([
            torch.rand(group_size, max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds[some]]) if temperature else None
        yield from filter(None, decode(
            model, prompts[some], group_size, max_tokens, stop, temperature, min_tokens, uniforms))
    model.train(was_training)


def at_once(model, tokens: int) -> int:
    """How many sequences of so many tokens are decoded at a time. A GPU needs room for their keys and values,
    twice while the cache grows."""
    if model.device.type != "cuda":
        return MAX_SEQUENCES
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_a_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(MAX_SEQUENCES, free // (2 * of_a_token * tokens))


def sample(model, prompts: list[list[int]], *arguments, **options) -> list[Sample]:
    """All samples of `rollouts` for prompts given as token ids, in the order of the prompts."""
    prompts = [Prompt(ids, number=number) for number, ids in enumerate(prompts)]
    groups = [group for groups in rollouts(model, prompts, *arguments, **options) for group in groups]
    return [one for group in sorted(groups, key=lambda group: group.prompt.number) for one in group.samples]
