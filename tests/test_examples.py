"""The examples: their data as the hub has it, the countdown's problems and reward, and each of them run."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import combinations

import arithmetic
import datasets
import pytest
from conftest import ROOT, rows
from transformers import AutoModelForCausalLM

from examples import countdown
from examples.countdown import reward_countdown
from rewards import accuracy_reward, reward_correct
from grpo.data import load_prompts
from test_sampler import save_family

GSM8K = [
    {"question": "Ana has 3 eggs and finds 4 more.\nHow many are there?", "answer": "3 + 4 = <<3+4=7>>7 eggs.\n#### 7"},
    {"question": "What is 7 - 1 - 5 - 1?", "answer": "7 - 1 = <<7-1=6>>6\n6 - 5 - 1 = <<6-5-1=0>>0\n#### 0"},
    {"question": "What is 600 * 2?", "answer": "600 * 2 = $<<600*2=1200>>1,200\n#### 1,200"},
    {"question": "What is 6 + 3 - 3 + 3?", "answer": "6 + 3 = <<6+3=9>>9\n#### 9"},
]
MATH = [
    {"problem": "What is $3 + 1 - 1 - 3$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{0}$."},
    {"problem": "Halve $x$.", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed{\frac{x}{2}}$."},
    {"problem": "Add $4$ to $5$.", "level": "Level 1", "type": "Prealgebra", "solution": r"It is $\boxed{9}$, not 7."},
]
GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> dict:
    """What `datasets` converts goes there, also in processes that get these variables."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return {"HF_DATASETS_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def gsm8k(tmp_path, cache) -> str:
    """A folder as openai/gsm8k is one: a card, two configurations, parquet files."""
    folder = tmp_path / "gsm8k"
    for name, part in ("main/train", GSM8K[1:]), ("main/test", GSM8K[:3]), ("socratic/train", GSM8K[2:]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(part).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text(GSM8K_CARD)
    return str(folder)


def jsonl(path, objects) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))
    return str(path)


# ------------------------------------------------------------------------------------------------- data

def chat(system, question):
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            "<|im_start|>assistant\n")


