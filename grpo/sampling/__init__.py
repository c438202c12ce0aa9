"""Samplers. Each is a generator of finished groups, see `transformers.rollouts`."""
from contextlib import nullcontext
from functools import partial

from grpo.sampling import graph, transformers


def open_sampler(name: str, policy, max_tokens: int, vllm_memory: float):
    """SAMPLER=`name` as `rollouts(prompts, group_size, temperature, seeds=None, min_tokens=0)`.

    All processes call it together. It yields lists of finished groups, sampled from the policy's weights as they are
    then, of at most `max_tokens` tokens.
    """
    if name == "vllm":
        from grpo.sampling.vllm import Engine  # here, because vLLM is optional
        generate, whole = Engine(policy, vllm_memory).rollouts, nullcontext  # it copies the weights
    else:
        model = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model  # LoRA's
        generate, whole = partial(transformers.rollouts, model, decoder=graph.decoder(name, model)), policy.gathered

    def rollouts(prompts, group_size, temperature, seeds=None, min_tokens=0):
        with whole():
            yield from generate(prompts, group_size, temperature=temperature, seeds=seeds, max_tokens=max_tokens,
                                min_tokens=min_tokens, stop=policy.stop_ids)
    return rollouts
