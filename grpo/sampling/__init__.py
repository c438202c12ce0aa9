"""Samplers. Each is a generator of finished groups, see `transformers.rollouts`."""
from functools import partial

from grpo.sampling import graph, transformers


def open_sampler(name: str, policy, max_tokens: int, vllm_memory: float):
    """SAMPLER=`name` as `rollouts(prompts, group_size, temperature=1.0, min_tokens=0, seeds=None)`.

    All processes call it together. It yields lists of finished groups, sampled from the policy's weights as they are
    then, of at most `max_tokens` tokens.
    """
    options = {"max_tokens": max_tokens, "stop": policy.stop_ids}
    if name == "vllm":
        from grpo.sampling.vllm import Engine  # here, because vLLM is optional
        return partial(Engine(policy, vllm_memory).rollouts, **options)
    model = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model  # LoRA's
    options["decoder"] = graph.decoder(name, model)

    def rollouts(prompts, group_size, **others):
        with policy.gathered():
            yield from transformers.rollouts(model, prompts, group_size, **options, **others)
    return rollouts
