"""vLLM as the sampler: `SAMPLER="vllm"`, an engine in every process of the trainer (`tests/requirements-vllm.txt`).

vLLM computes with other kernels than the trainer, so the log-probs of its tokens are not quite those of the policy that
is trained: `GRPO_step` corrects for that (see IS_CAP in grpo_train.py).
"""
import os

import torch

from grpo.checkpoint import merged
from grpo.types import Group, Prompt, Sample


class Engine:
    """The policy's model in vLLM, in a share `memory` of the GPU. SystemExit if vLLM is not installed."""

    def __init__(self, policy, memory: float):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where the weights are
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads use the same cores
        try:
            from vllm import LLM
        except ImportError as error:
            raise SystemExit(f"SAMPLER=vllm: {error} (pip install -r tests/requirements-vllm.txt)") from None
        self.policy, self.on_gpu = policy, torch.cuda.is_available()
        device = {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        if not self.on_gpu:
            # There a tied LM head is packed once and for all, and half a prompt cannot be taken back from a seed.
            device = {"enforce_eager": True, "hf_overrides": {"tie_word_embeddings": False},
                      "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, policy.max_length)}
        self.llm = LLM(policy.path, dtype=str(policy.model.dtype).removeprefix("torch."), load_format="dummy",
                       trust_remote_code=policy.trust_remote_code, max_model_len=policy.max_length,
                       disable_log_stats=True, logprobs_mode="processed_logprobs",
                       distributed_executor_backend="external_launcher", **device)
        self.sleep()

    def sleep(self) -> None:
        """Frees weights and cache until they are needed; a CPU keeps them."""
        if self.on_gpu:
            self.llm.sleep(level=2)

    def wake(self) -> None:
        """Takes over the policy's weights, which are whole meanwhile."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        plain = merged(self.policy.model, self.policy.model.device)
        weights = {name: parameter.detach() for name, parameter in plain.named_parameters()}
        if plain.config.tie_word_embeddings:
            weights["lm_head.weight"] = plain.get_output_embeddings().weight.detach()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def rollouts(self, prompts: list[Prompt], group_size: int, *, max_tokens: int, stop: list[int], temperature=1.0,
                 min_tokens=0, seeds: list[int] | None = None):
        """As `rollouts` of `grpo.sampling`; the log-probs are those that vLLM sampled from."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        with self.policy.gathered():
            self.wake()
        engine = self.llm.llm_engine
        for place, (prompt, seed) in enumerate(zip(prompts, seeds or [0] * len(prompts))):
            engine.add_request(str(place), {"prompt_token_ids": prompt.ids}, SamplingParams(
                n=group_size, temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens,
                seed=seed * group_size % 2**63,  # vLLM counts on from it for the others of the group
                stop_token_ids=stop, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY))
        while engine.has_unfinished_requests():
            if finished := [group(prompts[int(answer.request_id)], answer.outputs) for answer in engine.step()]:
                yield finished
        self.sleep()


def group(prompt: Prompt, outputs) -> Group:
    return Group(prompt, [
        Sample(prompt, torch.tensor(output.token_ids), logps(output), output.finish_reason == "stop")
        for output in sorted(outputs, key=lambda output: output.index)])


def logps(output) -> torch.Tensor:
    return torch.tensor([entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs)])