def test_gsm8k_is_read_by_name_configuration_and_split(tiny, gsm8k):
    read = {split: load_prompts(f"{gsm8k}:{split}", tiny[1], "Think.", 512)
            for split in ("main:train", "main", "main:test[:2]", "main:test[50%:]", "socratic:train")}
    texts = {split: [row.text for row in found] for split, found in read.items()}
    expected = [chat("Think.", row["question"]) for row in GSM8K]
    assert texts["main:train"] == texts["main"] == expected[1:]
    assert texts["main:test[:2]"] == expected[:2] and texts["socratic:train"] == expected[2:]
    assert texts["main:test[50%:]"] == expected[2:3]
    assert [row.columns for row in read["main:train"]] == GSM8K[1:]
    answers = [f"<think>so</think><answer>{answer}</answer>" for answer in ("0", "1200", "8")]
    assert reward_correct(answers, **{"answer": [row["answer"] for row in GSM8K[1:]]}) == [1.0, 1.0, -1.0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_math_is_read_from_a_file_with_the_problem_in_another_column(tiny, tmp_path, cache, kind):
    name = str(tmp_path / f"math.{kind}")
    datasets.Dataset.from_list(MATH).to_parquet(name) if kind == "parquet" else jsonl(tmp_path / "math.jsonl", MATH)
    read = load_prompts(name, tiny[1], "Box it.", 512, "problem")
    assert [row.text for row in read] == [chat("Box it.", row["problem"]) for row in MATH]
    assert read[1].columns == MATH[1]
    completions = [r"So $0$, \boxed{0}", r"\boxed{0.5x}", r"\boxed{7}"]
    assert accuracy_reward(completions, solution=[row.columns["solution"] for row in read]) == [1.0, 1.0, 0.0]
    with pytest.raises(SystemExit, match=r"needs a column question \(QUESTION_COLUMN\) or prompt: 3 rows with \['prob"):
        load_prompts(name, tiny[1], "", 512)


def test_a_split_of_a_parquet_file(tiny, tmp_path, cache):
    datasets.Dataset.from_list(GSM8K).to_parquet(tmp_path / "a.parquet")
    [row] = load_prompts(f"{tmp_path}/a.parquet::train[2:3]", tiny[1], "", 512)
    assert row.columns == GSM8K[2]


def test_a_data_set_that_cannot_be_read_is_one_sentence(tiny, gsm8k, tmp_path):
    (tmp_path / "text.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    (tmp_path / "empty.parquet").write_bytes(b"")
    datasets.Dataset.from_list(GSM8K * 100).to_parquet(tmp_path / "broken.parquet")
    content = (tmp_path / "broken.parquet").read_bytes()
    (tmp_path / "broken.parquet").write_bytes(content[:20] + bytes(200) + content[220:])  # its end is whole
    for name in (f"{tmp_path}/text.parquet", f"{tmp_path}/empty.parquet", f"{tmp_path}/broken.parquet",
                 f"{tmp_path}/absent.parquet", f"{gsm8k}:main:validation", f"{gsm8k}:other", f"{tmp_path}/nowhere"):
        with pytest.raises(SystemExit, match="^cannot read the data set " + re.escape(name)):
            load_prompts(name, tiny[1], "", 512)


# ------------------------------------------------------------------------------------------------- countdown

def answer(text):
    return f"<think>let me see <answer>1</answer></think>\n<answer>{text}</answer>"


RIGHT = [
    ("(25 - 4) * 2", [2, 4, 25], 42),
    (" 2*( 25-4 ) ", [25, 2, 4], 42),
    ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24),  # only with fractions
    ("((1)) / 3 * 3", [3, 1, 3], 1),
    ("6 - 20 + 24", [6, 20, 24], 10),
    ("100000000000000000001 - 100000000000000000000 + 0", [0, 10**20, 10**20 + 1], 1),
]
WRONG = [
    "25 - 4 * 2", "(25 - 4)", "(25 - 4) * 2 * 2", "(25 - 4) * 2 + 0", "42", "(25 - 4) * 2 = 42", "x = (25 - 4) * 2",
    "(25 - 4) × 2", "(２5 - 4) * 2", "(25 - 4) * ２", "(25 - 4) * ٢", "(25 - 4) * 2.0", "(25 - 4) * 02",
    "(2_5 - 4) * 2", "(25 - 4) * 2 # yes", "(25 - 4) * (2", "25 - 4) * 2", "(25 - 4) 2", "25 4 2",
    "(25 - 4,) * 2", "[25 - 4] * 2",
    "-(4 - 25) * 2", "(+25 - 4) * 2", "max(25, 4) - 2", "25(4)(2)", "(25 - 4) * 2 if 1 else 0", "lambda: (25 - 4) * 2",
    "__import__('os').getpid()", "(25 - 4)\n* 2", "(25 - 4) * 2\0", "(25 - 4) *\\\n2", "25 ** 4 ** 2", "9**9**9**9",
    "25 // 4 // 2", "25 << 4 << 2", "(25 - 4) * 2j", "True", "", " ", "()", "1e999", "\ud800", "4 / (25 - 25) * 2",
    "(" * 50000 + "25 - 4" + ")" * 50000 + " * 2", "(" * 40 + "25 - 4" + ")" * 39 + " * 2", "2" * 100000,
    "-" * 90 + "2", "1+" * 100000 + "1", " " * 200000 + "(25 - 4) * 2!",
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text, numbers, target", RIGHT)
def test_an_expression_of_exactly_the_numbers_is_right(text, numbers, target):
    values = reward_countdown([answer(text)] * 3, [numbers, numbers, [*numbers, 5]], [target, target + 1, target])
    assert values == [1.0, 0.0, 0.0]


@pytest.mark.filterwarnings("error")
def test_anything_else_is_wrong_and_quickly_so():
    start = time.process_time()
    for text in WRONG:
        assert reward_countdown([answer(text)], [[2, 4, 25]], [42]) == [0.0], text[:100]
    for text, numbers in ("3 / (5 - 5)", [3, 5, 5]), ("5 - 5 / 3", [3, 5, 5]), ("3 ** 2", [2, 3]), ("7 // 2", [2, 7]):
        for target in 0, 3, 9:
            assert reward_countdown([answer(text)], [numbers], [target]) == [0.0], text
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "completion, value",
    [
        ("<think>7</think><answer>3 + 4</answer>", 1.0),
        ([{"role": "assistant", "content": "<think>7</think><answer>3 + 4</answer>"}], 1.0),
        ("<answer>3 + 4</answer>", 0.0),
        ("<think><answer>3 + 4</answer></think>", 0.0),
        ("<think>7</think><answer>3 + 4</answer><answer>3 + 4</answer>", 0.0),
        ("<think>7</think><answer>3 + 4", 0.0),
        ("<think>7</think>3 + 4", 0.0),
    ],
)
def test_the_expression_stands_in_the_single_answer_block_after_the_thinking(completion, value):
    assert reward_countdown([completion], [[3, 4]], [7], prompts=["p"], completion_ids=[[1]]) == [value]


def reachable(values: list[Fraction], target: int) -> bool:
    if len(values) == 1:
        return values[0] == target
    for i, j in combinations(range(len(values)), 2):
        a, b, others = values[i], values[j], [v for k, v in enumerate(values) if k not in (i, j)]
        made = {a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else [])}
        if any(reachable([*others, value], target) for value in made):
            return True
    return False


