"""Rewards: what is right, what has the format, and that no completion stalls them."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

import rewards
from rewards import (
    check_answers,
    check_rewards,
    compute_rewards,
    extract_answer,
    load_rewards,
    reward_correct,
    reward_format,
)


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


HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "python tower": "9**9**9**9",
    "factorial": "1000000000!",
    "nested factorials": "((9!)!)!",
    "sum": "\\sum_{i=1}^{1000000000} i^{i}",
    "brackets": "(" * 900,
    "braces": "{" * 900 + "}" * 900,
    "digits": "9" * 100_000,
    "code": "__import__('os').system('touch hacked')",
    "NUL": "5\0",
    "surrogate": "5\ud800",
    "tags": "<answer>" * 50_000,
    "unicode digits": "\u0665",
    "fractions": "\\frac{1}{" * 100 + "5" + "}" * 100,
    "backslashes": "\\" * 1000,
    "dollars": "$" * 999,
}


def judged(name: str) -> float:
    start = time.monotonic()
    assert reward_correct([answered(HOSTILE[name])], answer=["5"]) == [-1.0]
    assert reward_format([answered(HOSTILE[name])])[0] in (-1.0, 1.25)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def judge():
    rewards.ask_judge("1/2", "0.5")  # the nursery's start, which imports sympy, counts once for a run


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_wrong_within_seconds(judge, name):
    assert judged(name) < 2
    assert reward_correct([answered("0.5")], answer=["1/2"]) == [1.0]  # the next one is judged as if nothing had been


def test_from_eight_threads_at_once(judge):
    seconds = []
    threads = [threading.Thread(target=lambda: seconds.append(judged("factorial"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds) == 8 and max(seconds) < 4


def test_a_judge_that_died_while_idle_is_replaced(judge):
    assert rewards.ask_judge("1/2", "0.5")
    connection, pid = rewards.idle_judges.get(timeout=1)
    os.kill(pid, signal.SIGKILL)
    connection.poll(5)  # its end of the pipe is closed
    rewards.idle_judges.put((connection, pid))
    assert all(reward_correct([answered("0.5")], answer=["1/2"]) == [1.0] for _ in range(3))


def running(group: int) -> list[str]:
    """The processes of a group, but for those that are dead and not yet buried."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            found += [path.parent.name] if int(its_group) == group and state != "Z" else []
    return found


def test_no_judge_outlives_a_killed_trainer(tmp_path):
    code = (
        "import threading, rewards; assert rewards.ask_judge('1/2', '0.5'); rewards.JUDGE_SECONDS = 60\n"
        "threading.Thread(target=rewards.ask_judge, args=('5', '1000000000!')).start()\n"
        "print(rewards.nursery[0].pid, flush=True)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    group = int(trainer.stdout.readline())
    time.sleep(1)  # the judge is at work
    assert len(running(group)) == 2  # the nursery and the judge
    trainer.kill()
    trainer.wait()
    time.sleep(1)
    assert not running(group)


def test_a_gold_answer_that_cannot_be_parsed_is_an_error():
    check_answers(["3", "\\frac{1}{2}", "#### 4"])
    with pytest.raises(ValueError, match="row 2: the answer '#' cannot be parsed"):
        check_answers(["3", "#"])
    with pytest.raises(SystemExit, match="reward_correct cannot judge the data set: row 1"):
        check_rewards([reward_correct], {"answer": [""]})


def test_a_missing_column_is_named_before_training():
    with pytest.raises(SystemExit, match="missing a required argument: 'answer'; columns: \\['solution'\\]"):
        check_rewards([reward_format, reward_correct], {"solution": ["3"]})


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
        with pytest.raises(ValueError, match=sentence):
            compute_rewards([function], ["a", "b"])
    with pytest.raises(ValueError, match="picky raised ZeroDivisionError.* at the completion ''"):
        compute_rewards([picky], ["a", ""], prompts=["p", "p"])
    assert compute_rewards([constant([1.0, None]), picky], ["a", "bb"]) == [[1.0, None], [1.0, 0.5]]


def test_rewards_by_name():
    assert load_rewards(["reward_format", picky, "math:sqrt"]) == [reward_format, picky, math.sqrt]
    for name in "reward_nothing", "nowhere:f":
        with pytest.raises(SystemExit, match=f"no reward function {name}"):
            load_rewards([name])
