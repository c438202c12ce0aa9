"""The policy: its model, and `token_logps`, the one place where log-probs of given tokens are computed.

Trainer, reference server and examples call `token_logps`, so policy and reference agree to rounding before the first
update.
"""
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.attention import layout, pack_attention
from grpo.constants import require
from grpo.fused import fuse
from grpo.head import embed_tied, head_logps
from grpo.types import split

CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
                 "{% if add_generation_prompt %}Assistant:{% endif %}")  # for base models that have none


class Policy:
    """The model twice, with the same parameters: `module` is trained, `model` samples and is saved.

    `module` is a function from packed rows to log-probs, so that DeepSpeed sees the whole forward pass. `model` has no
    hooks of DeepSpeed: with hooks and ZeRO 3 all processes would have to make as many forward passes, but the longest
    completion is not the same everywhere.
    """

    def __init__(self, path: str, max_length: int, dtype: str = "auto", temperature=1.0, lora_rank=0, seed=0,
                 gradient_checkpointing=False):
        require(temperature > 0, f"TEMPERATURE={temperature}: sampling needs a positive one")
        trained, self.tokenizer = load_model(path, max_length, dtype)
        self.path, self.max_length, self.stop_ids = path, max_length, stop_ids(trained, self.tokenizer)
        whole = add_adapters(trained, lora_rank, seed) if lora_rank else trained
        if gradient_checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        self.module = TokenLogps(trained, temperature)
        self.model = copy.deepcopy(whole, {id(parameter): parameter for parameter in trained.parameters()})

    def gathered(self):
        """A context, entered by all processes together, in which the parameters of `model` are whole with ZeRO 3."""
        import deepspeed  # here, because the reference server needs none
        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))


class TokenLogps(torch.nn.Module):
    """`token_logps` at a temperature."""

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, tokens, prompt_lens, completion_lens):
        return token_logps(self.model, tokens, prompt_lens, completion_lens, self.temperature)


# ------------------------------------------------------------------------------------------------- loading

def dtype_called(name: str) -> torch.dtype:
    """float32 or bfloat16; "auto" is bfloat16 on an accelerator, float32 on a CPU. SystemExit at another name."""
    auto = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    known = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise SystemExit(f"DTYPE={name}: expected one of {', '.join(known)}")
    return known[name]


def load_model(path: str, tokens: int = 0, dtype: str = "auto"):
    """The causal LM at `path` (folder or hub name), see `dtype_called`, and its tokenizer.

    SystemExit if it cannot be loaded, or has no room for so many `tokens` of prompt and completion.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype_called(dtype)).to(device).eval()
        pack_attention(model)
        if device.type == "cuda":
            fuse(model)
            torch.backends.cuda.enable_cudnn_sdp(False)  # makes a plan for each new shape: at every decoded token
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"cannot load MODEL={path}: {reason} (the embedded model: python examples/arithmetic.py)")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > longest:
        raise SystemExit(f"MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS is over the {longest} tokens of MODEL={path}")
    return model, tokenizer


def add_adapters(model, rank: int, seed: int):
    """LoRA (arXiv 2106.09685) at every linear layer but the LM head: `model` itself changes, and from now on only the
    adapters are trained. What is returned is the same model for saving, as `checkpoint.save` needs it."""
    from peft import LoraConfig, get_peft_model  # here, because it takes half a second and 13 MB

    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: the generation config may name several, the tokenizer one more."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


# ------------------------------------------------------------------------------------------------- log-probs

def token_logps(model, tokens, prompt_lens, completion_lens, temperature=1.0):
    """Log-probs of the completion tokens under `model` at a temperature; packed rows in, packed log-probs out.

    tokens (N,) every row's prompt then its completion; prompt_lens, completion_lens (B,), all at least 1.
    Returns (sum(completion_lens),) float32, natural log, differentiable. No mask by token value anywhere, so EOS
    counts also where it doubles as padding. Rows are padded on the right, where a causal model never looks.
    """
    lens = prompt_lens + completion_lens
    position = torch.arange(int(lens.max()), device=tokens.device)
    is_token = position < lens[:, None]  # (B, L)
    is_completion = is_token & (position >= prompt_lens[:, None])
    rows = torch.zeros_like(is_token, dtype=torch.long).masked_scatter(is_token, tokens.long())
    where = layout(rows, prompt_lens, lens)
    packed = model.config._attn_implementation == "packed"
    head_weight, inputs = embed_tied(model, rows[where.computed][None] if packed else rows)
    if packed:
        inputs |= {"layout": where, "position_ids": position.expand_as(rows)[where.computed][None],
                   "attention_mask": tokens.new_empty(1, 1, 0, 0)}  # for transformers not to make one of N x N
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    hidden = hidden[0] if packed else hidden[where.computed]  # (N, H)
    hidden = hidden[where.number[:, :-1][is_completion[:, 1:]]]  # shift by one: position t predicts t + 1; (C, H)
    return head_logps(model, hidden, rows[is_completion], head_weight, temperature)


@torch.no_grad()
def batched_logps(model, tokens, prompt_lens, completion_lens, temperature, budget):
    """`token_logps` of any number of rows, `budget` tokens at a time, half of it when memory is short; on the CPU."""
    lens, logps = (prompt_lens + completion_lens).tolist(), [None] * len(prompt_lens)
    rows = tokens.split(lens)
    try:
        for index in split(lens, budget):
            inputs = torch.cat([rows[i] for i in index]), prompt_lens[index], completion_lens[index]
            answer = token_logps(model, *(tensor.to(model.device) for tensor in inputs), temperature).cpu()
            for i, row_logps in zip(index, answer.split(completion_lens[index].tolist())):
                logps[i] = row_logps
        return torch.cat(logps)
    except torch.OutOfMemoryError:
        if budget <= max(lens):
            raise
    return batched_logps(model, tokens, prompt_lens, completion_lens, temperature, min(budget, sum(lens)) // 2)
