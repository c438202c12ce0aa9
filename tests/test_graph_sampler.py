"""SAMPLER="graph": steps of fixed shapes draw the same completions, and read no value, which no graph could repeat."""

import pytest
import torch
import transformers
from conftest import rows
from test_sampler import PROMPTS
from torch.utils._python_dispatch import TorchDispatchMode

from grpo import sampling
from grpo.attention import pack_attention
from grpo.sampling import generate, sample
from grpo.sampling import graph as graph_sampler
from grpo.sampling import transformers as transformers_sampler
from grpo.sampling.step import Step

MANY = list(range(0, 320, 10))  # stop tokens, so that completions end all the time


@pytest.mark.parametrize("options", [
    {"max_tokens": 24, "stop": MANY}, {"max_tokens": 23, "stop": MANY, "temperature": 0.7, "min_tokens": 9},
    {"max_tokens": 24, "stop": MANY, "temperature": 0}, {"max_tokens": 70, "stop": [-1]},
    {"max_tokens": 1, "stop": MANY}])
@pytest.mark.parametrize("block", [5, 64])
def test_the_completions_are_those_of_the_other_sampler(tiny, monkeypatch, options, block):
    monkeypatch.setattr(transformers_sampler, "BLOCK", block)
    monkeypatch.setattr(transformers_sampler, "LOOK_EVERY", 3)
    model, _ = tiny
    decoders = generate.decode, transformers_sampler.decode, graph_sampler.decode
    expected, *found = (sample(model, PROMPTS, 16, seeds=[1, 2, 3], decode=decoder, **options) for decoder in decoders)
    for completions in found:
        assert len(completions) == len(expected) == 48
        for ours, theirs in zip(completions, expected):
            assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.ended == theirs.ended
            torch.testing.assert_close(ours.sampler_logps, theirs.sampler_logps, atol=1e-5, rtol=0)
    if options["stop"] is MANY and options["max_tokens"] > 1:
        assert len({len(completion.tokens) for completion in completions}) > 4 or not options.get("temperature", 1)


class Reads(TorchDispatchMode):
    """Counts the operations that bring a value to Python."""
    count, names = 0, ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        self.count += name in self.names or by_mask
        return function(*arguments, **options or {})


def test_a_step_reads_no_value(tiny, monkeypatch):
    monkeypatch.setattr(transformers_sampler, "LOOK_EVERY", 64)
    monkeypatch.setattr(transformers_sampler, "next_logits", lambda model, *inputs: Step(model)(*inputs))  # as on a GPU

    def reads(tokens, decoder):
        with Reads() as counted:
            sample(tiny[0], PROMPTS, 4, max_tokens=tokens, stop=[-1], min_tokens=3, seeds=[1, 2, 3], decode=decoder)
        return counted.count

    assert reads(60, graph_sampler.decode) == reads(6, graph_sampler.decode)
    assert reads(60, None) > reads(6, None)  # so that the count means something


def make_mixtral():
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, num_local_experts=4, num_experts_per_tok=2)).eval()
    pack_attention(model)
    return model


def test_a_model_with_experts_is_refused():
    model = make_mixtral()
    with pytest.raises(SystemExit, match="SAMPLER=graph wants a model without experts"):
        sample(model, PROMPTS, 2, max_tokens=4, stop=[-1], seeds=[1, 2, 3], decode=graph_sampler.decode)


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0,
     "original_max_position_embeddings": 64, "rope_theta": 10000.0}])
def test_rotary_embeddings_that_read_the_length_are_refused_and_sampled_without_a_graph(rope):
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=128, rope_parameters=rope)
    model = transformers.Qwen2ForCausalLM(config).eval()
    pack_attention(model)
    options = {"max_tokens": 4, "stop": [-1], "seeds": [1, 2, 3]}
    with pytest.raises(SystemExit, match="SAMPLER=graph wants rotary embeddings that do not depend on the largest"):
        sample(model, PROMPTS, 2, **options, decode=graph_sampler.decode)
    assert len(sample(model, PROMPTS, 2, **options)) == 6


def test_the_graph_is_taken_on_a_gpu_where_the_model_allows(tiny, monkeypatch):
    model = tiny[0]
    assert sampling.decoder("graph", model) is graph_sampler.decode
    plain = transformers_sampler.decode
    assert sampling.decoder("auto", model) is sampling.decoder("transformers", model) is plain  # on a CPU
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert sampling.decoder("auto", model) is graph_sampler.decode
    assert sampling.decoder("transformers", model) is plain
    mixtral = make_mixtral()
    monkeypatch.setattr(type(mixtral), "device", torch.device("cuda"))
    assert sampling.decoder("auto", mixtral) is plain


def test_a_run_with_it_is_a_run_without_it(launch, few, tmp_path):
    found = []
    for sampler in "transformers", "graph":
        folder = tmp_path / sampler
        arguments = [*few, "BETA=0", "STEPS=3", "EVAL_EVERY=3", "SAVE_EVERY=0", f"SAMPLER={sampler}"]
        code, text = launch("grpo_train.py", *arguments, f"OUTPUT_DIR={folder}").wait(100)
        assert code == 0, text
        found.append([row["completion"] for row in rows(folder / "completions.jsonl")])
    assert found[0] == found[1]
