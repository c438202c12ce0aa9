"""The upper-case names at the top of a script: set for one run as NAME=value, and looked at before anything starts."""


def override_constants(constants: dict, arguments: list[str]) -> None:
    """Set upper-case `constants` (a script's globals()) from NAME=value arguments, of the same type as the default."""
    valid = {name: value for name, value in constants.items() if name.isupper()}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "--local_rank":  # the deepspeed launcher's own; the environment says the same
            continue
        if name not in valid:
            raise SystemExit(f"unknown constant {argument!r}: write NAME=value with one of {', '.join(valid)}")
        kind = type(valid[name])
        read = {bool: {"True": True, "False": False}.__getitem__, list: lambda names: names.split(",")}.get(kind, kind)
        try:
            constants[name] = read(text)
        except (ValueError, KeyError):
            raise SystemExit(f"{name}={text}: expected {kind.__name__}, as in {name}={valid[name]}") from None


def require(condition, sentence: str) -> None:
    """SystemExit with the sentence if the condition does not hold."""
    if not condition:
        raise SystemExit(sentence)


def check_constants(constants: dict, processes: int) -> None:
    """SystemExit at the first of grpo_train.py's constants that cannot be right, for so many processes."""
    allowed = {"LOSS_TYPE": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo"), "IMPORTANCE": ("token", "sequence"),
               "ADVANTAGE_SCALE": ("group", "batch", "none"), "ZERO_STAGE": (0, 1, 2, 3),
               "SAMPLER": ("auto", "transformers", "graph", "vllm")}
    for name, values in allowed.items():
        if constants[name] not in values:
            raise SystemExit(f"{name}={constants[name]}: expected one of {', '.join(map(str, values))}")
    wrong = {
        "PROMPTS_PER_STEP": lambda n: n % processes and f"cannot be shared equally by {processes} processes",
        "GROUP_SIZE": lambda n: n < 2 and "a group needs at least 2 completions to compare",
        "TEMPERATURE": lambda t: t <= 0 and "sampling needs a positive one",
        "IS_CAP": lambda cap: cap <= 0 and "a weight is positive",
        "UPDATES_PER_BATCH": lambda n: n < 1 and "a batch is for one update at least",
        "TRACKERS": lambda names: {*names} - {"csv", "tensorboard", "wandb"} and "expected csv, tensorboard, wandb",
        "REF_MIXUP_ALPHA": lambda alpha: not 0 < alpha <= 1 and "expected above 0, up to 1",
        "ZERO_STAGE": lambda n: n == 0 and constants["DS_CONFIG"]["bf16"]["enabled"] and (
            "in bfloat16 DeepSpeed's first update is a quarter too small then: use 1"),
        "REF_SYNC_EVERY": lambda n: n and not constants["BETA"] and "with BETA=0 there is no reference",
    }
    for name, reason in wrong.items():
        if sentence := reason(constants[name]):
            raise SystemExit(f"{name}={constants[name]}: {sentence}")
