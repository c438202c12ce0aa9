"""Rewards: what is right, what has the format, the published ones' values, and that no completion stalls them."""

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from tokenizers.processors import TemplateProcessing

import grpo_train
import rewards
from grpo import math_judge
from grpo.metrics import Metrics, add_groups
from grpo.reward_model import logits_of
from grpo.scoring import check_rewards, compute_rewards, load_rewards, score
from grpo.types import Group, Prompt, Sample
from rewards import check_answers, extract_answer, reward_correct, reward_format


def called(functions, completions, **columns):
    """`compute_rewards` of functions with weight 1."""
    return compute_rewards(load_rewards(functions), columns | {"completions": completions})


def check(functions, columns):
    tokenizer, rows = transformers.Qwen2Tokenizer(vocab={"a": 0, "b": 1}, merges=[]), zip(*columns.values())
    check_rewards(load_rewards(functions), tokenizer, [Prompt([1], "p", None, dict(zip(columns, row)), number)
                                                       for number, row in enumerate(rows, start=1)])


def answered(text: str) -> str:
    return f"<think>so it is</think>\n<answer>{text}</answer>"


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("72", "72"),
        ("72", " 72 \n"),
        ("72", "72.0"),
        ("-3", "-3"),
        ("1,234", "1234"),
        ("1234", "1,234.00"),
        ("72", "+72"),
        ("1/2", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac{1}{2}", "\\frac12"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("5", "x = 5"),
        ("They have 3 * 4 = <<3*4=12>>12 in all\n#### 12", "12"),
        ("7", "$7$"),
        ("(1,2)", "(1, 2)"),
        (8, "8"),
    ],
)
def test_right_answers(gold, answer):
    assert reward_correct([answered(answer)], answer=[gold]) == [1.0]


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("3", "-3"),
        ("-3", "3"),
        ("1234", "1"),
        ("1234", "234"),
        ("72", "73"),
        ("72", ""),
        ("72", "36 or 72"),
        ("36", "not 36"),
        ("5", "4, 5"),
        ("7", "2^{10^9} \\bmod 7"),
        ("1/2", "1/3"),
        ("5", "\\frac"),
        ("12", "1 2"),
        ("0.333333", "1/3"),
    ],
)
def test_wrong_answers(gold, answer):
    assert reward_correct([answered(answer)], answer=[gold]) == [-1.0]


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<think>a</think><answer>5</answer>", "5"),
        ("<think>a</think> The answer: <answer> 5 </answer> and no more", "5"),
        ("<think><answer>4</answer></think><answer>5</answer>", "5"),
        ("<think>a</think><think>b</think><answer>5</answer>", "5"),
        ("<think>a</think>5", None),
        ("<think>a <answer>5</answer>", None),
        ("<think><answer>5</answer></think>", None),
        ("<think>a</think><answer>5", None),
        ("<think>a</think>5</answer>", None),
        ("<think>a</think></answer>5<answer>", None),
        ("<think>a</think><answer>4</answer><answer>5</answer>", None),
        ("<think>a</think><answer><answer>5</answer></answer>", None),
        ("<answer>5</answer>", None),
        ("<think>a</think><answer>4 <answer>5</answer>", None),
        ("", None),
    ],
)
def test_the_answer_is_the_single_block_after_the_thinking(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "completion, value",
    [
        ("<think>a</think><answer>5</answer>", 1.25),
        ("\n <think>a\nb</think>\n\n<answer>5\n</answer> \n", 1.25),
        ("<think>a</think> so <answer>5</answer>", -1),
        ("<think>a</think><answer>5</answer> and more", -1),
        ("Well: <think>a</think><answer>5</answer>", -1),
        ("<think>a</think><answer>5</answer><answer>5</answer>", -1),
        ("<think>a<think>b</think></think><answer>5</answer>", -1),
        ("<think> </think><answer>5</answer>", -1),
        ("<think>a</think><answer>\n</answer>", -1),
        ("<think>a<answer>5</answer></think>", -1),
        ("<answer>5</answer><think>a</think>", -1),
        ("", -1),
    ],
)
def test_the_format(completion, value):
    assert reward_format([completion]) == [value]


