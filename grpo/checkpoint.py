"""What a run keeps, so that the same command continues it as if it had never been interrupted.

    OUTPUT_DIR/run.json      the constants that it was started with, and what identifies the data
    OUTPUT_DIR/index.html    a page to watch it: python -m http.server -d OUTPUT_DIR
    OUTPUT_DIR/step_N/       model and tokenizer for `from_pretrained`, LoRA's adapters merged, and alone in adapter/;
                             a model card in README.md, with reward.png;
                             in state/ what DeepSpeed continues from, and the reference if it does not stay the same

A checkpoint gets its name when it is complete and loses it before it is deleted, so what is called step_N is whole; the
model card comes after that, since it takes half a second and nothing depends on it.
Everything random in a step follows from SEED and the step's number: there is no other state.
"""
import copy
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from transformers.utils import cached_file

from grpo import report
from grpo.constants import explained, require
from grpo.distributed import of_all
from grpo.scoring import name_of

MAY_CHANGE = ("OUTPUT_DIR RESUME STEPS SAVE_EVERY EVAL_EVERY KEEP_CHECKPOINTS REF_SERVER "
              "MICRO_BATCH_TOKENS GRADIENT_CHECKPOINTING TRACKERS DS_CONFIG").split()
PROCESSOR_FILES = "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"


def complete(folder: str) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    names = [path.name.removeprefix("step_") for path in Path(folder).glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal())


def begin(folder: str, constants: dict, resume: bool) -> tuple[int, str]:
    """Makes the folder ready for a new run, or for the rest of the one that it holds; by all processes together.

    Returns the step after which the run goes on, and a name for this start of it. SystemExit if the folder holds a run
    with other constants, or if a process, on another machine perhaps, does not see it.
    """
    require(folder, "OUTPUT_DIR is empty: name a folder")
    if dist.get_rank() == 0:
        constants |= digests(constants)
    with writing_to(folder):
        last = prepare(Path(folder), constants, resume) if dist.get_rank() == 0 else 0
    last, start = of_all((last, os.urandom(6).hex()))[0]
    require((Path(folder) / "run.json").exists(),
            f"OUTPUT_DIR={folder} is not the folder of the first process: the machines have to share it")
    return last, start


def prepare(path: Path, constants: dict, resume: bool) -> int:
    """The first process's part of `begin`: removes what the run wrote after its last checkpoint, whose step it gives.
    """
    trackers = constants.get("TRACKERS", [])
    fixed = [name for name in constants if name not in MAY_CHANGE]
    constants = {name: constants[name] for name in constants if name in [*fixed, "STEPS"]}
    now = json.loads(json.dumps(constants, default=name_of))
    path.mkdir(parents=True, exist_ok=True)
    lock(path)
    if (path / "metrics.jsonl").exists():
        before = json.loads((path / "run.json").read_text()) if (path / "run.json").exists() else {}
        changed = [f"{name}={old} there" for name, old in before.items() if name in fixed and old != now[name]]
        hint = "; ".join(changed[:3]) or "RESUME=True continues it"
        require(resume and not changed, f"OUTPUT_DIR={path} holds another run: choose another ({hint})")
    last = max([0, *complete(path)])
    state = path / f"step_{last}/state"
    require(not last or state.is_dir(), f"{state.parent} has no state/ to continue from: move it away to continue "
            f"from an earlier step, or begin a new run with MODEL={state.parent}")
    replace(path / "run.json", json.dumps(now, indent=1))
    shutil.copy(Path(__file__).with_name("page.html"), path / "index.html")
    told_again = filter(Path.is_dir, map(path.joinpath, trackers))
    for leftover in [*path.glob("step_*.unfinished"), *told_again]:
        shutil.rmtree(leftover)
    if (state / "reference.safetensors").exists():
        shutil.copy(state / "reference.safetensors", path)
    for name in {"metrics.jsonl", "completions.jsonl"} & set(os.listdir(path)):
        cut(path / name, last)
    return last


def digests(constants: dict) -> dict[str, str]:
    """SHA-256 of data sets that are files, so that a run is not continued on other data."""
    paths = {name: constants.get(name, "").split(":")[0] for name in ("DATASET", "EVAL_DATASET")}
    return {f"SHA-256 of {name}": hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for name, path in paths.items() if os.path.isfile(path)}


def writing_to(folder):
    """A context in which an OSError becomes SystemExit, because OUTPUT_DIR cannot be written."""
    return explained(f"OUTPUT_DIR={folder} cannot be written", OSError)