def test_countdown_problems_can_be_solved_and_none_is_trained_and_tested(tmp_path):
    countdown.write_problems(tmp_path / "data")
    train, heldout = (rows(tmp_path / f"data/{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (8000, 200)
    assert len({(*sorted(row["numbers"]), -row["target"]) for row in train + heldout}) == 8200
    assert {len(row["numbers"]) for row in heldout} == {3, 4}
    for row in train[:50] + heldout[:50]:
        numbers = [int(number) for number in re.findall(r"\d+", row["question"])]
        assert numbers == [row["target"], *row["numbers"]] and 10 <= row["target"] <= 999
        assert reachable([Fraction(number) for number in row["numbers"]], row["target"]), row


def test_processes_that_start_at_once_see_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "SIZES", {"train": 300, "heldout": 20})
    folder, seen = tmp_path / "data", set()
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(countdown.write_problems, folder) for _ in range(30)]
        while not all(writer.done() for writer in writers):
            if (folder / "heldout.jsonl").exists():
                seen.add((folder / "train.jsonl").read_bytes())
    assert not [writer.exception() for writer in writers if writer.exception()]
    [text] = seen  # always the same and never a part of it
    assert text.count(b"\n") == 300 and text.endswith(b"}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["heldout.jsonl", "train.jsonl"]


# ------------------------------------------------------------------------------------------------- runs

QUICK = ["BETA=0", "STEPS=2", "GROUP_SIZE=4", "WARMUP_STEPS=0", "EVAL_EVERY=0", "SAVE_EVERY=0"]


def judged(row) -> str | None:
    """What a completion of the embedded model says, read without rewards.py."""
    match = re.search(r"</think>\n<answer>(\d+)</answer>$", row["completion"])
    return match and match[1]


def test_the_gsm8k_example_runs(launch, embedded, gsm8k, cache, tmp_path):
    names = f"DATASET={gsm8k}:main:train", f"EVAL_DATASET={gsm8k}:main:test[:2]"
    run = launch("examples/gsm8k.py", f"MODEL={embedded}/model", *names, *QUICK, "PROMPTS_PER_STEP=3", "EVAL_EVERY=2",
                 "MAX_COMPLETION_TOKENS=48", f"OUTPUT_DIR={tmp_path}/run", env=cache)
    code, text = run.wait()
    assert code == 0, text
    metrics, completions = rows(tmp_path / "run/metrics.jsonl"), rows(tmp_path / "run/completions.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2] and metrics[2]["lr"] == 1e-6  # the example's, not 5e-5
    assert 0 <= metrics[2]["eval_accuracy"] <= 0.5  # of two problems one is in words that the model never saw
    golds = {chat(arithmetic.SYSTEM_PROMPT, row["question"]): row["answer"].split()[-1] for row in GSM8K[1:]}
    assert len(completions) == 8
    for row in completions:
        right = judged(row) == golds[row["prompt"]].replace(",", "")
        assert row["reward_correct"] == (1.0 if right else -1.0), row


def test_the_mathematics_example_runs(launch, embedded, cache, tmp_path):
    datasets.Dataset.from_list(MATH).to_parquet(tmp_path / "train.parquet")
    names = f"DATASET={tmp_path}/train.parquet", f"EVAL_DATASET={jsonl(tmp_path / 'test.jsonl', MATH)}"
    run = launch("examples/competition_math.py", f"MODEL={embedded}/model", *names, *QUICK, "PROMPTS_PER_STEP=2",
                 "MAX_COMPLETION_TOKENS=48", f"OUTPUT_DIR={tmp_path}/run", env=cache)
    code, text = run.wait()
    assert code == 0, text
    metrics, completions = rows(tmp_path / "run/metrics.jsonl"), rows(tmp_path / "run/completions.jsonl")
    assert metrics[2]["reward/accuracy_reward"] == metrics[2]["reward"] == 0  # this model never writes \boxed{}
    system = r"Reason step by step, and put your final answer within \boxed{}."
    assert {row["prompt"] for row in completions} <= {chat(system, row["problem"]) for row in MATH}


def test_the_countdown_example_runs_under_the_launcher(launch, embedded, cache, tmp_path):
    run = launch("deepspeed", "--num_accelerators", "1", "--master_port=29635", "examples/countdown.py",
                 f"MODEL={embedded}/model", *QUICK, "PROMPTS_PER_STEP=4", "MAX_COMPLETION_TOKENS=32",
                 f"OUTPUT_DIR={tmp_path}/run", env=cache)
    code, text = run.wait()
    assert code == 0, text
    countdown.write_problems(tmp_path / "data")
    for name in "train.jsonl", "heldout.jsonl":  # the same again
        assert (tmp_path / "data" / name).read_bytes() == (ROOT / "examples/countdown" / name).read_bytes()
    prompts = {chat(arithmetic.SYSTEM_PROMPT, row["question"]) for row in rows(tmp_path / "data/train.jsonl")}
    metrics, completions = rows(tmp_path / "run/metrics.jsonl"), rows(tmp_path / "run/completions.jsonl")
    assert len(completions) == 8 and {row["prompt"] for row in completions} <= prompts
    step = metrics[2]
    assert step["reward"] == pytest.approx(step["reward/reward_countdown"] + 0.1 * step["reward/reward_format"])


def test_models_of_several_families_take_a_step(launch, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", [{"question": f"{n} + 1"} for n in range(8)])
    common = [f"DATASET={data}", *QUICK, "STEPS=1", "SAVE_EVERY=1", "LR=1e-3", "PROMPTS_PER_STEP=2",
              "MAX_PROMPT_TOKENS=96", "MAX_COMPLETION_TOKENS=16", "REWARDS=reward_len,reward_format"]
    turns = ["SYSTEM_PROMPT=Add."]
    for family in "Llama", "Gemma3", "Qwen3":
        save_family(family, tmp_path / family)
        turns += ["--", f"MODEL={tmp_path / family}", f"OUTPUT_DIR={tmp_path / family}-run"]
    code, text = launch("tests/in_turn.py", *common, *turns).wait()
    assert code == 0, text
    for family in "Llama", "Gemma3", "Qwen3":
        [_, metrics] = rows(tmp_path / f"{family}-run/metrics.jsonl")
        assert metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0 < metrics["entropy"]
        before = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-run/step_1").named_parameters())
        for name, parameter in before.named_parameters():  # Adam's first step is LR wherever there is a gradient
            change = (after[name] - parameter).abs().max().item()
            assert change == pytest.approx(1e-3, rel=0.01), (family, name)
