"""A reward model: a sequence classifier in transformers as a reward function."""
import os


def set_padding(model, tokenizer) -> None:
    """The model reads its logit at the last token that is no padding: both have to know the same one, on the right."""
    tokenizer.padding_side = "right"
    tokenizer.pad_token = pad = tokenizer.pad_token or tokenizer.eos_token
    for config in model.config, model.config.get_text_config():
        config.pad_token_id = tokenizer.convert_tokens_to_ids(pad)


def logits_of(model, tokenizer, texts: list[str]):
    """The classifier's first logit (B,) for each of B texts."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt",
                       add_special_tokens=tokenizer.cls_token is not None).to(model.device)
    return model(**tokens).logits[:, 0]


# algorithm 1: r_phi
def reward_model(path: str, device=None, batch_size: int = 16):
    """A reward function from a sequence classification model with one label: its logit for prompt + completion.

    It stays on `device`, by default this process's GPU, or the CPU if there is none. ValueError for several labels.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from grpo.policy import from_pretrained
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = device or (gpu if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = from_pretrained(AutoModelForSequenceClassification, path).to(device).eval()
    if model.config.num_labels != 1:
        raise ValueError(f"the reward model {path} has {model.config.num_labels} labels: expected 1")
    set_padding(model, tokenizer)

    @torch.inference_mode()
    def reward(completions, prompts, **columns):
        both = [prompt + written for prompt, written in zip(prompts, completions, strict=True)]  # texts or messages
        both = [one if isinstance(one, str) else tokenizer.apply_chat_template(one, tokenize=False) for one in both]
        values = []
        for start in range(0, len(both), batch_size):
            values += logits_of(model, tokenizer, both[start : start + batch_size]).tolist()
        return values
    reward.__name__ = os.path.basename(os.path.normpath(path))
    return reward
