"""transformers' own `generate` as the sampler, for models that keep more of a text than keys and values.

Whatever `generate` can run (state spaces, convolutions, chunked attention), with the random numbers of the other
samplers. It is slower: a prompt is prefilled for each of its completions, and no sequence leaves the batch before all
have ended.
"""
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from grpo.sampling.transformers import Written, draw


@torch.no_grad()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms):
    """As `transformers.decode`."""
    rows = [torch.tensor(prompt.ids) for prompt in prompts for _ in range(group_size)]
    ids, mask = (pad_sequence(some, batch_first=True, padding_side="left").to(model.device)
                 for some in (rows, [torch.ones_like(row) for row in rows]))
    uniforms, logps = uniforms.to(model.device) if temperature else None, []

    def only_drawn(_, scores):
        """Leaves `generate` no choice: of all tokens only the drawn one keeps a finite score."""
        scores, t = scores.float() / (temperature or 1), len(logps)
        if t < min_tokens - 1:
            scores[:, stop] = -torch.inf
        token, logp = draw(scores, uniforms[:, t] if temperature else None)
        logps.append(logp)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0)

    own, model.generation_config = model.generation_config, GenerationConfig()  # its penalties are not the policy's
    try:
        tokens = model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=[only_drawn], max_new_tokens=max_tokens,
            do_sample=False, eos_token_id=stop, pad_token_id=0, synced_gpus=False)[:, ids.shape[1] :]
    finally:
        model.generation_config = own
    written = Written(prompts, group_size, max_tokens, stop, model.device)
    written.add(torch.arange(len(ids), device=model.device), 0, tokens, torch.stack(logps, 1))
    yield written.finished(ids[:0, 0])
