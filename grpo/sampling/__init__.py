"""Samplers: each yields finished groups of completions, see `transformers.rollouts`."""
from functools import partial

from grpo.sampling import graph, transformers


def open_sampler(name: str, model, gathered, path: str, max_length: int, vllm_memory: float):
    """The generator `rollouts` of SAMPLER=`name`, and `ready`, a context in which it samples from the weights of
    `model` as they are now. Within `gathered()` these are whole; `path` is where vLLM finds the model's shape."""
    if name == "vllm":
        from grpo.sampling.vllm import Engine  # here, because vLLM is optional
        engine = Engine(path, max_length, vllm_memory, str(model.dtype).removeprefix("torch."))
        return engine.rollouts, partial(engine.ready, model, gathered)
    modules = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA's, adapters included
    return partial(transformers.rollouts, modules, decoder=graph.decoder(name, modules)), gathered
