"""transformers' own `generate` as the sampler, for models that keep more of a text than keys and values.

Whatever `generate` can run (state spaces, convolutions, chunked attention), with the random numbers of the other
samplers. It is slower: a prompt is prefilled for each of its completions, and no sequence leaves the batch before all
have ended.
"""
import torch
from transformers import GenerationConfig, LogitsProcessor

from grpo.sampling.transformers import Written, draw, padded


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
    written = Written(prompts, group_size, max_tokens, stop, model.device)
    written.add(torch.arange(len(ids), device=model.device), 0, tokens, torch.stack(drawing.logps, 1))
    yield written.finished(ids[:0, 0])
