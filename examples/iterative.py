"""Iterative GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1): the reward model is trained along with the policy.

    python examples/iterative.py                     # any constant below as NAME=value; again, it goes on
    python examples/iterative.py MODEL=... DATASET=... EVAL_DATASET=... ANNOTATOR=... OUTPUT_DIR=...

An iteration has three commands: `grpo.evaluate` writes completions of the current policy, and a rule that stands for
annotators compares them; `preferences.py` trains the reward model on these pairs and on REPLAY of the old ones;
`grpo_train.py` trains the policy against it, with the policy as its new reference. No policy is rewarded by the rule.

Two controls: a policy that goes on against the first reward model, as many steps; and a reward model that is retrained
without replay. What OUTPUT_DIR holds already is not made again.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.stages import mean_reward, show  # noqa: E402
from grpo.checkpoint import replace  # noqa: E402
from grpo.constants import Over, constants_of, override_constants, require  # noqa: E402
from grpo.data import read, read_jsonl  # noqa: E402

MODEL = "examples/arithmetic/model"  # local folder or hub name
DATASET = "examples/arithmetic/train.jsonl"
QUESTION_ROWS: Over(0) = 400  # of DATASET, the first ones, whose completions are compared
EVAL_DATASET = "examples/arithmetic/heldout.jsonl"
ANNOTATOR = "reward_correct,reward_format"  # the rule; the first function is what the table calls accuracy
QUESTION_COLUMN = "question"
SYSTEM_PROMPT = "First reason between <think> and </think>, then give the answer between <answer> and </answer>."
OUTPUT_DIR = "runs/iterative"
ITERATIONS: Over(0) = 3
STEPS = 20  # of GRPO in an iteration
LR = 5e-5
BETA: Over(0) = 0.005
SAMPLES = 8  # completions of a question, for the pairs
JUDGE_STEPS = 60  # of the reward model in an iteration
JUDGE_LR = 2e-4
REPLAY = 0.1
EVAL_SAMPLES = 4
MAX_PROMPT_TOKENS = 128
MAX_COMPLETION_TOKENS = 64
TRAINER = "python"  # or "deepspeed --num_gpus 4"
PORT = 59875  # of the reference server
GRPO = ""  # more constants of grpo_train.py, with spaces between


def run(title: str, result: Path, command: list) -> None:
    """The command, unless its result is there. SystemExit names it if it fails."""
    if result.exists():
        return
    print(f"\n=== {title}", flush=True)
    code = subprocess.run([*map(str, command)], env=os.environ | {"TRAINER": TRAINER}).returncode
    require(code == 0 and result.exists(), f"{title} failed or was stopped, see above; the same command goes on there")


def common() -> list[str]:
    names = "QUESTION_COLUMN", "SYSTEM_PROMPT", "MAX_PROMPT_TOKENS", "MAX_COMPLETION_TOKENS"
    return [f"{name}={constants_of(__name__)[name]}" for name in names]


def answers(models: str, questions: str, folder: Path, samples: int, rewards: str) -> Path:
    """evaluation.jsonl: completions of one model, or of two."""
    command = ["python", "-m", "grpo.evaluate", *common(), f"MODEL={models}", f"EVAL_DATASET={questions}",
               f"OUTPUT_DIR={folder}", f"EVAL_SAMPLES={samples}", f"REWARDS={rewards}"]
    run(f"completions: {folder}", folder / "evaluation.html", command)
    return folder / "evaluation.jsonl"


def train_judge(start, folder: Path, evaluations: list[Path], replay: float) -> Path:
    """A reward model from `start`, trained on the newest of the evaluations, and on a share of the others."""
    *old, new = evaluations
    command = [*shlex.split(TRAINER), "examples/preferences.py", f"MODEL={start}", f"OUTPUT_DIR={folder}",
               f"EVALUATION={new}", f"OLD={','.join(map(str, old))}", f"REPLAY={replay}", f"STEPS={JUDGE_STEPS}",
               f"LR={JUDGE_LR}"]
    run(f"reward model: {folder}", folder, command)
    return folder


def train_policy(start, folder: Path, judge: Path) -> Path:
    """A policy after STEPS of GRPO against a reward model; the start is the reference."""
    command = ["examples/demo.sh", folder, *common(), f"MODEL={start}", f"REF_SERVER=http://127.0.0.1:{PORT}",
               f"DATASET={DATASET}", f"EVAL_DATASET={EVAL_DATASET}", f"REWARDS={judge}", f"STEPS={STEPS}", f"LR={LR}",
               f"BETA={BETA}", "EVAL_EVERY=0", *shlex.split(GRPO)]
    result = folder / f"step_{STEPS}"
    run(f"GRPO: {folder}", result, command)
    return result


def begin(folder: Path) -> str:
    """Makes the folder, and in it the file of questions. SystemExit if it holds a run with other constants."""
    settings = json.dumps(constants_of(__name__), indent=1)
    there = folder / "settings.json"
    if there.exists():
        before, now = (json.loads(text) for text in (there.read_text(), settings))
        changed = [f"{name}={old} there" for name, old in before.items() if now.get(name) != old]
        require(not changed, f"OUTPUT_DIR={folder} holds another run: choose another ({'; '.join(changed[:3])})")
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(DATASET)[:QUESTION_ROWS]
    questions = folder / "questions.jsonl"
    replace(questions, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    replace(there, settings)
    return str(questions)


def main():
    folder = Path(OUTPUT_DIR)
    questions = begin(folder)
    judge = without_replay = policy = frozen = MODEL
    pairs, found = [], []
    for number in range(1, ITERATIONS + 1):
        first = number == 1

        # 1. The annotators compare what the current policy writes.
        pairs.append(answers(policy, questions, folder / f"pairs_{number}", SAMPLES, ANNOTATOR))

        # 2. The reward model goes on with these pairs and some of the old ones.
        judge = train_judge(judge, folder / f"judge_{number}", pairs, REPLAY)
        alone = folder / f"judge_{number}_without_replay"
        without_replay = judge if first else train_judge(without_replay, alone, pairs, 0.0)

        # 3. The policy goes on against it, and is the new reference.
        policy = train_policy(policy, folder / f"policy_{number}", judge)
        control = folder / f"frozen_{number}"
        frozen = policy if first else train_policy(frozen, control, folder / "judge_1")

        models = dict.fromkeys([str(policy), str(frozen)])
        judges = dict.fromkeys([f"0*{judge}", f"0*{folder}/judge_1"])
        heldout = answers(",".join(models), EVAL_DATASET, folder / f"heldout_{number}", EVAL_SAMPLES,
                          ",".join([ANNOTATOR, *judges]))
        found.append(measures(heldout, str(policy), str(frozen), [judge, without_replay], pairs))
    panels = {title: {label: [one[title][label] for one in found] for label in labels}
              for title, labels in found[0].items()}
    show([f"iteration {number}" for number in range(1, ITERATIONS + 1)], panels, folder / "iterations.png")


def measures(heldout: Path, policy: str, frozen: str, judges: list[Path], pairs: list[Path]) -> dict:
    """An iteration's numbers, each with its interval: title -> label -> interval."""
    results = json.loads(heldout.with_name("evaluation.json").read_text())
    models, rows = {model["model"]: model for model in results["models"]}, read_jsonl(heldout)
    with_replay, without = (json.loads((judge / "training.json").read_text()) for judge in judges)
    new, first = str(pairs[-1]), str(pairs[0])
    along, once = "trained along", "trained once"
    return {
        "accuracy, reward model": {
            along: models[policy]["sampled/accuracy"],
            once: models[frozen]["sampled/accuracy"]},
        "reward, reward model": {
            along: mean_reward(rows, policy, judges[0].name),
            once: mean_reward(rows, frozen, "judge_1")},
        "reward model on the policy's pairs,": {
            "before": with_replay["before"][new],
            "after": with_replay["after"][new]},
        "reward model on the first pairs,": {
            "with replay": with_replay["after"][first],
            "without": without["after"][first]},
    }


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the running command, which `run` waits for
    os.chdir(Path(__file__).resolve().parent.parent)
    main()
