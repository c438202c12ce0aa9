"""What `generate` can run, this project can sample, score and train: families of models, small and random.

    python tests/test_families.py       # prints the table of docs/models.md
"""
import copy
import json
import random

import pytest
import torch
import transformers
from conftest import ROOT  # noqa: F401
from safetensors.torch import load_file, save_file

import arithmetic
import grpo_train
from grpo import checkpoint, distributed, sampling
from grpo.engine import start_engine
from grpo.policy import Policy, token_logps
from grpo.sampling import generate, sample
from grpo.types import in_batches, micro_batch, pack

SHAPE = dict(
    vocab_size=336, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8)
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
              linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8)
FAMILIES = {  # family: class in transformers, what its configuration has besides SHAPE
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Qwen3-Next": ("Qwen3Next", LINEAR | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                          "shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("Qwen3_5", LINEAR),
    "Llama": ("Llama", {}),
    "Llama 4": ("Llama4", EXPERTS | {"head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 64,
                                     "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}),
    "Mistral": ("Mistral", {"sliding_window": 8}),
    "Mixtral": ("Mixtral", EXPERTS),
    "Gemma 2": ("Gemma2", {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 0.5,
                           "final_logit_softcapping": 2.0}),
    "Gemma 3": ("Gemma3", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi-3": ("Phi3", {}),
    "OLMoE": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": ("DeepseekV3", dict(
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=16,
        kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        moe_intermediate_size=16)),
    "gpt-oss": ("GptOss", EXPERTS | {"head_dim": 8, "sliding_window": 8}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Mamba 2": ("Mamba2", dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2, chunk_size=8)),
    "Falcon-H1": ("FalconH1", MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3}),
    "Granite hybrid": ("GraniteMoeHybrid", MAMBA | EXPERTS | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}),
    "GLM": ("Glm4", {"head_dim": 8}),
    "SmolLM3": ("SmolLM3", {}),
}
PROMPTS = [[5, 6, 7], [5, 6, 7, 6, 5, 4, 3, 11], [4]]


def make_model(family: str, **options):
    torch.manual_seed(0)
    name, changes = FAMILIES[family]
    config = next(kind for ending in ("TextConfig", "Config") if (kind := getattr(transformers, name + ending, None)))
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config(**SHAPE | changes | options)))


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(0, 0.2)
    return model.eval()


VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=28,
              patch_size=14)
QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=4, out_hidden_size=32)
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
WITH_VISION = {  # class in transformers: family of its text model and what that has besides, its vision model
    "Gemma3": ("Gemma 3", {}, VISION),
    "Qwen3_5": ("Qwen3.5", {}, QWEN_VISION),
    "Lfm2Vl": ("LFM2", {"model_type": "lfm2"}, VISION | {"model_type": "siglip2_vision_model"}),
    "Qwen2_5_VL": ("Qwen2", ROPE, QWEN_VISION),
    "Mistral3": ("Mistral", {"model_type": "mistral"}, VISION | {"model_type": "pixtral"}),
    "Llama4": ("Llama 4", {}, VISION | dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)),
}


def make_model_with_vision(name: str):
    torch.manual_seed(0)
    family, text, vision = WITH_VISION[name]
    config = getattr(transformers, f"{name}Config")(
        text_config=SHAPE | FAMILIES[family][1] | text, vision_config=vision)
    return randomised(getattr(transformers, f"{name}ForConditionalGeneration")(config))


def save_model(model, folder) -> None:
    model.save_pretrained(folder)
    arithmetic.make_tokenizer(arithmetic.make_problems(50, random.Random(0))).save_pretrained(folder)


