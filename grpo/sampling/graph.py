"""A CUDA graph as the sampler: `SAMPLER="graph"`, for GPUs, where Python between two tokens costs more than the tokens.

A decode step launches hundreds of small kernels, and a GPU waits for most of them. The GPU records a step once and
repeats it. Without CUDA the steps are computed one by one.
"""
import torch

from grpo.sampling import transformers


def decode(model, *arguments):
    """As `transformers.decode`. SystemExit if the model needs something that a graph cannot repeat, see `obstacle`."""
    if reason := obstacle(model):
        raise SystemExit(f"SAMPLER=graph wants {reason}: use SAMPLER=transformers")
    return transformers.decode(model, *arguments, record=record)


def obstacle(model) -> str:
    """Why a graph cannot decode this model: what it would need. Empty if it can."""
    if model.config._attn_implementation != "packed":
        return "a model whose attention transformers lets others compute"
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        return "a model without experts (which ones a token needs is known only while the step runs)"
    if getattr(model.config.get_text_config(), "activation_sparsity_pattern", None):  # Gemma 3n
        return "a model that copies no numbers from the CPU at each token"
    kinds = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    if "dynamic" in kinds or "longrope" in kinds:
        return "rotary embeddings that do not depend on the largest position, as dynamic ones and longrope do"
    return ""


newest = None  # the CUDA graph that was recorded last; its memory serves the next one too
side = None  # the stream on which graphs are recorded; another one each time would have workspaces of its own


def record(step):
    """The step as a CUDA graph: a function that repeats it. Without CUDA the step itself.

    Like `torch.cuda.graph`, but it keeps the allocator's cache while the GPU has room, because training would have to
    allocate that memory again. In a recording the allocator cannot free what it has cached.
    """
    global newest, side
    if not torch.cuda.is_available():
        return step
    free, total = torch.cuda.mem_get_info()
    if free < total / 10:
        torch.cuda.empty_cache()
    graph, side = torch.cuda.CUDAGraph(), side or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(newest and newest.pool(), capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    newest = graph
    return graph.replay
