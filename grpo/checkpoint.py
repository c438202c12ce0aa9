"""What a run keeps, so that the same command continues it as if it had never been interrupted.

    OUTPUT_DIR/run.json      the constants that it was started with
    OUTPUT_DIR/index.html    a page to watch it: python -m http.server -d OUTPUT_DIR
    OUTPUT_DIR/step_N/       model and tokenizer for `from_pretrained`, LoRA's adapters merged, and alone in adapter/;
                             a model card in README.md, with reward.png;
                             in state/ what DeepSpeed continues from, and the reference if it does not stay the same

A checkpoint gets its name when it is complete and loses it before it is deleted, so what is called step_N is whole; the
model card comes after that, since it takes half a second and nothing depends on it.
Everything random in a step follows from SEED and the step's number: there is no other state.
"""
import copy
import json
import os
import secrets
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from grpo import report
from grpo.constants import require
from grpo.distributed import from_first

MAY_CHANGE = ("OUTPUT_DIR RESUME STEPS SAVE_EVERY EVAL_EVERY KEEP_CHECKPOINTS REF_SERVER "
              "MICRO_BATCH_TOKENS GRADIENT_CHECKPOINTING TRACKERS DS_CONFIG").split()


def complete(folder: str) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    names = [path.name.removeprefix("step_") for path in Path(folder).glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal())


def begin(folder: str, constants: dict, resume: bool) -> tuple[int, str]:
    """Makes the folder ready for a new run, or for the rest of the one that it holds; by all processes together.

    Returns the step after which the run goes on, and a name for this start of it. SystemExit if the folder holds a run
    with other constants, or if a process, on another machine perhaps, does not see it.
    """
    last = prepare(Path(folder), constants, resume) if dist.get_rank() == 0 else 0
    last, start = from_first((last, secrets.token_hex(6)))
    require((Path(folder) / "run.json").exists(),
            f"OUTPUT_DIR={folder} is not the folder of the first process: the machines have to share it")
    return last, start


def prepare(path: Path, constants: dict, resume: bool) -> int:
    """The first process's part of `begin`: removes what the run wrote after its last checkpoint, whose step it gives.
    """
    fixed = [name for name in constants if name not in MAY_CHANGE]
    constants = {name: constants[name] for name in constants if name in [*fixed, "STEPS"]}
    now = json.loads(json.dumps(constants, default=lambda function: function.__name__))
    if (path / "metrics.jsonl").exists():
        before = json.loads((path / "run.json").read_text()) if (path / "run.json").exists() else {}
        changed = [f"{name}={before.get(name)} there" for name in fixed if before.get(name, now[name]) != now[name]]
        hint = "; ".join(changed[:3]) or "RESUME=True continues it"
        require(resume and not changed, f"OUTPUT_DIR={path} holds another run: choose another ({hint})")
    try:
        path.mkdir(parents=True, exist_ok=True)
        replace(path / "run.json", json.dumps(now, indent=1))
        shutil.copy(Path(__file__).with_name("page.html"), path / "index.html")
    except OSError as error:
        raise SystemExit(f"OUTPUT_DIR={path} cannot be written: {error}") from error
    for leftover in path.glob("step_*.unfinished"):
        shutil.rmtree(leftover)
    last = max([0, *complete(path)])
    if (reference := path / f"step_{last}/state/reference.safetensors").exists():
        shutil.copy(reference, path)
    for name in "metrics", "completions":
        cut(path / f"{name}.jsonl", last)
    return last


def cut(path: Path, last: int) -> None:
    """Removes the rows after a step, all of them if it is 0, and a line that was never finished."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if last and line.endswith("}\n") and json.loads(line)["step"] <= last]
    if len(kept) < len(lines):
        replace(path, "".join(kept))


def replace(path: Path, text: str) -> None:
    """A file's new text, all of it or not at all."""
    path.with_suffix(".unfinished").write_text(text)
    os.replace(path.with_suffix(".unfinished"), path)


def merged(model):
    """The model as `from_pretrained` knows it: itself, or a copy with its LoRA adapters added to the weights."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model


def save(engine, policy, folder: str, step: int, keep: int) -> None:
    """folder/step_N, by all processes together; the `keep` newest stay. SystemExit says why it could not be written."""
    final, first = Path(folder) / f"step_{step}", dist.get_rank() == 0
    unfinished = final.with_suffix(".unfinished")
    try:
        engine.save_checkpoint(str(unfinished), tag="state", save_latest=False)
        with policy.gathered():
            if first:
                write(unfinished, policy.model, policy.tokenizer)
        if first:
            os.replace(unfinished, final)
            for old in complete(folder)[:-keep] if keep else []:
                doomed = Path(folder) / f"step_{old}.unfinished"
                os.replace(doomed.with_suffix(""), doomed)
                shutil.rmtree(doomed)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"cannot save {final}: {error}; complete checkpoints: {complete(folder)}. "
                         "Make room and start the same command again") from error
    if first:
        try:
            report.card(Path(folder), final)
        except Exception as error:  # whatever it is, the weights are worth more
            print(f"{final.name}: the model card is not whole: {error!r}", flush=True)


def write(unfinished: Path, model, tokenizer) -> None:
    """The part of a checkpoint that one process writes for all of them."""
    plain, reference = merged(model), unfinished.parent / "reference.safetensors"
    plain.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if plain is not model:
        model.save_pretrained(unfinished / "adapter")
    if reference.exists():
        shutil.copy(reference, unfinished / "state")


def load(engine, folder: str, step: int) -> None:
    """Weights and optimizer as they were after the step."""
    engine.load_checkpoint(f"{folder}/step_{step}", tag="state", load_lr_scheduler_states=False)