def check_family(family: str, folder, **options) -> str:
    """Greedy samples, their log-probs, and one update, against plain transformers; returns how it was sampled."""
    save_model(make_model(family, **options), folder)
    policy = Policy(str(folder), 64)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager",
                                                              experts_implementation="eager")
    samples = sample(policy.model, PROMPTS, 2, max_tokens=20, stop=[3, 4], temperature=0)
    for prompt, one in zip([prompt for prompt in PROMPTS for _ in range(2)], samples, strict=True):
        row = plain.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[3, 4],
                             pad_token_id=0, repetition_penalty=1.0)[0]
        assert one.tokens.tolist() == row[len(prompt) :].tolist()
        expected = plain(row[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, row[len(prompt) :, None])[:, 0]
        scored = token_logps(policy.model, row, torch.tensor([len(prompt)]), torch.tensor([len(one.tokens)]))
        for logps in one.sampler_logps, scored:
            assert (logps - expected).abs().max() < 2e-5, (logps - expected).abs().max()

    seeds, options = [1, 2, 3], dict(max_tokens=12, stop=[3, 4])
    assert len({tuple(one.tokens.tolist()) for one in sample(policy.model, PROMPTS, 4, seeds=seeds, **options)}) > 6
    for one in samples:
        one.weight, one.advantages = 1e-2, torch.linspace(-1, 1, len(one.tokens))
    batches = [micro_batch(some, "cpu") for some in in_batches(samples, 60)]
    exact = copy.deepcopy(plain)
    for one in samples:
        row = torch.tensor([[*one.prompt.ids, *one.tokens.tolist()]])
        logps = exact(row).logits[0, len(one.prompt.ids) - 1 : -1].log_softmax(-1)
        logps = logps.gather(1, one.tokens[:, None])[:, 0]
        (-one.weight * one.advantages * logps).sum().backward()
    engine = start_engine(policy.module, grpo_train.DS_CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    for batch in batches:
        batch.ref_logps = batch.sampler_logps
        loss, _ = grpo_train.GRPO_step(engine(batch.tokens, batch.prompt_lens, batch.completion_lens), batch)
        engine.backward(loss)
    exact_norm = torch.nn.utils.get_total_norm([p.grad for p in exact.parameters() if p.grad is not None]).item()
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(exact_norm, rel=1e-3)
    moved = [name for name, parameter in policy.model.named_parameters() if not torch.equal(before[name], parameter)]
    assert len(moved) > len(before) / 2
    return "the fast way" if sampling.decoder("transformers", policy.model) is not generate.decode else "`generate`"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_sampled_scored_and_trained_as_transformers_does(alone, family, tmp_path):
    way = check_family(family, tmp_path)
    assert row_of(family, way) in (ROOT / "docs/models.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_takes_bfloat16(family, tmp_path):
    """The default on a GPU; by how much it rounds is another test's matter."""
    save_model(make_model(family), tmp_path)
    policy = Policy(str(tmp_path), 64, "bfloat16")
    samples = sample(policy.model, PROMPTS, 2, max_tokens=8, stop=[3], temperature=0)
    logps = policy.module(*pack(samples))
    logps.sum().backward()
    gradients = [parameter.grad for parameter in policy.module.parameters() if parameter.grad is not None]
    assert all(one.dtype == torch.bfloat16 and one.isfinite().all() for one in gradients) and len(gradients) > 3
    assert (logps - torch.cat([one.sampler_logps for one in samples])).abs().mean() < 0.2


@pytest.mark.parametrize("name, changes", [
    ("Nemotron", {}),  # its attention hands nothing on
    ("RecurrentGemma", dict(lru_width=32, head_dim=8, block_types=["recurrent", "attention"], logits_soft_cap=2.0)),
])
def test_what_is_computed_in_another_way_is_known(name, changes, tmp_path):
    torch.manual_seed(0)
    model = randomised(getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SHAPE | changes)))
    save_model(model, tmp_path)
    policy, row = Policy(str(tmp_path), 64), torch.arange(5, 25)
    expected = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
    assert (policy.module(row, torch.tensor([1]), torch.tensor([19])) - expected).abs().max() < 2e-5


def test_a_model_that_routes_at_random_is_refused(tmp_path):
    save_model(transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**SHAPE | EXPERTS)), tmp_path)
    with pytest.raises(SystemExit, match="routes at random while it trains: it cannot be trained"):
        Policy(str(tmp_path), 64)


def test_weights_in_fp8_are_trained_in_full(tmp_path):
    """As Qwen3-8B-FP8 has them, with a scale for each matrix."""
    model = make_model("Qwen3").bfloat16()
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        scale = weights[name].float().abs().max() / 448
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                                     "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = Policy(str(tmp_path), 64, "bfloat16")
    for (name, ours), theirs in zip(policy.model.named_parameters(), model.parameters()):
        assert ours.dtype == torch.bfloat16 and (ours - theirs).norm() < 0.05 * theirs.norm(), name


def row_of(family: str, way: str) -> str:
    return f"| {family} | `{FAMILIES[family][0]}ForCausalLM` | {way} |"


def test_a_head_that_computes_logits_in_a_way_of_its_own_is_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.HyperCLOVAXConfig(**SHAPE, logits_scaling=0.1)  # a factor there; Granite's is a divisor
    save_model(randomised(transformers.HyperCLOVAXForCausalLM(config)), tmp_path)
    with pytest.raises(SystemExit, match="HyperCLOVAXForCausalLM computes its logits in a way of its own"):
        Policy(str(tmp_path), 64)


