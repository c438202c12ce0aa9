"""The policy: its model, and `token_logps`, the one place where log-probs of given tokens are computed.

Trainer, reference server and examples call `token_logps`, so policy and reference agree to rounding before the first
update.
"""
import copy
import hashlib
import os
import re
import sys

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from grpo.attention import layout, pack_attention
from grpo.constants import explained, require
from grpo.fused import fuse
from grpo.head import head_logps
from grpo.types import split

CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
                 "{% if add_generation_prompt %}Assistant:{% endif %}")  # for base models that have none


UNADAPTED = {  # linear layers that peft refuses, or whose output is not a tensor
    "mamba2": ["out_proj", "conv1d"], "falcon_h1": ["out_proj", "conv1d"], "llama4_text": ["router"]}


class Policy:
    """Two sets of modules with the same parameters: `module` is trained, `model` samples and is saved.

    `module` is a function from ragged rows to log-probs, so that DeepSpeed sees the whole forward pass. `model` has no
    hooks of DeepSpeed: with hooks and ZeRO 3 all processes would have to make as many forward passes, but the longest
    completion is not the same everywhere.
    """

    def __init__(self, path: str, max_length: int, dtype: str = "auto", temperature=1.0, lora_rank=0, seed=0,
                 gradient_checkpointing=False, trust_remote_code=False):
        require(temperature > 0, f"TEMPERATURE={temperature}: sampling needs a positive one")
        trained, self.tokenizer = load_model(path, max_length, dtype, trust_remote_code)
        self.path, self.max_length, self.trust_remote_code = path, max_length, trust_remote_code
        self.vocab_size = trained.get_input_embeddings().weight.shape[0]
        self.stop_ids, self.fingerprint = stop_ids(trained, self.tokenizer), fingerprint(trained)
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
    require(name in known, f"DTYPE={name}: expected one of {', '.join(known)}")
    return known[name]


def load_model(path: str, tokens: int = 0, dtype: str = "auto", trust_remote_code=False):
    """The model at `path` (folder or hub name) as a causal LM, see `dtype_called`, and its tokenizer.

    SystemExit if it cannot be loaded, or has no room for so many `tokens` of prompt and completion.
    """
    require(path, "MODEL is empty: name a folder or a model of the hub")
    require(os.path.exists(f"{path}/config.json") or not os.path.exists(f"{path}/adapter_config.json"),
            f"MODEL={path} is a LoRA adapter: merge it with its model (peft: merge_and_unload) and name that folder")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    trust = {"trust_remote_code": trust_remote_code}
    hint = " (TRUST_REMOTE_CODE=True runs a model's own code; the embedded model: python examples/arithmetic.py)"
    with explained(f"cannot load MODEL={path}", hint=hint):  # broken files may raise anything
        config = AutoConfig.from_pretrained(path, **trust)
        text = config.get_text_config()
        for part in config, text:  # the policy that samples has no dropout, nor has the reference
            noise = {name: 0.0 for name, value in vars(part).items()
                     if re.search("drop|jitter", name) and isinstance(value, float)}
            part.update(noise)
        if getattr(text, "attn_logit_softcapping", None):
            config._attn_implementation = "eager"  # SDPA would leave Gemma 2's cap out without a word
        require(text.model_type != "phimoe", f"MODEL={path} routes at random while it trains: it cannot be trained")
        quantised = getattr(config, "quantization_config", None) or {}
        if quantised.get("quant_method") in ("fp8", "mxfp4"):
            quantised["dequantize"] = True  # a GPU would keep weights that no gradient passes
        has_vision = "ConditionalGeneration" in str(config.architectures)
        kind = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        model = from_pretrained(kind, path, config=config, dtype=dtype_called(dtype), **trust).to(device).eval()
        if os.path.exists(f"{path}/generation_config.json"):
            type(model.generation_config).from_pretrained(path)  # without one that is broken transformers just goes on
        if has_vision:  # the vision part is never used here
            model.requires_grad_(False)
            for part in body_of(model), model.get_output_embeddings():
                part.requires_grad_(True)
        pack_attention(model)
        if device.type == "cuda":
            fuse(model)
            torch.backends.cuda.enable_cudnn_sdp(False)  # makes a plan for each new shape: at every decoded token
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    require(not getattr(model, "is_quantized", False), f"MODEL={path} is quantised, so it cannot be trained: name the "
                                                       "model that it was made from")
    repair(model)
    try:
        check_logps(model, path)
    except (RuntimeError, TypeError):  # Nemotron's attention is not handed the layout
        require(model.config._attn_implementation == "packed", f"MODEL={path}: its forward pass fails")
        model.set_attn_implementation("sdpa")
        check_logps(model, path)
    rows, longest = model.get_input_embeddings().weight.shape[0], max_tokens_of(model)
    require(tokens <= longest, f"MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS = {tokens} is over the {longest} tokens of "
                               f"MODEL={path}")
    require(tokenizer.decode(tokenizer("1 a").input_ids, skip_special_tokens=True),
            f"MODEL={path}: its tokenizer knows neither letters nor digits: is tokenizer.json missing?")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = all(number < rows for number in tokenizer.get_vocab().values() if number not in special)  # Gemma 3's image
    require(known, f"MODEL={path}: the tokenizer has {len(tokenizer)} ids, the embedding only {rows}: "
                   "save the model after model.resize_token_embeddings(len(tokenizer))")
    return model, tokenizer


