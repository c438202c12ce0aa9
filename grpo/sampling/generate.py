"""transformers' own `generate` as the sampler, for models that keep more of a text than keys and values.

Whatever `generate` can run (state spaces, convolutions, chunked attention), with the random numbers of the other
samplers. It is slower: a prompt is prefilled for each of its completions, and no sequence leaves the batch before all
have ended.
"""
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo.sampling.transformers import Written, draw, padded


def is_needed(model) -> bool:
    """Whether the model's memory of a text has parts that `transformers.decode` does not know."""
    known = DynamicLayer, DynamicSlidingWindowLayer
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return (model._is_stateful or "chunked_attention" in kinds
            or any(type(layer) not in known for layer in DynamicCache(config=model.config).layers))


class Draw(LogitsProcessor):
    """Leaves `generate` no choice: of all tokens only the drawn one keeps a finite score."""

    def __init__(self, stop, temperature, min_tokens, uniforms):
        self.stop, self.temperature, self.min_tokens, self.uniforms = stop, temperature, min_tokens, uniforms
        self.logps = []

    def __call__(self, ids, scores):
        scores, t = scores.float() / (self.temperature or 1), len(self.logps)
        if t < self.min_tokens - 1:
            scores[:, self.stop] = -torch.inf
        token, logp = draw(scores, self.uniforms[:, t] if self.temperature else None)
        self.logps.append(logp)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0)


@torch.no_grad()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms):
    """As `transformers.decode`."""
    ids, mask = (tensor.repeat_interleave(group_size, 0) for tensor in padded(prompts, model.device))
    drawing = Draw(stop, temperature, min_tokens, uniforms.to(model.device) if temperature else None)
    own, model.generation_config = model.generation_config, GenerationConfig()  # its penalties are not the policy's
    try:
        tokens = model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=[drawing], max_new_tokens=max_tokens,
            do_sample=False, eos_token_id=stop, pad_token_id=0, synced_gpus=False)[:, ids.shape[1] :]
    finally:
        model.generation_config = own
    written = Written(prompts, group_size, max_tokens, model.device)
    written.tokens[:, : tokens.shape[1]] = tokens
    written.logps[:, : tokens.shape[1]] = torch.stack(drawing.logps, 1)
    stops = torch.isin(tokens, torch.tensor(stop, device=model.device))
    written.ended = stops.any(1)
    written.lengths[written.ended] = 1 + stops[written.ended].int().argmax(1)
    yield written.finished(written.lengths[:0])
