"""python -m grpo.evaluate: estimators and intervals against independent computations, the command as people call it."""

import filecmp
import json
import re
import sys
from html.parser import HTMLParser
from itertools import combinations

import numpy
import pytest
import torch
from conftest import rows

from grpo import checkpoint, report
from grpo import evaluate as evaluation

ALONE = [sys.executable, "-m", "grpo.evaluate"]
SAMPLES = 4


def evaluated(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * right + [False] * (n - right), k))
                assert evaluation.pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def answer(accuracy, tokens=5, **others):
    return {"accuracy": accuracy, "reward": 2.0 * accuracy, "tokens": tokens, "cut_off": False, **others}


def test_a_problems_numbers():
    answers = [answer(True, 9), answer(True, 4), answer(False, 5), answer(False, 6)]
    worth = evaluation.worth(answers)
    assert worth["greedy/accuracy"] == 1 and worth["greedy/tokens"] == 9
    assert worth["sampled/accuracy"] == pytest.approx(1 / 3) == worth["sampled/pass@1"]
    assert worth["sampled/pass@2"] == pytest.approx(2 / 3) and worth["sampled/pass@3"] == 1
    assert worth["sampled/tokens"] == 5 and worth["sampled/reward"] == pytest.approx(2 / 3)
    assert not any("format" in name for name in worth)  # no reward is about form
    assert evaluation.worth([answer(True, format=True), answer(True, format=False)])["sampled/format"] == 0


def unjudged(tokens=5):
    return answer(False, tokens) | {"accuracy": None, "reward": None}


def test_what_is_not_judged_counts_neither_as_right_nor_as_wrong():
    worth = evaluation.worth([unjudged(), answer(True), unjudged(7), answer(False), unjudged()])
    assert worth["sampled/accuracy"] == worth["sampled/pass@1"] == 0.5 and worth["sampled/reward"] == 1
    assert worth["sampled/pass@2"] == 1 and numpy.isnan([worth["sampled/pass@4"], worth["greedy/accuracy"]]).all()
    assert worth["sampled/tokens"] == 5.5
    nothing, others = [unjudged()] * 5, [[answer(True)] * 5, [answer(False)] * 5]
    alone, with_nothing = (evaluation.summary(["one", "other"], [some] * 2) for some in (others, [nothing, *others]))
    for name in "greedy/accuracy", "sampled/accuracy", "sampled/pass@2", "sampled/reward":
        assert with_nothing["models"][0][name] == alone["models"][0][name]
        assert with_nothing["difference"][name] == alone["difference"][name]
    about = {"problems": 3, "EVAL_SAMPLES": 4, "TEMPERATURE": 1.0, "REWARDS": {"mine": 1.0}}
    assert "judge" not in report.filled("evaluation.txt", **about, **alone)
    without = evaluation.summary(["one", "other"], [[nothing] * 3] * 2)
    text = report.filled("evaluation.txt", **about, **without, unjudged=30)
    assert "\n30 completions that mine did not judge are left out of the accuracy\n" in text
    assert text.count("not judged") == 6 * 3


def ends(numbers):
    return [numbers["low"], numbers["high"]]


@pytest.mark.parametrize("n, right", [(200, 0), (200, 1), (200, 51), (200, 200), (1319, 900)])
def test_the_interval_of_a_rate_is_agresti_and_coulls(n, right):
    p, count = (right + 2) / (n + 4), n + 4
    error = 1.96 * (p * (1 - p) / count) ** 0.5
    found = evaluation.interval([1] * right + [0] * (n - right), "rate")
    assert found["value"] == right / n
    assert ends(found) == pytest.approx([max(0, p - error), min(1, p + error)], abs=2e-4)
    z = 1.96  # Wilson's is another one, and nearly the same
    centre, half = (right + z**2 / 2) / (n + z**2), z * (right * (n - right) / n + z**2 / 4) ** 0.5 / (n + z**2)
    assert ends(found) == pytest.approx([centre - half, centre + half], abs=0.008)