def lock(path: Path) -> None:
    """Keeps other runs out of the folder until this process ends, however it ends; or SystemExit names the other."""
    file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT)  # never closed, because that would give the lock back
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"OUTPUT_DIR={path} is in use by {os.read(file, 200).decode()}: end that run, or choose "
                         "another folder") from None
    os.truncate(file, os.pwrite(file, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0))


def rehearse(policy, folder: str, renews=0) -> None:
    """SystemExit for what would make the first save fail: files that transformers refuses to write, a full disk.

    If the run `renews` the reference, its weights are there three times: in use, being written, and in a checkpoint.
    """
    if dist.get_rank() > 0:
        return
    model = policy.model
    with (explained(f"MODEL={policy.path} cannot be saved by transformers"),
          TemporaryDirectory(".unfinished", "step_", folder) as trial):
        model.config.save_pretrained(trial)
        model.generation_config.save_pretrained(trial)
        save_tokenizer(policy, trial)
    # weights are in the model and in DeepSpeed's state, where ZeRO 2 writes frozen ones twice
    needed = sum(one.nbytes * (2 if one.requires_grad else 3) + 12 * one.numel() * (one.requires_grad + bool(renews))
                 for one in model.parameters())
    free = shutil.disk_usage(folder).free
    require(free > needed, f"OUTPUT_DIR={folder} has room for {free / 1e9:.1f} GB, a checkpoint takes up to "
                           f"{needed / 1e9:.1f} GB: choose another disk, or LORA_RANK")


def cut(path: Path, last: int) -> None:
    """Removes the rows after a step, all of them if it is 0, and a line that was never finished."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if last and line.endswith("}\n") and json.loads(line)["step"] <= last]
    replace(path, "".join(kept))


def replace(path: Path, text: str) -> None:
    """A file's new text, all of it or not at all."""
    path.with_suffix(".unfinished").write_text(text)
    os.replace(path.with_suffix(".unfinished"), path)


def merged(model, device="cpu"):
    """The model as `from_pretrained` knows it: itself, or a copy on the device with its LoRA adapters added to the
    weights. LoRA is for GPUs that have no room for such a copy."""
    if not hasattr(model, "merge_and_unload"):
        return model
    parameters = {id(one): torch.nn.Parameter(one.detach().to(device, copy=True), one.requires_grad)
                  for one in model.parameters()}
    return copy.deepcopy(model, parameters).merge_and_unload()


def save(engine, policy, folder: str, step: int, keep: int) -> None:
    """folder/step_N, by all processes together; the `keep` newest stay, with 0 all of them.

    SystemExit says why it could not be written.
    """
    final = Path(folder) / f"step_{step}"
    unfinished = final.with_suffix(".unfinished")
    hint = f"; complete checkpoints: {complete(folder)}. Make room and start the same command again"
    with explained(f"cannot save {final}", hint=hint):
        engine.save_checkpoint(str(unfinished), tag="state", save_latest=False)
        with policy.gathered():
            if dist.get_rank() > 0:
                return
            write(unfinished, policy)
        unfinished.rename(final)
        for old in complete(folder)[:-keep]:
            doomed = Path(folder) / f"step_{old}"
            shutil.rmtree(doomed.rename(doomed.with_suffix(".unfinished")))
    try:
        report.card(Path(folder), final)
    except Exception as error:  # whatever it is, the weights are worth more
        print(f"{final.name}: the model card is not whole: {error!r}", flush=True)


def write(unfinished: Path, policy) -> None:
    """The part of a checkpoint that one process writes for all of them."""
    plain = merged(policy.model)
    reference = unfinished.parent / "reference.safetensors"
    plain.save_pretrained(unfinished)
    save_tokenizer(policy, unfinished)
    if plain is not policy.model:
        policy.model.save_pretrained(unfinished / "adapter")
    if reference.exists():
        shutil.copy(reference, unfinished / "state")


def save_tokenizer(policy, folder: Path) -> None:
    """The tokenizer, and of a vision-language checkpoint the files of its processor."""
    policy.tokenizer.save_pretrained(folder)
    for name in PROCESSOR_FILES if hasattr(policy.model.config, "vision_config") else ():
        if found := cached_file(policy.path, name, _raise_exceptions_for_missing_entries=False,
                                _raise_exceptions_for_connection_errors=False):  # a save needs no network
            shutil.copy(found, folder)


def load(engine, folder: str, step: int) -> None:
    """Weights and optimizer as they were after the step. SystemExit if a part of them is missing or broken."""
    with explained(f"{folder}/step_{step}/state is not whole",
                   hint=f" (move step_{step} away to continue from an earlier step)"):
        engine.load_checkpoint(f"{folder}/step_{step}", tag="state", load_lr_scheduler_states=False)