@pytest.mark.parametrize("family, noise", [
    ("Llama", {"attention_dropout": 0.5}), ("Phi-3", {"resid_pdrop": 0.5}), ("Mixtral", {"router_jitter_noise": 0.5})])
def test_what_is_trained_has_no_noise(family, noise, tmp_path):
    model = make_model(family, **noise)
    save_model(model, tmp_path)
    policy = Policy(str(tmp_path), 64)
    row = [torch.arange(5, 25), torch.tensor([5]), torch.tensor([15])]
    expected = token_logps(policy.model, *row)
    assert torch.equal(policy.module.train()(*row), expected)
    assert (token_logps(model.train(), *row) - expected).abs().max() > 1e-2  # so that equal means something


def test_a_row_may_not_reach_where_longrope_changes_the_frequencies_of_all(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    save_model(make_model("Phi-3", rope_parameters=rope, original_max_position_embeddings=32), tmp_path)
    Policy(str(tmp_path), 32)
    with pytest.raises(SystemExit, match="MAX_PROMPT_TOKENS [+] MAX_COMPLETION_TOKENS = 33 is over the 32 tokens"):
        Policy(str(tmp_path), 33)


@pytest.mark.parametrize("family", ["Mixtral", "Granite hybrid"])  # the fast way, and `generate`
def test_the_router_s_auxiliary_loss_is_no_part_of_the_update(alone, family, tmp_path):
    check_family(family, tmp_path, output_router_logits=True, router_aux_loss_coef=9.0)


@pytest.mark.parametrize("name", WITH_VISION)
def test_a_vision_language_checkpoint_is_trained_on_text_and_saved_whole(alone, name, tmp_path):
    save_model(make_model_with_vision(name), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0.5}')
    policy = Policy(str(tmp_path), 64)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    for prompt, one in zip(PROMPTS, sample(policy.model, PROMPTS, 1, max_tokens=10, stop=[3], temperature=0)):
        row = torch.tensor([*prompt, *one.tokens.tolist()])
        expected = plain(input_ids=row[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert expected.argmax(-1).tolist() == one.tokens.tolist()
        expected = expected.gather(1, one.tokens[:, None])[:, 0]
        scored = policy.module(row, torch.tensor([len(prompt)]), torch.tensor([len(one.tokens)]))
        for logps in one.sampler_logps, scored:
            assert (logps - expected).abs().max() < 2e-5
    scored.sum().backward()
    trained = [name for name, parameter in policy.module.named_parameters() if parameter.requires_grad]
    assert trained and not any("vis" in name for name in trained)
    checkpoint.rehearse(policy, str(tmp_path))
    checkpoint.write(tmp_path / "step_1.unfinished", policy)
    saved = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "step_1.unfinished")
    assert type(saved) is type(plain) and len(list(saved.parameters())) == len(list(plain.parameters()))
    assert (tmp_path / "step_1.unfinished/preprocessor_config.json").read_text() == '{"image_mean": 0.5}'


def test_lora_adapts_nothing_that_sees(tmp_path):
    save_model(make_model_with_vision("Qwen2_5_VL"), tmp_path)
    names = [name for name, one in Policy(str(tmp_path), 64, lora_rank=2).module.named_parameters() if one.requires_grad]
    assert len(names) == 28 and all("lora" in name and "language_model" in name for name in names), names


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_a_family_and_merges_into_it(family, tmp_path, capsys):
    save_model(make_model(family), tmp_path)
    policy = Policy(str(tmp_path), 64, lora_rank=4)
    assert "LoRA adapts" in capsys.readouterr().out
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    samples = sample(policy.model.get_base_model(), PROMPTS, 2, max_tokens=8, stop=[3], temperature=0)
    logps = policy.module(*pack(samples))
    logps.sum().backward()
    trained = {name: parameter for name, parameter in policy.module.named_parameters() if parameter.requires_grad}
    assert all("lora" in name for name in trained)
    assert sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained.values()) > 1
    sampled = torch.cat([one.sampler_logps for one in samples])
    assert (logps - sampled).abs().max() < 2e-5
    checkpoint.merged(policy.model).save_pretrained(tmp_path / "merged")
    plain = {"attn_implementation": "eager"}  # SDPA leaves Gemma 2's cap out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **plain)
    assert (token_logps(model, *pack(samples)) - sampled).abs().max() < 1e-3  # sums in another order
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **plain)
    assert (token_logps(model, *pack(samples)) - sampled).abs().max() > 1e-2


if __name__ == "__main__":
    import tempfile

    distributed.start()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            print(row_of(family, check_family(family, folder)), flush=True)