@pytest.mark.parametrize("n, lost, won", [(200, 0, 0), (200, 0, 149), (200, 12, 30), (50, 50, 0)])
def test_the_interval_of_a_difference_is_agresti_and_mins(n, lost, won):
    middle = (won - lost) / (n + 2)
    error = 1.96 * ((won + lost + 1) - (won - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    found = evaluation.interval([-1] * lost + [1] * won + [0] * (n - lost - won), "difference")
    assert found["value"] == (won - lost) / n
    assert ends(found) == pytest.approx([max(-1, middle - error), min(1, middle + error)], abs=3e-3)


def test_the_interval_of_a_mean_is_the_bootstraps():
    random = numpy.random.default_rng(0)
    tokens = random.integers(10, 60, 200).astype(float)
    means = tokens[random.integers(0, 200, (20000, 200))].mean(1)  # problems drawn again
    found = evaluation.interval(tokens.tolist(), "mean")
    assert ends(found) == pytest.approx(numpy.quantile(means, [0.025, 0.975]), abs=0.1)
    assert found["value"] == tokens.mean()


@pytest.mark.parametrize("hardness", [(0.1, 0.3), (0.3, 0.02), (5, 5), (0.01, 2), (90, 10)])
@pytest.mark.parametrize("samples", [1, 8])
def test_the_intervals_cover_what_they_promise(hardness, samples):
    # problems are solved with chances of their own, from never to always; the samples of one share its chance
    random, problems, trials, (a, b) = numpy.random.default_rng(0), 100, 1000, hardness
    chances = random.beta(a, b, (2, trials, problems))
    drawn = random.binomial(samples, chances) / samples
    rate = [low <= a / (a + b) <= high for low, high in (
        ends(evaluation.interval(values.tolist(), "rate")) for values in drawn[0])]
    assert 0.93 <= numpy.mean(rate)
    # a second model solves half of the problems like the first, the others on its own: the difference is 0
    own = random.random((trials, problems)) < 0.5
    others = random.binomial(samples, numpy.where(own, chances[1], chances[0])) / samples
    difference = [low <= 0 <= high for low, high in (
        ends(evaluation.interval(values.tolist(), "difference")) for values in others - drawn[0])]
    assert 0.93 <= numpy.mean(difference)
    # as if every sample were a problem of its own: the mistake that the intervals are there to avoid
    if samples == 8 and a + b < 1:
        naive = [low <= a / (a + b) <= high for low, high in (
            ends(evaluation.interval([1] * right + [0] * (problems * samples - right), "rate"))
            for right in (drawn[0].sum(1) * samples).round().astype(int).tolist())]
        assert numpy.mean(naive) < 0.8


@pytest.fixture(scope="module")
def trained(embedded, tmp_path_factory):
    """A model that is a little better than the embedded one: its weights moved a bit, as by training, and at random."""
    from grpo.policy import load_model

    folder = tmp_path_factory.mktemp("other") / "model"
    model, tokenizer = load_model(f"{embedded}/model")
    torch.manual_seed(0)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() > 1):
            matrix += 0.1 * matrix.std() * torch.randn_like(matrix)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def greedily_right(embedded) -> int:
    """Of the 200 held-out problems those that the embedded model solves, by transformers' own generation."""
    from grpo_train import SYSTEM_PROMPT
    from rewards import reward_correct
    from grpo.data import load_prompts
    from grpo.policy import load_model

    model, tokenizer = load_model(f"{embedded}/model")
    problems, texts = load_prompts(f"{embedded}/heldout.jsonl", tokenizer, SYSTEM_PROMPT, 128), []
    for problem in problems:
        ids = torch.tensor([problem.ids])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
        texts.append(tokenizer.decode(answer[0, ids.shape[1] :]).removesuffix(tokenizer.eos_token))
    rewards = reward_correct(texts, answer=[problem.columns["answer"] for problem in problems])
    return sum(reward > 0 for reward in rewards)


def test_the_command_on_two_models_with_one_and_two_processes(launch, embedded, trained, tmp_path):
    common = [f"EVAL_DATASET={embedded}/heldout.jsonl", f"EVAL_SAMPLES={SAMPLES}"]
    run = tmp_path / "one"  # the folder of a run: its files stay as they are
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    (run / "run.json").write_text('{"LR": 1.0}')
    two_models = f"MODEL={embedded}/model,{trained}"
    code, text = launch(*ALONE, *common, two_models, f"OUTPUT_DIR={run}").wait()
    assert code == 0, text
    assert (run / "metrics.jsonl").read_text() == '{"step": 0}\n' and (run / "run.json").read_text() == '{"LR": 1.0}'
    assert sorted(path.name for path in run.iterdir()) == [
        "evaluation.html", "evaluation.json", "evaluation.jsonl", "metrics.jsonl", "run.json"]

    found, answers = evaluated(run), rows(run / "evaluation.jsonl")
    (first, second), difference = found["models"], found["difference"]
    assert first["model"] == f"{embedded}/model" and found["problems"] == 200
    right = greedily_right(embedded)
    assert first["greedy/accuracy"]["value"] == right / 200
    imagined = [100] * (right + 2) + [0] * (202 - right)  # two right problems and two wrong ones along with these
    middle, half = numpy.mean(imagined), 1.96 * numpy.std(imagined, ddof=1) / len(imagined) ** 0.5
    shown = rf"accuracy \(pass@1\) +{right / 2:.1f} % \[{middle - half:.1f}, {middle + half:.1f}\]"
    assert re.search(shown, text), text
    assert 0 < first["greedy/accuracy"]["value"] != second["greedy/accuracy"]["value"]
    for name in difference:
        assert difference[name]["value"] == pytest.approx(second[name]["value"] - first[name]["value"])
        assert all(r[name]["low"] <= r[name]["value"] <= r[name]["high"] for r in (first, second, difference))
    passes = [first[f"sampled/pass@{k}"]["value"] for k in (1, 2, 4)]
    assert first["sampled/accuracy"]["value"] == pytest.approx(passes[0]) and passes == sorted(passes)
    assert 0.3 < passes[0] < 0.6 and first["sampled/cut_off"]["value"] < 0.01  # 47 % in training, before any update

    assert len(answers) == 2 * 200 * (1 + SAMPLES)
    greedy = answers[:: 1 + SAMPLES]
    assert [row["sample"] for row in answers] == list(range(1 + SAMPLES)) * 400
    assert sum(row["accuracy"] for row in greedy[:200]) == right == sum(row["rewards"]["reward_correct"] > 0
                                                                      for row in greedy[:200])
    assert all(row["format"] == (row["rewards"]["reward_format"] > 0) for row in answers)
    page = (run / "evaluation.html").read_text()
    order = [int(number) for number in re.findall(r"<h2>Problem (\d+)</h2>", page)]
    differ = [one["accuracy"] != other["accuracy"] for one, other in zip(greedy[:200], greedy[200:])]
    assert [differ[number - 1] for number in order] == [True] * sum(differ) + [False] * (200 - sum(differ))
    assert sorted(order) == list(range(1, 201)) and sum(differ) > 0

    # two processes, and the model with itself; a reference server is not asked, the number of processes is free
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port=29617", "--module", "grpo.evaluate"]
    code, text = launch(*launcher, *common, two_models, f"OUTPUT_DIR={tmp_path}/two").wait()
    assert code == 0, text
    assert not (tmp_path / "two/metrics.jsonl").exists()
    for name in "evaluation.json", "evaluation.jsonl", "evaluation.html":
        assert filecmp.cmp(run / name, tmp_path / "two" / name, shallow=False), name


def test_a_model_with_itself_differs_by_nothing(alone, launch, few, tiny_folder, tmp_path):
    few = [*few[2:], f"MODEL={tiny_folder},{tiny_folder}", "EVAL_SAMPLES=3"]
    code, text = launch(*ALONE, *few, f"OUTPUT_DIR={tmp_path}").wait()
    assert code == 0, text
    found = evaluated(tmp_path)
    assert {numbers["value"] for numbers in found["difference"].values()} == {0.0}
    assert "sampled/pass@2" in found["difference"] and "sampled/pass@3" in found["difference"]
    assert ends(found["difference"]["sampled/tokens"]) == [0, 0]
    low, high = ends(found["difference"]["greedy/format"])  # 20 problems cannot tell that there is no difference
    assert -low == pytest.approx(high) and 0.05 < high < 0.15
    assert checkpoint.begin(tmp_path, {"LR": 1.0}, False)[0] == 0  # the folder is free for a run: it holds none


@pytest.mark.parametrize("constant, value, sentence", [
    ("MODEL", "a,b,c", "MODEL=a,b,c: expected one model or two"),
    ("EVAL_DATASET", "", "EVAL_DATASET=: nothing to evaluate on"),
])
def test_what_cannot_be_evaluated_is_one_sentence(monkeypatch, constant, value, sentence):
    monkeypatch.setattr(evaluation, constant, value)
    with pytest.raises(SystemExit, match=sentence):
        evaluation.main()


class Tags(HTMLParser):
    """What a browser would see of a page: its tags, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_what_a_model_writes_stays_text():
    hostile = ["<script>alert(1)</script>", "</pre></td><img src=x onerror=alert(1)>", "\ud800 \u202e \x00 &lt; {note}",
               "'\"><svg/onload=alert(1)>", "</style><b>"]
    models = [[[answer(n == 1, model=name, problem=n, completion=text, prompt=text, columns={text: text},
                       rewards={text: None})] * 3 for n, text in enumerate(hostile)] for name in hostile[:2]]
    page = evaluation.page(models, hostile[2])
    seen = Tags(page)
    assert seen.tags <= set("html meta title style h1 h2 pre p table tr th td small details summary".split())
    assert not {"onerror", "onload", "src"} & seen.attributes
    assert page.isascii() and all(text in seen.text for text in (hostile[0], hostile[1], hostile[3], hostile[4]))
    assert "default-src 'none'" in page