@pytest.mark.parametrize("arithmetic", ["gmpy", "python"])
@pytest.mark.parametrize("threads", ["main", "threads"])
def test_hostile_completions_are_wrong_within_two_seconds(threads, arithmetic, tmp_path):
    # in a process of its own, because the memory that it grows by is part of the test
    env = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"} if arithmetic == "python" else {}
    program = [sys.executable, ROOT / "tests" / "hostile.py", threads]
    run = subprocess.run(program, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    slower = max(1.0, os.getloadavg()[0] / os.cpu_count())  # processor time is limited, not the clock's
    found = json.loads(run.stdout)
    assert found["arithmetic"] == arithmetic and found["judged"]
    assert found["right"] == []
    assert found["seconds"] < 2 * slower, found
    assert found["grown_mb"] < 300
    assert not run.stderr and not list(tmp_path.iterdir())


def running(group: int) -> list[str]:
    """The processes of a group, but for those that are dead and not yet buried."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            found += [path.parent.name] if int(its_group) == group and state != "Z" else []
    return found


def test_no_judge_outlives_a_killed_trainer():
    code = (
        "import threading; from grpo import math_judge; assert math_judge.ask_judge('1/2', '2/4')\n"
        "threading.Thread(target=math_judge.ask_judge, args=('5', '1000000000!')).start()\n"
        "print(math_judge.nursery[0].pid, flush=True)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    group = int(trainer.stdout.readline())
    deadline = time.monotonic() + 10
    while len(running(group)) < 2:  # the nursery, and the judge at work
        assert time.monotonic() < deadline
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 3
    while running(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_judge_gets_ready_before_its_first_question():
    assert math_judge.ask_judge("1", "1")
    os.killpg(math_judge.nursery[0].pid, signal.SIGKILL)
    math_judge.nursery[0].wait(5)
    check([reward_correct], {"answer": ["3"]})
    deadline = time.monotonic() + 30
    while math_judge.nursery[0].poll() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_start_does_not_wait_for_the_judge(monkeypatch):
    """The trial's completions are prompts, and the system prompt has "<answer> and </answer>"."""
    monkeypatch.setattr(math_judge, "ask_judge", lambda *pair: pytest.fail(f"asked about {pair}"))
    math_judge.compare.cache_clear()
    assert reward_correct([f"{grpo_train.SYSTEM_PROMPT} 1 + 2?"], ["3"]) == [-1]
    assert math_judge.is_equal("1 and 2", "2 and 1")


def test_a_nursery_that_was_killed_is_replaced():
    assert math_judge.ask_judge("1/2", "2/4")
    os.killpg(math_judge.nursery[0].pid, signal.SIGKILL)
    math_judge.nursery[0].wait(5)
    assert math_judge.ask_judge("1/2", "2/4")


def test_a_right_answer_is_not_lost_when_the_machine_stalls():
    assert math_judge.ask_judge("1", "1")
    group, verdicts, end = math_judge.nursery[0].pid, [], threading.Event()

    def ask():
        while not end.is_set():
            root = len(verdicts) + 2
            verdicts.append(math_judge.ask_judge(rf"\sqrt{{{root**2}}}/4", f"{root}/4"))

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(4):  # a child is at work nearly all the time, so that at least one is stopped half way
        time.sleep(0.2)
        os.killpg(group, signal.SIGSTOP)
        time.sleep(1.5)
        os.killpg(group, signal.SIGCONT)
    end.set()
    asking.join(30)
    assert len(verdicts) > 4 and all(verdicts)


# ------------------------------------------------------------------------------------------------- the labelled set


def test_the_labelled_answers():
    # 3,582 pairs, each labelled by hand: what a careful teacher would say who sees the gold answer and this one; the
    # kinds that begin with "public" are from the bug reports and tests of other graders
    rows = [json.loads(line) for line in (ROOT / "tests" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) >= 300 and 0.4 < sum(row["right"] for row in rows) / len(rows) < 0.6
    wrong = []
    for row in rows:
        verdict = reward_correct([answered(row["answer"])], answer=[row["gold"]]) == [1.0]
        wrong += [row] if verdict != row["right"] else []
    assert [row for row in wrong if not row["right"]] == []
    assert len(wrong) <= 0.02 * len(rows), wrong


SOLUTIONS = [json.loads(line) for line in (ROOT / "tests" / "solutions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in SOLUTIONS}))
def test_the_labelled_solutions(kind):
    rows = [row for row in SOLUTIONS if row["kind"] == kind]
    for row in rows:
        value = rewards.accuracy_reward([row["completion"]], solution=[row["solution"]])[0]
        assert (value == 1) == row["right"], row


def rules(*headings):
    """(pattern, replacement, before, after) of the rules below these headings of spellings.txt."""
    found, heading = [], None
    for line in (ROOT / "grpo" / "spellings.txt").read_text().splitlines():
        if line.startswith("== "):
            heading = line[3:].partition(":")[0]
        elif heading in headings and line:
            rule, _, example = line.partition("   # ")
            before, arrow, after = example.partition(" → ")
            assert arrow, f"no example: {line}"
            pattern, _, replacement = rule.partition(" → ")
            found.append((pattern.strip('"'), replacement.strip('"'), before, after))
    return found


@pytest.mark.parametrize("pattern, replacement, before, after", rules("first", "rewrites", "numerals", "lead-ins"))
def test_each_rule_does_what_its_example_says(pattern, replacement, before, after):
    before = before.replace(".\\n", ".\n")
    found = re.sub(pattern, replacement, before, flags=0 if "(?i" in pattern else re.IGNORECASE)
    assert found != before and found.split() == after.split()


BORDERLINE = [  # what takes longest of that which is right, and what has changed its verdict beside other processes
    ("x^2/4 + y^2/3 = 1", "x^2/16 + y^2/12 = 1/4"),
    ("\\begin{pmatrix} 1 & 0 \\\\ 0 & 1 \\end{pmatrix}",
     "\\left(\\begin{array}{cc} 1 & 0 \\\\ 0 & 1 \\end{array}\\right)"),
    ("F_n = \\sum_{k=0}^{n-1} F_k F_{n-k-1}", "F_n = \\sum_{k=0}^{n-1} F_{n-k-1} F_k"),
    ("y_1=-2x^2+4x+3, y_2=3x^2+12x+10", "y_1=-2(x-1)^2+5, y_2=3(x+2)^2-2"),
    ("x^4-2x^3-13x^2+14x+24", "24+14*x+(-13)*x^2-2*x^3+x^4"),
    ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
]


def test_verdicts_do_not_depend_on_the_load_of_the_machine():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        for _ in range(2):
            math_judge.compare.cache_clear()
            assert [pair for pair in BORDERLINE if not math_judge.is_equal(*pair)] == []
            assert not math_judge.is_equal("x^2/4 + y^2/3 = 1", "x^2/16 + y^2/12 = 1/3")
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_judge_that_ran_out_of_time_is_asked_again(monkeypatch):
    asked = []

    def slow_once(gold, answer):
        asked.append(answer)
        if len(asked) == 1:
            raise TimeoutError
        return True

    monkeypatch.setattr(math_judge, "ask_judge", slow_once)
    math_judge.compare.cache_clear()
    assert [math_judge.is_equal("\\sqrt{5}", "\\sqrt{25/5}") for _ in range(3)] == [False, True, True]
    assert len(asked) == 2
    math_judge.compare.cache_clear()


def test_a_missing_math_verify_is_one_sentence(monkeypatch):
    monkeypatch.setattr(math_judge.importlib.util, "find_spec", lambda name: None)
    for function, columns in (reward_correct, {"answer": ["3"]}), (rewards.accuracy_reward, {"solution": ["$3$"]}):
        with pytest.raises(SystemExit, match="math-verify, which compares answers, is not installed: pip install"):
            check([function], columns)


@pytest.mark.parametrize("function", [rewards.accuracy_reward, rewards.len_reward, rewards.get_cosine_scaled_reward()])
def test_solutions_that_cannot_be_judged_are_counted(function):
    check([function], {"solution": ["$3$", "#### 4", "so $x = \\boxed{5}$", "$-i$", "$69$,$84$"]})
    with pytest.warns(UserWarning, match="2 of 4 solutions cannot be judged, the first in row 2: 'no mathematics'"):
        check([function], {"solution": ["$3$", "no mathematics", "$4$", "\\frac{1}{"]})
    with pytest.raises(SystemExit, match="2 of 2 solutions cannot be judged, the first in row 1: 'none'"):
        check([function], {"solution": ["none", "an open question"]})


def test_a_solution_in_the_column_answer_is_judged_by_its_box():
    gold = "We have $2x=10$, so $x=\\boxed{5}$."
    check_answers([gold])
    assert reward_correct([answered("5"), answered("10")], answer=[gold] * 2) == [1.0, -1.0]


def test_a_gold_answer_that_cannot_be_parsed_is_an_error():
    check_answers(["3", "\\frac{1}{2}", "#### 4"])
    with pytest.raises(ValueError, match="row 2: the answer '#' cannot be parsed"):
        check_answers(["3", "#"])
    long = "1, " * 30_000
    with pytest.raises(ValueError, match="row 1: the answer '1, 1, .* over 1000 letters"):
        check_answers([long])
    assert reward_correct([answered("1")], answer=[long]) == [-1.0]
    with pytest.raises(SystemExit, match="reward_correct cannot judge the data set: row 1"):
        check([reward_correct], {"answer": [""]})


def test_a_missing_column_is_named_before_training():
    with pytest.raises(SystemExit, match="missing a required argument: 'answer'; columns: \\['solution'\\]"):
        check([reward_format, reward_correct], {"solution": ["3"]})


def constant(value):
    def reward(completions, **columns):
        return value

    return reward


def picky(completions, **columns):
    return [1 / len(completion) for completion in completions]


def test_a_bad_reward_function_is_named_with_the_completion():
    for function, sentence in [
        (constant([1.0]), "reward returned 1 values for 2 completions"),
        (constant([1.0, math.nan]), "reward returned nan for 'b'"),
        (constant([1.0, math.inf]), "reward returned inf for 'b'"),
    ]:
        with pytest.raises(SystemExit, match=sentence):
            called([function], ["a", "b"])
    with pytest.raises(ValueError, match="picky raised ZeroDivisionError.* at the completion ''"):
        called([picky], ["a", ""], prompts=["p", "p"])
    for value, sentence in [
        ("one", r"reward returned \['one'\], expected a list of numbers"),
        ([(0, 1.0)], "reward returned"),
        ([(2, 1.0)], "reward returned"),
        ([(1, math.inf)], "reward returned"),
    ]:
        with pytest.raises(SystemExit, match=sentence):
            called([constant([value])], ["a"])


def test_none_is_no_value_and_steps_add_up():
    values, steps = called([constant([1.0, None]), constant([[(1, 0.5), (2, -2.0)], []])], ["ab", "bb"])
    assert values[0][0] == 1.0 and math.isnan(values[0][1]) and values[1] == [-1.5, 0.0]
    assert steps == [[None, None], [[(1, 0.5), (2, -2.0)], []]]


def test_rewards_by_name_and_weight():
    found = load_rewards(["0.5*reward_format", picky, ("math:sqrt", 2), "-1e-3*math:cos", "2 * math: tan"])
    weights = {reward.function: reward.weight for reward in found}
    assert weights == {reward_format: 0.5, picky: 1.0, math.sqrt: 2, math.cos: -0.001, math.tan: 2}
    assert [reward.name for reward in found] == ["reward_format", "picky", "sqrt", "cos", "tan"]
    with pytest.raises(SystemExit, match="REWARDS holds reward_format twice"):
        load_rewards(["reward_format", (reward_format, 2.0)])
    for name in "reward_nothing", "nowhere:f", "much*reward_format":
        with pytest.raises(SystemExit, match=re.escape(f"no reward function {name}")):
            load_rewards([name])


THINKING = [  # how a prompt ends, the completion, reward_format, format_reward, reward_correct
    ("assistant\n<think>\n", "so\n</think>\n<answer>\n5\n</answer>", 1.25, 1, 1),
    ("assistant\n<think>", "\nso\n</think>\n<answer>\n5\n</answer>", 1.25, 1, 1),
    ("assistant\n<think>\n", "<think>\nso\n</think>\n<answer>\n5\n</answer>", -1, 0, 1),
    ("assistant\n<think>\n", "so <answer>5</answer>", -1, 0, -1),
    ("assistant\n<think>\n\n</think>\n\n", "<answer>\n5\n</answer>", 1.25, 1, 1),  # Qwen3 without thinking
    ("<|Assistant|></think>", "<answer>\n5\n</answer>", 1.25, 1, 1),  # DeepSeek-V3.1 without thinking
    ("Write <think> and </think>.\nassistant\n", "<think>\nso\n</think>\n<answer>\n5\n</answer>", 1.25, 1, 1),
    ("assistant\n", "so\n</think>\n<answer>\n5\n</answer>", -1, 0, 1),
    ("assistant\n", "<think>\n</think>\n<answer>\n5\n</answer>", -1, 0, 1),
]


@pytest.mark.parametrize("end, completion, ours, open_r1, right", THINKING)
def test_thinking_that_the_template_has_begun_belongs_to_the_format(end, completion, ours, open_r1, right):
    for columns in {"prompts": [end]}, {"prompts": [[{"role": "user", "content": "?"}]], "prompt_texts": [end]}:
        assert reward_format([completion], **columns) == [ours]
        assert rewards.format_reward([completion], **columns) == [open_r1]
        assert not open_r1 or rewards.tag_count_reward([completion], **columns) == [1.0]
        assert reward_correct([completion], answer=["5"], **columns) == [right]


def test_thinking_that_the_last_message_has_begun_belongs_to_the_format():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Well.\n<think>\nFirst"}]
    texts = ["so</think><answer>5</answer>"]
    assert reward_format(texts, prompts=[messages], prompt_texts=["... <think>\nFirst"]) == [1.25]
    assert reward_format([[{"role": "assistant", "content": texts[0]}]], prompts=[messages]) == [1.25]
    messages[1] = {"role": "assistant", "content": "Well."}  # Qwen3's template puts an empty block before it
    texts = [" so <answer>5</answer>"]
    assert reward_correct(texts, prompts=[messages], prompt_texts=["<think>\n\n</think>\n\nWell."], answer=["5"]) == [1.0]
    assert reward_correct(texts, prompts=[messages], prompt_texts=["assistant\nWell."], answer=["5"]) == [-1.0]


def sampled(texts, tokenizer, messages=None):
    prompt = Prompt([1], "p", messages, {"answer": "5"})
    return Group(prompt, [Sample(prompt, torch.tensor(tokenizer(text).input_ids), torch.zeros(1), False)
                          for text in texts])


def test_a_row_of_messages_gives_functions_messages_as_in_trl(tiny):
    seen = []

    def looks(completions, prompts, **columns):
        seen.extend([completions, prompts])
        return [float(len(one[0]["content"]) if isinstance(one, list) else -1) for one in completions]

    messages = [{"role": "user", "content": "2 + 3"}]
    for prompt in messages, None:
        score([sampled(["5", "12"], tiny[1], prompt)], load_rewards([looks, reward_format]), tiny[1], Metrics())
    assistant = [[{"role": "assistant", "content": text}] for text in ("5", "12")]
    assert seen == [assistant, [messages] * 2, ["5", "12"], ["p"] * 2]


@pytest.mark.parametrize("page", ["README.md", "docs/rewards.md"])
def test_the_reward_in_the_documents_judges_what_gsm8k_has(page):
    code = re.search(r"```python\n(.*?def close.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    exec(code, names := {})
    golds = ["Natalia sold 48/2 = 24 clips.\n#### 72", "so it is\n#### 1,000", "1", "2", "3", "4", "x"]
    texts = [*map(answered, ["70", "$1,000", "1e999", "nan", "-3.5", "4"]), "no answer"]
    assert names["close"](texts, answer=golds) == [1 / 3, None, None, None, 1 / 7.5, 1.0, None]


def test_a_reward_model_may_lie_in_a_folder_with_a_blank(judge_folder, tmp_path):
    shutil.copytree(judge_folder, tmp_path / "my judge")
    (reward,) = load_rewards([f"0.5 * {tmp_path}/my judge"])
    assert reward.weight == 0.5 and reward.name == "my judge"


def test_an_encoder_as_a_reward_model_sees_its_own_special_tokens(judge_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge_folder)
    model, seen = transformers.AutoModelForSequenceClassification.from_pretrained(judge_folder).eval(), []
    model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"].tolist()), with_kwargs=True)
    plain = tokenizer("1 + 1", add_special_tokens=False).input_ids
    tokenizer._tokenizer.post_processor = TemplateProcessing("<think> $A", special_tokens=[("<think>", 7)])
    for cls_token in None, "<think>":
        tokenizer.cls_token = cls_token
        logits_of(model, tokenizer, ["1 + 1"])
    assert seen == [[plain], [[7, *plain]]]


def test_a_judge_starts_wherever_the_run_was_started(tmp_path):
    (tmp_path / "random.py").write_text("raise ImportError('a file of the user')\n")
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from grpo.math_judge import ask_judge; print(ask_judge('x', 'x'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "True\n", done.stderr


def test_blanks_at_the_end_of_a_prompt_cost_no_time():
    start = time.monotonic()
    assert reward_format([answered("5")], prompts=["a" + 3000 * " " + "b"]) == [1.25]
    assert time.monotonic() - start < 0.5


def test_async_functions_are_awaited_all_at_once(tiny):
    running = []

    def make(name):
        async def waits(completions, **columns):
            running.append(name)
            await asyncio.sleep(0.05)
            assert len(running) == 3  # the others have begun as well
            return [1.0] * len(completions)
        return waits

    def uses_a_loop_of_its_own(completions, **columns):
        return [asyncio.get_event_loop_policy().new_event_loop().run_until_complete(asyncio.sleep(0, 2.0))] * 2

    async def fails(completions, **columns):
        return [1 / len(one) for one in completions]

    functions = load_rewards([make(1), make(2), uses_a_loop_of_its_own, make(3)])
    assert [one.name for one in functions] == ["waits", "waits_2", "uses_a_loop_of_its_own", "waits_4"]
    group = sampled(["5", "12"], tiny[1])
    score([group], functions, tiny[1], Metrics())
    assert [one.rewards for one in group.samples] == [[1.0, 1.0, 2.0, 1.0]] * 2
    with pytest.raises(ValueError, match="fails raised ZeroDivisionError.* at the completion ''"):
        called([fails], ["a", ""])


def test_what_functions_log_is_in_the_metrics_and_beside_the_completions(tiny):
    def logs(completions, trainer_state, log_metric, log_extra, **columns):
        log_metric("done", trainer_state.global_step / trainer_state.max_steps)
        log_extra("letters", [len(text) for text in completions])
        return [0.0] * len(completions)

    metrics, group = Metrics(3, 8), sampled(["5", "12"], tiny[1])
    score([group], load_rewards([logs]), tiny[1], metrics)
    assert metrics.logged == {"done": [0.25]} and [one.extra for one in group.samples] == [{"letters": 1}, {"letters": 2}]


def test_completions_to_which_no_function_applies_are_no_part_of_the_group(alone, tiny, monkeypatch):
    values = iter([1.0, None, 1.2, None])
    group = sampled(["5", "12", "7", "9"], tiny[1])
    functions = load_rewards([(lambda completions, **_: [next(values) for _ in completions], 1.0),
                              (reward_format, 0.0)])
    score([group], functions, tiny[1], Metrics())
    grpo_train.set_advantages([group], functions)
    deviation = math.sqrt(0.02) + 1e-4
    found = [one.advantages[0].item() for one in group.samples]
    assert found == pytest.approx([-0.1 / deviation, 0, 0.1 / deviation, 0]) and found[1] == found[3] == 0
    monkeypatch.setattr(grpo_train, "ADVANTAGE_SCALE", "batch")
    grpo_train.set_advantages([group], functions)
    assert [one.advantages[0].item() for one in group.samples] == pytest.approx(found)
    metrics = Metrics()
    add_groups(metrics, [group], functions)
    row = metrics.reduced()
    assert row["unjudged_frac"] == 0.5 and row["reward"] == pytest.approx(1.1) == row["reward/lambda"]
    assert row["accuracy"] == 1 and row["reward_std"] == pytest.approx(math.sqrt(0.02))


# ------------------------------------------------------------------------------------------------- Open R1's and TRL's
# Values worked out by hand from the formulas in the papers and in Open R1's documentation.

BOX = "\\boxed{\\frac{63}{400}}"  # 22 characters
WRONG_BOX = "\\boxed{\\frac{64}{400}}"
GOLD = "\\frac{63}{400}"


@pytest.mark.parametrize(
    "completion, solution, value",
    [
        (BOX, GOLD, 1.0),
        (WRONG_BOX, GOLD, 0.0),
        ("It is $\\frac{1}{3}$, no: $0.1575$.", GOLD, 1.0),
        ("First \\(5\\), then \\[ x = 7 \\]", "$7$", 1.0),
        ("\\boxed{7}, which is not $8$", "7", 1.0),  # a box goes before other LaTeX
        ("\\boxed{5} \\boxed{7", "7", 0.0),
        ("The answer is 7", "7", 0.0),  # neither a box nor LaTeX
        ("$x < 3$", "$(-\\infty, 3)$", 1.0),
        ("$72$", "48 / 2 = <<48/2=24>>24\n#### 72", 1.0),
        ("$72$", "We get \\boxed{72}.", 1.0),
        (BOX, "no mathematics at all", None),
        ("\\boxed{forty two}", "Answer is forty two.", None),
        ("", "", None),
        ("", GOLD, 0.0),
    ],
)
def test_accuracy_reward(completion, solution, value):
    assert rewards.accuracy_reward([completion], solution=[solution]) == [value]
    assert rewards.accuracy_reward([[{"role": "assistant", "content": completion}]], [solution]) == [value]


@pytest.mark.parametrize(
    "completion, fmt, tags",
    [
        ("<think>\nSo it is.\n</think>\n<answer>\n5\n</answer>", 1.0, 1.0),
        ("<think>\na\n\nb\n</think>\n<answer>\n5\n</answer>\n", 1.0, 1.0),
        ("<think>\na\n</think>\n<answer>\n5\n</answer>\nand more", 0.0, 1.0),
        ("<think>\na\n</think>\n<answer>\n5\n</answer>\n<answer>\n6\n</answer>", 0.0, 0.5),
        ("Well\n<think>\na\n</think>\n<answer>\n5\n</answer>", 0.0, 1.0),
        ("<think>a</think><answer>5</answer>", 0.0, 0.0),
        ("a\n</think>\n<answer>\n5\n</answer>", 0.0, 0.75),
        ("<think>\na\n<answer>\n5\n</answer>", 0.0, 0.75),
        ("<think>\na\n</think>\n5\n</answer>", 0.0, 0.75),
        ("<think>\na\n</think>\n<answer>\n5", 0.0, 0.75),
        ("nothing", 0.0, 0.0),
    ],
)
def test_format_reward_and_tag_count_reward(completion, fmt, tags):
    assert rewards.format_reward([completion]) == [fmt]
    assert rewards.tag_count_reward([completion]) == [tags]


def test_reasoning_steps_reward():
    cases = {
        "Step 1: a\nStep 2: b\nStep 3: c": 1.0,
        "First, a. Second, b. Next, c. Finally, d.": 1.0,
        "1. a\n2. b": 1 / 3,  # a number counts at the start of the completion alone
        "a\n- b\n* c": 2 / 3,
        "a plain text": 0.0,
    }
    assert rewards.reasoning_steps_reward(list(cases)) == pytest.approx(list(cases.values()))


def test_len_reward_prefers_the_shorter():
    completions = [BOX, BOX + "x" * 10, WRONG_BOX, WRONG_BOX + "x" * 20]  # 22, 32, 22, 42 characters
    assert rewards.len_reward(completions, [GOLD] * 4) == pytest.approx([0.5, 0.0, 0.0, -0.5])
    assert rewards.len_reward([BOX, BOX], [GOLD] * 2) == [0.0, 0.0]
    assert rewards.len_reward([BOX, BOX + "x"], ["unparseable_latex"] * 2) == [None, None]
    two_prompts = rewards.len_reward(completions, [GOLD] * 4, prompts=["p", "p", "q", "q"])
    assert two_prompts == pytest.approx([0.5, -0.5, 0.0, -0.5])


@pytest.mark.parametrize(
    "content, length, value",
    [
        (BOX, 22, 0.5 + 0.25 * (1 + math.cos(0.22 * math.pi))),
        (BOX, 80, 0.5 + 0.25 * (1 + math.cos(0.80 * math.pi))),
        (WRONG_BOX, 22, -0.5 - 0.25 * (1 + math.cos(0.22 * math.pi))),
        (WRONG_BOX, 80, -0.5 - 0.25 * (1 + math.cos(0.80 * math.pi))),
        (BOX, 100, 0.5),
        (BOX, 200, 0.5),  # Open R1's turns back to 1.0 here
        (WRONG_BOX, 200, -0.5),
    ],
)
def test_cosine_scaled_reward(content, length, value):
    reward = rewards.get_cosine_scaled_reward(max_len=100)
    assert reward([content.ljust(length)], solution=[GOLD]) == pytest.approx([value])
    assert reward([content], solution=["no mathematics"]) == [None]


def test_repetition_penalty_reward():
    for size, penalty, text, value in [
        (2, -1.0, "this is a test sentence", 0.0),
        (2, -1.0, "this this this this this", -0.75),
        (2, -1.0, "this is a This IS a test", -1 / 3),
        (3, -0.5, "test test test test", -0.25),
        (3, -1.0, "A B C A B C E F G A B C A B C", -5 / 13),
        (3, -1.0, "two words", 0.0),
        (3, -1.0, "", 0.0),
    ]:
        assert rewards.get_repetition_penalty_reward(size, penalty)([text]) == pytest.approx([value])
    with pytest.raises(ValueError, match="max_penalty 1.5 should not be positive"):
        rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=1.5)
    with pytest.raises(ValueError, match="language 'fr' is not supported"):
        rewards.get_repetition_penalty_reward(2, -1.0, language="fr")


def test_repetition_penalty_reward_cuts_chinese_with_jieba():
    pytest.importorskip("jieba")
    chinese = rewards.get_repetition_penalty_reward(1, -1.0, language="zh")
    assert chinese(["\u6211\u4eec \u6211\u4eec"]) == pytest.approx([-1 / 3])  # "we", a space, "we"


def test_soft_overlong_punishment_is_equation_13_of_dapo():
    reward = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = {0: 0.0, 50: 0.0, 80: 0.0, 85: -0.25, 90: -0.5, 100: -1.0, 110: -1.0}
    ids = [[1] * length for length in lengths]
    assert reward(ids) == reward(completion_ids=ids, completions=[""] * 7) == pytest.approx(list(lengths.values()))
    cliff = rewards.get_soft_overlong_punishment(100, 0)
    assert cliff([[1] * 100, [1] * 101]) == [0.0, -1.0]


def test_reward_len():
    assert rewards.reward_len(["a" * 190, "a" * 230]) == [-10.0, -30.0]
    fifty = rewards.reward_len(target=50)
    assert fifty.__name__ == "reward_len" and fifty(["a" * 20], prompts=["p"]) == [-30.0]


# ------------------------------------------------------------------------------------------------- a reward model


@pytest.fixture(scope="module")
def judge_folder(tiny_folder, tmp_path_factory):
    """A classifier with one label, untrained, with the embedded task's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    config = transformers.AutoConfig.from_pretrained(tiny_folder, num_labels=1)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    folder = tmp_path_factory.mktemp("models") / "judge"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_judges_a_batch_as_it_judges_one(judge_folder):
    completions = ["1+1=2", "<think>12+34=46</think><answer>46</answer>", "7", "", "3*3=9 and 4"]
    prompts = ["1+1", "12+34", "7", "5", "3*3"]
    reward = rewards.reward_model(str(judge_folder) + "/", batch_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge_folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge_folder).double()
    alone = []
    for prompt, completion in zip(prompts, completions):
        ids = torch.tensor([tokenizer(prompt + completion, add_special_tokens=False).input_ids])
        hidden = model.model(ids).last_hidden_state[0, -1]
        alone.append((model.score.weight @ hidden).item())
    values = called([reward], completions, prompts=prompts)[0][0]
    assert reward.__name__ == "judge" and len(set(values)) == 5
    assert values == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_a_reward_model_with_several_labels_is_refused(judge_folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(judge_folder, num_labels=2)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(judge_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 labels: expected 1"):
        rewards.reward_model(str(tmp_path))


# ------------------------------------------------------------------------------------------------- TRL
# Three functions as they are written for TRL: extra keywords swallowed, a column by name, None for another task's rows.


def longer_is_better(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def ends_with_the_answer(prompts, completions, ground_truth, **kwargs):
    found = [re.search(r"(-?\d+)\D*$", completion) for completion in completions]
    return [1.0 if match and match.group(1) == truth else 0.0 for match, truth in zip(found, ground_truth)]


def mathematics_only(completions, task, **kwargs):
    return [float("=" in completion) if kind == "math" else None for completion, kind in zip(completions, task)]


def test_reward_functions_written_for_trl_run_unchanged():
    functions = [longer_is_better, ends_with_the_answer, mathematics_only]
    columns = {"ground_truth": ["4", "5"], "task": ["math", "code"]}
    check(functions, columns)
    values, _ = called(
        functions, ["2+2=4", "print(5)!"], prompts=["2+2", "p"], completion_ids=[[1, 2], [3]], **columns
    )
    assert values[:2] == [[2.0, 1.0], [1.0, 1.0]]
    assert values[2][0] == 1.0 and math.isnan(values[2][1])


@pytest.mark.parametrize("chat", [False, True])
def test_ours_run_inside_trls_trainer(chat, tiny_folder, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    prompt = [{"role": "user", "content": "What is 1+1?"}] if chat else "1+1"
    data = datasets.Dataset.from_list([{"prompt": prompt, "answer": "2", "solution": "$2$"}] * 4)
    functions = [
        reward_correct,
        reward_format,
        rewards.accuracy_reward,
        rewards.get_cosine_scaled_reward(),
        rewards.get_soft_overlong_punishment(8, 4),
        rewards.reward_len(target=20),
    ]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, use_cpu=True,
        max_completion_length=8, logging_steps=1, report_to=[], bf16=False, save_strategy="no",
    )
    trainer = trl.GRPOTrainer(model=tiny_folder, reward_funcs=functions, args=config, train_dataset=data)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "rewards/reward_len/mean" in entry)
    assert log["rewards/reward_format/mean"] == -1.0 and log["rewards/accuracy_reward/mean"] == 0.0
    assert -1.0 <= log["rewards/soft_overlong_punishment_reward/mean"] <= 0.0
    assert log["rewards/cosine_scaled_reward/mean"] < -0.5 and log["rewards/reward_len/mean"] < 0