def from_pretrained(kind, path: str, **options):
    """`kind.from_pretrained`, or ValueError where transformers goes on with random numbers for missing weights."""
    model, found = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    wrong |= {name for name, tensor in model.named_parameters() if tensor.itemsize > 1 and not tensor.isfinite().all()}
    if wrong:
        raise ValueError("its files lack these weights, or hold them in another shape than config.json says, or with "
                         f"NaN: {', '.join(sorted(wrong))}")
    return model


def repair(model) -> None:
    """Settings with which a model would fail later on: at the first save, or while it samples."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        print(f"generation_config.json of {model.name_or_path} is invalid and saved with do_sample=True: "
              f"{str(error).splitlines()[0]}", flush=True)
        model.generation_config.do_sample = True  # most often it holds a temperature, but says that it is greedy
    model.config.get_text_config().output_router_logits = False  # for a loss that is not computed here


def fingerprint(model) -> str:
    """A name for the model's weights: another one for other weights, the same in float32 and in bfloat16."""
    rounded = (parameter.detach().bfloat16().view(torch.int16) for parameter in model.parameters())
    return hashlib.sha256(repr([part.sum().item() for part in rounded]).encode()).hexdigest()[:12]


def max_tokens_of(model) -> int:
    """How many tokens a row may have."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # a longer row changes the frequencies of all rows, but not the cache
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", sys.maxsize)


def body_of(model):
    """The part of the model between its input ids and the last hidden states."""
    found = model.get_decoder()
    return found.model if hasattr(found, "lm_head") else found  # Llama 4's is a whole language model


def add_adapters(model, rank: int, seed: int):
    """LoRA (arXiv 2106.09685) at the linear layers that peft can adapt, not at the LM head: `model` itself changes, and
    from now on only the adapters are trained. What is returned is the same model for saving, as `checkpoint.save` needs
    it. Prints which layers they are, because experts may not be among them.

    LoRA shows elsewhere in `checkpoint.merged`, which the reference and vLLM take their weights from, in
    `checkpoint.write`, and in `open_sampler`.
    """
    from peft import LoraConfig, get_peft_model  # here, because it takes half a second and 13 MB

    config = model.config.get_text_config()
    require(rank <= config.hidden_size, f"LORA_RANK={rank} is over the {config.hidden_size} numbers of a hidden state: "
                                        "it would save nothing")
    torch.manual_seed(seed)
    body = {*body_of(model).modules()}  # not the vision part
    outside = [name for name, module in model.named_modules() if name and module not in body]
    whole = get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
        exclude_modules=[*UNADAPTED.get(config.model_type, []), *outside]))
    adapted = {name.partition(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    if os.environ.get("RANK", "0") == "0":
        print("LoRA adapts", ", ".join(sorted(adapted - {"base_layer"})), flush=True)
    return whole


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: the generation config may name several, the tokenizer one more."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    ids = {i for i in [*ids, tokenizer.eos_token_id] if i is not None}
    wrong = f"generation_config.json: eos_token_id is {configured!r}, expected a token's number or a list of them"
    require(all(isinstance(i, int) for i in ids), wrong)
    rows = model.get_input_embeddings().weight.shape[0]
    return sorted(i for i in ids if 0 <= i < rows)  # no other one is ever drawn


# ------------------------------------------------------------------------------------------------- log-probs

def token_logps(model, tokens, prompt_lens, completion_lens, temperature=1.0):
    """Log-probs of the completion tokens under `model` at a temperature; ragged rows in, ragged log-probs out.

    tokens (N,) every row's prompt then its completion; prompt_lens, completion_lens (B,), all at least 1.
    Returns (sum(completion_lens),) float32, natural log, differentiable. No mask by token value anywhere, so EOS
    counts also where it doubles as padding. Rows are padded on the right, where a causal model never looks.
    """
    lens = prompt_lens + completion_lens
    position = torch.arange(int(lens.max()), device=tokens.device)
    is_token = position < lens[:, None]  # (B, L)
    is_completion = is_token & (position >= prompt_lens[:, None])
    rows = torch.zeros_like(is_token, dtype=torch.long).masked_scatter(is_token, tokens.long())
    where = layout(rows, lens)
    packed = model.config._attn_implementation == "packed"
    inputs = where.one_row() if packed else {"input_ids": rows}
    hidden = body_of(model)(**inputs, use_cache=False).last_hidden_state
    hidden = hidden[0] if packed else hidden[where.computed]  # (computed, H)
    nodes, of_each = where.number[is_completion].unique(return_inverse=True)  # tokens that rows share are there once
    # shift by one: position t predicts t + 1. Unlike an index, an embedding adds gradients up in a fixed order
    hidden = functional.embedding(where.before[nodes], hidden)
    return head_logps(model, hidden, where.tokens[nodes], temperature)[of_each]  # (C,)


@torch.no_grad()
def check_logps(model, path: str) -> None:
    """SystemExit if `token_logps` is not what the model's own logits say, because it scales or caps them in a way that
    `head_logps` does not know."""
    ids = torch.arange(8, device=model.device)
    expected = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    error = (token_logps(model, ids, ids[1:2], 7 * ids[1:2]) - expected).abs().mean()
    limit = 1e-3 if model.dtype == torch.float32 else 0.1  # bfloat16 rounds SmolLM2's by 1 %
    right = error < limit * expected.abs().mean()
    require(right, f"MODEL={path}: {type(model).__name__} computes its logits in a way of its own (log-probs differ by "
                   f"{error:.1f}): it cannot be trained")


@torch.no_grad()
def batched_logps(model, tokens, prompt_lens, completion_lens, temperature, budget):
    """`token_logps` of any number of rows, as a tensor on the CPU: `budget` tokens at a time, half of it when memory is
    short."""
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
