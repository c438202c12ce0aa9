"""Constants, data sets, and completions: their tokens, log-probs and random numbers."""

import copy
import json
import random
import sys
import types
from typing import Literal

import arithmetic
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from grpo.sampling import graph as graph_sampler
from grpo.sampling import transformers as sampler
from grpo.policy import token_logps
from grpo.constants import constants_of, override_constants
from grpo.attention import pack_attention
from grpo.data import load_prompts
from grpo.policy import load_model, stop_ids
from grpo.sampling.step import traced
from grpo.sampling import rollouts, sample
from grpo.sampling.transformers import draw
from grpo.types import Prompt
from test_ref_server import SHAPE, expected_logps, make_model

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19]]  # two begin alike


def test_greedy_tokens_are_those_of_generate(tiny):
    model, tokenizer = tiny
    stop = stop_ids(model, tokenizer)
    for prompt, completion in zip(PROMPTS, sample(model, PROMPTS, 1, max_tokens=20, stop=stop, temperature=0)):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert completion.tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_sampled_tokens_at_the_temperature(tiny, temperature):
    model, _ = tiny
    stop = list(range(0, 320, 10))  # many, so that sequences leave the batch at different times
    completions = sample(model, PROMPTS, 16, max_tokens=24, stop=stop, temperature=temperature, seeds=[1, 2, 3])
    assert len({len(completion.tokens) for completion in completions}) > 4
    for i, completion in enumerate(completions):
        prompt = torch.tensor(PROMPTS[i // 16])
        row = torch.cat([prompt, completion.tokens])
        lens = torch.tensor([len(prompt)]), torch.tensor([len(completion.tokens)])
        expected = token_logps(model, row, *lens, temperature)
        torch.testing.assert_close(completion.sampler_logps, expected, atol=1e-4, rtol=0)
        assert completion.ended == (completion.tokens[-1].item() in stop)
        assert completion.ended or len(completion.tokens) == 24
        assert not set(completion.tokens[:-1].tolist()) & set(stop)


def largest_difference(model, completions, group_size):
    """Of the completions' log-probs to those of plain transformers in float64."""
    lens = [[len(PROMPTS[i // group_size]), len(completion.tokens)] for i, completion in enumerate(completions)]
    tokens = [torch.cat([torch.tensor(PROMPTS[i // group_size]), c.tokens]) for i, c in enumerate(completions)]
    expected = expected_logps(model, torch.cat(tokens), *torch.tensor(lens).T, 1.0)
    return (torch.cat([completion.sampler_logps for completion in completions]) - expected).abs().max()


def test_a_traced_step_serves_other_numbers_of_rows_and_tokens_and_new_weights():
    model = make_model("Qwen2")
    pack_attention(model)
    for group_size, max_tokens in (2, 5), (16, 90), (1, 70):
        completions = sample(model, PROMPTS, group_size, max_tokens=max_tokens, stop=[0], seeds=[1, 2, 3])
        assert largest_difference(model, completions, group_size) < 2e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.8)
    with_it = sample(model, PROMPTS, 4, max_tokens=40, stop=[0], seeds=[1, 2, 3])
    assert traced[model] is not None
    traced[model] = None
    without = sample(model, PROMPTS, 4, max_tokens=40, stop=[0], seeds=[1, 2, 3])
    assert all(torch.equal(one.sampler_logps, other.sampler_logps) for one, other in zip(with_it, without))


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_step_whose_operations_depend_on_values_is_not_traced(experts):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(experts)
    pack_attention(model)
    completions = sample(model, PROMPTS, 4, max_tokens=20, stop=[0], seeds=[1, 2, 3])
    assert (traced[model] is None) == (experts == "eager")
    model.set_experts_implementation("eager")  # the other one is not for float64
    assert largest_difference(model, completions, 4) < 2e-5


def test_eos_counts_when_pad_is_eos(tiny):
    model, _ = tiny
    model.config.pad_token_id, before = 0, model.config.pad_token_id
    completions = sample(model, PROMPTS, 8, max_tokens=30, stop=list(range(0, 320, 4)), seeds=[1, 2, 3])
    model.config.pad_token_id = before
    ended = [completion for completion in completions if completion.ended]
    assert ended and all(c.tokens[-1] % 4 == 0 and len(c.sampler_logps) == len(c.tokens) for c in ended)


def test_a_prompt_has_the_same_completions_in_any_batch(tiny):
    model, _ = tiny
    together = sample(model, PROMPTS, 4, max_tokens=12, stop=[0], seeds=[1, 2, 3])
    alone = sample(model, PROMPTS[2:], 4, max_tokens=12, stop=[0], seeds=[3])
    assert [c.tokens.tolist() for c in together[8:]] == [c.tokens.tolist() for c in alone]
    assert len({tuple(c.tokens.tolist()) for c in alone}) == 4  # and different ones in its group


def test_more_sequences_than_fit_are_taken_in_slices(tiny, monkeypatch):
    model, _ = tiny
    whole = sample(model, PROMPTS, 4, max_tokens=6, stop=[0], seeds=[1, 2, 3])
    monkeypatch.setattr("grpo.sampling.MAX_SEQUENCES", 4)
    assert [c.tokens.tolist() for c in sample(model, PROMPTS, 4, max_tokens=6, stop=[0], seeds=[1, 2, 3])] == [
        c.tokens.tolist() for c in whole
    ]


@pytest.mark.parametrize("module", [sampler, graph_sampler])
def test_finished_groups_are_passed_on_while_others_are_being_written(tiny, monkeypatch, module):
    tokens, told = [], []
    monkeypatch.setattr(sampler, "BLOCK", 3)
    monkeypatch.setattr(sampler, "LOOK_EVERY", 3)
    monkeypatch.setattr(sampler, "draw", lambda *arguments: tokens.append(1) or draw(*arguments))
    options = {"max_tokens": 40, "stop": list(range(0, 320, 10)), "seeds": range(12)}
    prompts = [Prompt(ids) for ids in PROMPTS * 4]
    for groups in rollouts(tiny[0], prompts, 2, **options, decode=module.decode):
        told.append((len(tokens), groups))
    given = [id(group.prompt) for _, groups in told for group in groups]
    assert len(told) > 4 and sorted(given) == sorted(map(id, prompts))
    for written, groups in told:
        for group in groups:
            assert len(group.samples) == 2 and all(one.prompt is group.prompt for one in group.samples)
            longest = max(len(sample.tokens) for sample in group.samples)
            assert written - 3 < longest <= written  # not before all of the group, and soon after


def test_no_completion_ends_before_min_tokens(tiny):
    model, _ = tiny
    stop = list(range(1, 320, 2))
    completions = sample(model, PROMPTS, 32, max_tokens=9, min_tokens=5, stop=stop, seeds=[1, 2, 3])
    assert min(len(completion.tokens) for completion in completions) == 5


def test_dropout_is_off_while_sampling(tiny_folder):
    model, _ = load_model(tiny_folder)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    first, second = (sample(model, PROMPTS, 2, max_tokens=8, stop=[0], temperature=0) for _ in range(2))
    assert model.training
    assert [c.tokens.tolist() for c in first] == [c.tokens.tolist() for c in second]


def test_draw_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05, 0.0])
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    tokens, logps = draw(probabilities.log().expand(10000, -1), uniform)
    assert (torch.bincount(tokens, minlength=6) / 10000 - probabilities).abs().max() < 2e-4
    torch.testing.assert_close(logps, probabilities[tokens].log())


def test_draw_never_takes_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    tokens, _ = draw(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 2]


def test_generation_config_may_name_several_stop_tokens(tiny):
    model, tokenizer = tiny
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [7, 3]
    assert stop_ids(model, tokenizer) == sorted([3, 7, tokenizer.eos_token_id])
    model.generation_config.eos_token_id = before


def write(path, text):
    path.write_text(text)
    return str(path)


def test_prompts_come_from_questions_strings_and_messages(tiny, tmp_path):
    _, tokenizer = tiny
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    rows = [{"prompt": "as it is"}, {"prompt": messages}]
    verbatim, chat = load_prompts(
        write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))), tokenizer, "Think.", 99
    )
    assert verbatim.text == "as it is" and tokenizer.decode(verbatim.ids) == "as it is"
    assert chat.text == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    question = '{"question": "What is 1 + 1?", "answer": "2", "level": 3}'
    [row] = load_prompts(write(tmp_path / "q.jsonl", question), tokenizer, "Think.", 99)
    assert row.text == "<|im_start|>system\nThink.<|im_end|>\n" + chat.text
    assert row.columns == {"question": "What is 1 + 1?", "answer": "2", "level": 3}
    assert chat.messages == messages and row.messages is verbatim.messages is None


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", r"needs a column question \(QUESTION_COLUMN\) or prompt: 0 rows"),
        ('{"question": "a"}\n{"question": ', "line 2 is not a JSON object"),
        ('{"question": "a"}\n[1, 2]', "line 2 is not a JSON object"),
        ('{"problem": "a"}', r"column question \(QUESTION_COLUMN\) or prompt: 1 rows with ['problem']"),
        ('{"question": "a", "answer": "1"}\n{"question": "b"}', "row 2 .*: the columns are"),
        ('{"prompt": "What is 1 + 1 + 1 + 1 + 1 + 1 + 1?"}', "MAX_PROMPT_TOKENS=9"),
    ],
)
def test_a_bad_data_set_is_one_sentence(tiny, tmp_path, text, sentence):
    with pytest.raises(SystemExit, match=sentence.replace("[", r"\[")):
        load_prompts(write(tmp_path / "d.jsonl", text), tiny[1], "", 9)


def test_a_missing_data_set_is_one_sentence(tiny):
    with pytest.raises(SystemExit, match="cannot read the data set nowhere.jsonl"):
        load_prompts("nowhere.jsonl", tiny[1], "", 9)


def test_long_prompts_are_left_out_and_counted(tiny, tmp_path, capsys):
    text = '{"prompt": "1"}\n{"prompt": "1 + 1 + 1 + 1"}'
    assert len(load_prompts(write(tmp_path / "d.jsonl", text), tiny[1], "", 3)) == 1
    assert "left out 1 of 2 prompts" in capsys.readouterr().out


def test_a_missing_model_is_one_sentence():
    with pytest.raises(SystemExit, match="cannot load MODEL=nowhere/at/all"):
        load_model("nowhere/at/all")


def test_constants_from_the_command_line(monkeypatch):
    script = types.ModuleType("script")
    monkeypatch.setitem(sys.modules, "script", script)
    vars(script).update(STEPS=1, LR=0.5, ON=False, MODEL="a", REWARDS=[len], KIND="a", lower=1)
    script.__annotations__ = {"KIND": Literal["a", "b"]}
    words = ["--local_rank=0", "STEPS=7", "LR=1", "ON=True", "MODEL=x=y", "REWARDS=f,m:g", "KIND=b"]
    override_constants("script", words)
    assert constants_of("script") == {"STEPS": 7, "LR": 1.0, "ON": True, "MODEL": "x=y", "REWARDS": ["f", "m:g"],
                                      "KIND": "b"}
    assert script.lower == 1
    for argument, sentence in [
        ("KIND=c", "KIND=c: expected one of a, b"),
        ("STEP=1", "unknown constant 'STEP=1'.*STEPS"),
        ("STEPS=1.5", "expected int"),
        ("LR=fast", "expected float"),
        ("ON=1", "expected bool"),
        ("lower=1", "unknown"),
    ]:
        with pytest.raises(SystemExit, match=sentence):
            override_constants("script", [argument])
        assert script.STEPS == 7 and script.KIND == "b"


@pytest.mark.parametrize("vocabulary", [7, 1009, 5000, 151_936])  # a block of all, of one, several blocks
def test_a_token_is_drawn_by_its_cumulative_probability_whatever_the_vocabulary(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, vocabulary, generator=generator)
    logits[:, 1::2] = -torch.inf
    uniform = torch.rand(16, dtype=torch.float64, generator=generator)
    uniform[0], uniform[1] = 0, 1 - 2**-53
    tokens, logps = draw(logits, uniform)
    exact = logits.double().log_softmax(-1)
    ends = exact.exp().cumsum(-1)[torch.arange(16), tokens]
    starts = ends - exact.exp()[torch.arange(16), tokens]
    assert ((starts <= uniform + 1e-6) & (uniform <= ends + 1e-6)).all()
    assert not (tokens % 2).any()  # none of those that cannot be
    torch.testing.assert_close(logps.double(), exact[torch.arange(16), tokens], atol=1e-5, rtol=0)


def test_more_tokens_than_the_cache_has_room_for(tiny):
    model, tokenizer = tiny
    options = dict(max_tokens=150, stop=[-1], seeds=[3, 4, 5])
    plain_model = copy.deepcopy(model)
    plain_model.set_attn_implementation("sdpa")
    plain = [completion.tokens.tolist() for completion in sample(plain_model, PROMPTS, 2, **options)]
    assert model.config._attn_implementation == "packed" != plain_model.config._attn_implementation
    assert [completion.tokens.tolist() for completion in sample(model, PROMPTS, 2, **options)] == plain
    rows = [prompt + tokens for prompt, tokens in zip([p for p in PROMPTS for _ in range(2)], plain)]
    for completion, row in zip(sample(model, PROMPTS, 2, **options), rows):
        lens = torch.tensor([len(row) - 150]), torch.tensor([150])
        logps = token_logps(plain_model, torch.tensor(row), *lens)
        torch.testing.assert_close(completion.sampler_logps, logps, atol=1e-4, rtol=0)


def make_family_tokenizer(family):
    """Of the class that the family's models come with; Llama's and Gemma's with a token for each letter, and no chat
    template, as base models have none."""
    if family.startswith("Qwen"):
        return arithmetic.make_tokenizer(arithmetic.make_problems(50, random.Random(0)))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] if family == "Gemma3" else ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    kind = GemmaTokenizer if family == "Gemma3" else LlamaTokenizer
    return kind(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])


def save_family(family, folder, stop=()):
    """A small random model of the family, with its tokenizer, as one has it after a download; with more `stop` ids."""
    tokenizer = make_family_tokenizer(family)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_model(family, vocab_size=len(tokenizer), **ids)
    model.generation_config.update(**ids | {"eos_token_id": [tokenizer.eos_token_id, *stop]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama", "Gemma3", "Mistral", "Phi3"])
def test_families_of_models_are_sampled_as_transformers_does(family, tmp_path):
    stop = list(range(5, 320, 8))
    before = save_family(family, tmp_path, stop)
    model, tokenizer = load_model(str(tmp_path), 120)
    assert model.config._attn_implementation == "packed"
    text = "Say <think> 12,345 + h\u00e9llo\n\n(x - 1)  ok"
    assert tokenizer(text).input_ids == before(text).input_ids
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    prompts = [*PROMPTS, list(range(30, 70))]  # one is longer than any sliding window
    completions = sample(model, prompts, 1, max_tokens=24, stop=stop_ids(model, tokenizer), temperature=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        row = plain.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
        assert completion.tokens.tolist() == row[len(prompt) :].tolist()
        logps = plain(row[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[len(prompt) :, None])
        lens = torch.tensor([len(prompt)]), torch.tensor([len(completion.tokens)])
        for ours in completion.sampler_logps, token_logps(model, row, *lens):
            assert (ours - logps[:, 0]).abs().max() < 2e-5
    assert any(completion.tokens[-1] in stop for completion in completions)


def test_each_of_several_stop_tokens_ends_a_completion(tiny, tmp_path):
    model, tokenizer = tiny
    free = [c.tokens.tolist() for c in sample(model, PROMPTS, 1, max_tokens=12, stop=[-1], temperature=0)]
    first, second = free[0][2], next(token for token in free[1] if token not in free[0][:3])
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [first, second]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    stop = stop_ids(model, tokenizer)
    completions = sample(model, PROMPTS, 1, max_tokens=12, stop=stop, temperature=0)
    for completion, tokens in zip(completions, free):
        ends = [i for i, token in enumerate(tokens) if token in (first, second, tokenizer.eos_token_id)]
        assert completion.tokens.tolist() == tokens[: ends[0] + 1 if ends else 12] and completion.ended == bool(ends)
    assert completions[0].tokens[-1] == first != second == completions[1].tokens[-1]


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_a_base_model_gets_a_chat_template_that_is_saved(family, tmp_path):
    before = save_family(family, tmp_path)
    assert before.chat_template is None
    tokenizer = load_model(str(tmp_path))[1]
    data = write(tmp_path / "q.jsonl", '{"question": "1 + 1?"}')
    [row] = load_prompts(data, tokenizer, "Think.", 99)
    assert row.text == f"{before.bos_token}System: Think.\n\nUser: 1 + 1?\n\nAssistant:"
    assert row.ids[0] == before.bos_token_id and before.bos_token_id not in row.ids[1:]
    assert tokenizer.decode(row.ids[1:]).strip() == "System: Think.\n\nUser: 1 + 1?\n\nAssistant:"
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    assert saved.apply_chat_template(messages, add_generation_prompt=True).input_ids == row.ids
    assert "Assistant" not in saved.apply_chat_template(messages, tokenize=False)


def test_a_models_own_chat_template_stays(tiny):
    assert tiny[1].chat_template == arithmetic.CHAT_TEMPLATE


def test_a_chat_template_that_refuses_a_system_message(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
                               "{% endif %}{{ messages[0].content }}")
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1"}\n')
    with pytest.raises(SystemExit, match=r"row 1 of .*System role not supported \(SYSTEM_PROMPT= leaves"):
        load_prompts(f"{tmp_path}/data.jsonl", tokenizer, "Think.", 100)
    assert load_prompts(f"{tmp_path}/data.jsonl", tokenizer, "", 100)[0].text == "1 + 1"
