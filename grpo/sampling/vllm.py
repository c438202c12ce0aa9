"""vLLM as the sampler: `SAMPLER="vllm"`, an engine in every process of the trainer (`tests/requirements-vllm.txt`).

    engine = Engine("Qwen/Qwen2.5-1.5B-Instruct", max_length=1024, memory=0.4, dtype="bfloat16")
    with engine.ready(model, gathered):                   # the policy's weights, through memory, after each update
        completions = engine.sample(prompts, group_size, max_tokens=512, stop=stop, seeds=seeds)

vLLM computes with other kernels than the trainer, so the log-probs of its tokens are not quite those of the policy that
is trained: `GRPO_step` corrects for that (see IS_CAP in grpo_train.py).
"""
import os
from contextlib import contextmanager

import torch

from grpo.checkpoint import merged
from grpo.sampling.transformers import in_order
from grpo.types import Completion

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, or weights would have to leave it
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads use the same cores


class Engine:
    """The model at `path` without its weights, for `max_length` tokens of prompt and completion, in a share of the
    GPU's `memory`. SystemExit if vLLM is not installed."""

    def __init__(self, path: str, max_length: int, memory: float, dtype: str):
        try:
            from vllm import LLM
        except ImportError as error:
            raise SystemExit(f"SAMPLER=vllm: {error} (pip install -r tests/requirements-vllm.txt)") from error
        self.on_gpu = torch.cuda.is_available()
        device = {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        if not self.on_gpu:
            # There a tied LM head is packed once and for all, and half a prompt cannot be taken back from a seed.
            device = {"enforce_eager": True, "hf_overrides": {"tie_word_embeddings": False},
                      "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_length)}
        self.llm = LLM(path, dtype=dtype, load_format="dummy", max_model_len=max_length, disable_log_stats=True,
                       distributed_executor_backend="external_launcher", logprobs_mode="processed_logprobs", **device)
        self.sleep()

    def sleep(self) -> None:
        """Gives weights and cache back until they are needed; a CPU keeps them."""
        if self.on_gpu:
            self.llm.sleep(level=2)

    @contextmanager
    def ready(self, model, gathered):
        """In this context `sample` has the weights of `model`, which are whole within `gathered()`."""
        with gathered():
            if self.on_gpu:
                torch.cuda.empty_cache()
                self.llm.wake_up(tags=["weights"])
            plain = merged(model)
            weights = {name: parameter.detach() for name, parameter in plain.named_parameters()}
            if plain.config.tie_word_embeddings:
                weights["lm_head.weight"] = plain.get_output_embeddings().weight.detach()
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        yield
        self.sleep()

    def rollouts(self, prompts: list[list[int]], group_size: int, *, max_tokens: int, stop: list[int],
                 temperature: float = 1.0, min_tokens: int = 0, seeds: list[int] | None = None):
        """As `transformers.rollouts`, by the weights that were loaded last; log-probs are those that vLLM sampled
        from."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for place, (ids, seed) in enumerate(zip(prompts, seeds or [0] * len(prompts))):
            engine.add_request(str(place), {"prompt_token_ids": ids}, SamplingParams(
                n=group_size, temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens,
                seed=seed * group_size,  # vLLM counts on from it for the others of the group
                stop_token_ids=stop, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY))
        while engine.has_unfinished_requests():
            finished = {int(answer.request_id): [
                Completion(torch.tensor(output.token_ids), logps(output), output.finish_reason == "stop")
                for output in sorted(answer.outputs, key=lambda output: output.index)] for answer in engine.step()}
            if finished:
                yield finished

    def sample(self, *arguments, **options) -> list[Completion]:
        return in_order(self.rollouts(*arguments, **options))


def logps(output) -> torch.Tensor:
    return torch.tensor([entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs)])
