"""What gpu_check.sh measures, as JSON lines in $RESULTS.

    python benchmarks/gpu_probe.py demo FOLDER | compare NAME FILE | variants FOLDER... | shape 0.5b|1.5b | table
"""
import gc
import json
import os
import statistics
import sys
import time
import traceback

START, RESULTS, OUT = time.time(), os.environ["RESULTS"], os.environ["OUT"]
sys.path[:0] = [os.getcwd(), "benchmarks", "examples"]


def say(part, **values):
    def short(v):
        return float(f"{v:.4g}") if isinstance(v, float) else v
    line = json.dumps({"part": part} | {k: short(v) for k, v in values.items()}, default=str)
    print(line, flush=True)
    with open(RESULTS, "a") as file:
        file.write(line + "\n")


def rows_in(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def demo(folder):
    rows = rows_in(folder)
    steps = rows[1:]
    median = {k: statistics.median(r[k] for r in steps[1:] or steps) for k in (
        "seconds", "seconds_sample", "seconds_reward", "seconds_ref_wait", "seconds_train", "grad_norm")}
    say("demo", steps=len(steps), kl_first=steps[0]["kl"], kl_last=steps[-1]["kl"],
        eval_accuracy={r["step"]: r["eval_accuracy"] for r in rows if "eval_accuracy" in r},
        accuracy=[round(r["accuracy"], 3) for r in steps], first_step_seconds=steps[0]["seconds"],
        skipped=sum(r["skipped_updates"] for r in steps), peak_memory_mb=steps[-1]["peak_memory_mb"], **median)


def compared(name, file):
    say(f"compare: {name}", **json.loads(open(file).read().splitlines()[-1]))


def variants(*folders):
    for folder in folders:
        name = os.path.basename(folder)
        try:
            last = rows_in(folder)[-1]
            say(f"variant {name}", **{k: last.get(k) for k in (
                "step", "loss", "kl", "entropy", "grad_norm", "reward", "skipped_updates", "seconds", "seconds_sample",
                "seconds_train", "peak_memory_mb")})
        except (OSError, IndexError) as error:
            say(f"variant {name}", failed=repr(error))


def table():
    for line in open(RESULTS):
        row = json.loads(line)
        print((row.pop("part") + ": " + ", ".join(f"{k} {v}" for k, v in row.items()))[:400])


# ------------------------------------------------------------------------------------------------- on the device

def shape(name):
    global torch, gpu, compare, sample, graph, policy, DEVICE, CUDA, SMALL, functional
    import torch
    from torch.nn import functional
    CUDA, SMALL = torch.cuda.is_available(), not torch.cuda.is_available()
    import compare, gpu
    from grpo import policy
    from grpo.sampling import graph
    from grpo.sampling.transformers import sample
    DEVICE = gpu.DEVICE
    sections = {"0.5b": (benchmark, cudnn, after_graph),
                "1.5b": (fusion, benchmark, training, head, profile, blocks)}[name]
    say(f"{name} imports", seconds=time.time() - START, device=torch.cuda.get_device_name() if CUDA else "cpu")
    for section in sections:
        began = time.time()
        try:
            section("small" if SMALL else name)
        except Exception:
            say(f"{name} {section.__name__}", failed=traceback.format_exc().strip().splitlines()[-1])
            traceback.print_exc()
        finally:
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        print(f"-- {name} {section.__name__}: {time.time() - began:.1f} s", flush=True)


def stats(d):
    d = d.double()
    return {"rms": d.square().mean().sqrt().item(), "max": d.abs().max().item(), "k3": (d.expm1() - d).mean().item()}


def update(model, rows):
    policy.token_logps(model, *rows).mean().backward()
    model.zero_grad()


def decode_ms(model, tokens, decoder=None, times=1):
    vocab = model.config.vocab_size
    prompts = torch.randint(vocab, (8, 128), generator=torch.Generator().manual_seed(1)).tolist()

    def draw(count):
        sample(model, prompts, 8, max_tokens=count, min_tokens=count, stop=[0], seeds=list(range(8)),
               decoder=decoder)
    whole, half = (gpu.clock(lambda: draw(count), times) for count in (tokens, tokens // 2))
    return 1e3 * (whole - half) / (tokens - tokens // 2)


def benchmark(name):
    """benchmarks/gpu.py but for its longest completions: decode steps over their floor, MFU."""
    figures = gpu.main(shape=name, tokens="4" if SMALL else "128" if name == "0.5b" else "256", parts="speed")
    say(f"{name} benchmarks/gpu.py", **figures, peak_gb=torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0)


def cudnn(name):
    """torch 2.11 prefers cuDNN's attention on an H100; it makes a plan for every new (rows, tokens)."""
    if not CUDA:
        return
    model = gpu.make_model(name)
    vocab = model.config.vocab_size
    prompts = torch.randint(vocab, (8, 100)).tolist()
    rows = gpu.rows_of(12, 333, vocab)
    for on in False, True:
        torch.backends.cuda.enable_cudnn_sdp(on)
        try:
            seconds, steps = [], (12, 12)
            for count in steps:  # the second time the plans are there
                torch.cuda.synchronize()
                start = time.perf_counter()
                sample(model, prompts, 8, max_tokens=count, min_tokens=count, stop=[0], seeds=list(range(8)))
                seconds.append(1e3 * (time.perf_counter() - start) / count)
            trained = []
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                update(model, rows)
                torch.cuda.synchronize()
                trained.append(time.perf_counter() - start)
            say(f"{name} cuDNN attention {'on, as by default' if on else 'off'}", decode_ms_new_shapes=seconds[0],
                decode_ms_again=seconds[1], update_s_new_shape=trained[0], update_s_again=trained[-1])
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)


def after_graph(name):
    """What a training pass costs after sampling in a graph: `torch.cuda.graph` would empty the allocator's cache."""
    if not CUDA:
        return
    model = gpu.make_model(name)
    rows, seconds = gpu.rows_of(25, 512, model.config.vocab_size), {}
    gpu.clock(lambda: update(model, rows), 1)
    for way, decoder in ("eager", None), ("graph", graph.decode):
        sample(model, [[5] * 30] * 8, 8, max_tokens=16, min_tokens=16, stop=[0], seeds=range(8),
               decoder=decoder)
        torch.cuda.synchronize()
        start = time.perf_counter()
        update(model, rows)
        torch.cuda.synchronize()
        seconds[way] = time.perf_counter() - start
    say(f"{name} training pass of 16,000 tokens after sampling", **{f"after_{k}_s": v for k, v in seconds.items()})


def training(name):
    model = gpu.make_model(name)
    parameters = model.num_parameters()
    for count, checkpointing in ((2, False), (2, True)) if SMALL else ((12, False), (25, True), (25, False)):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        rows = gpu.rows_of(count, 4 if SMALL else 512, model.config.vocab_size)
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9 if CUDA else 0.0
        try:
            seconds = gpu.clock(lambda: update(model, rows), 2)
        except torch.OutOfMemoryError as error:
            say(f"{name} training, {count} rows of 640", checkpointing=checkpointing, failed=str(error)[:120])
            continue
        computed = -(-count // 8) * gpu.PROMPT + int(rows[2].sum())
        say(f"{name} training, {count} rows of 640", checkpointing=checkpointing, seconds=seconds,
            tokens_s=computed / seconds, mfu_percent=6 * parameters * computed / seconds / 989e12 * 100,
            before_gb=before,
            peak_gb=torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0)


def head(name):
    """The LM head: sizes of its tiles, a number of entries that is no multiple of 128, logits rounded to bfloat16."""
    size, vocab = compare.SHAPES[name]["hidden_size"], 512 if SMALL else 151936
    count, dtype = (64, torch.float32) if SMALL else (15360, torch.bfloat16)
    hidden = torch.randn(count, size, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, size, device=DEVICE) * 3.5 / size**0.5).to(dtype).requires_grad_()
    top = torch.randint(vocab, (count,), device=DEVICE)
    hidden.data += (weight.data[top].float() * 1.2).to(dtype)
    few = slice(0, 16 if SMALL else 256)
    exact = hidden.detach()[few].double() @ weight.detach().double().T
    exact = exact.log_softmax(-1).gather(1, top[few, None])[:, 0]
    plain = policy.HeadLogps.tiles

    def rounded(ctx, hidden, weight, bias, targets):
        for start in range(0, len(weight), ctx.tile_size):
            tile = slice(start, start + ctx.tile_size)
            logits = functional.linear(hidden, weight[tile]).float()
            place = targets - start
            inside = (0 <= place) & (place < logits.shape[1])
            yield tile, logits, place.clamp(0, logits.shape[1] - 1)[:, None], inside

    def odd(ctx, *inputs):
        ctx.tile_size = policy.LOGITS_PER_TILE // count
        return plain(ctx, *inputs)

    ways = (("2^26", plain, 2**26), ("2^27", plain, 2**27), ("2^28", plain, 2**28),
            ("2^26, rounded to bfloat16", rounded, 2**26), ("2^26, no multiple of 128", odd, 2**26))
    for way, tiles, per_tile in ways:
        policy.HeadLogps.tiles = staticmethod(tiles)
        try:
            def both():
                policy.HeadLogps.apply(hidden, weight, None, top, 1.0, None, per_tile).sum().backward()

            def forward():
                with torch.no_grad():
                    return policy.HeadLogps.apply(hidden, weight, None, top, 1.0, None, per_tile)
            error = stats(forward()[few].double() - exact)
            say(f"{name} head, {way}", forward_ms=1e3 * gpu.clock(forward), both_ms=1e3 * gpu.clock(both), **error)
        finally:
            policy.HeadLogps.tiles = staticmethod(plain)


def profile(name):
    """Where the time of a training pass and of a replayed decode step goes: profile.txt."""
    from torch.profiler import ProfilerActivity
    model = gpu.make_model(name)
    rows = gpu.rows_of(2 if SMALL else 12, 4 if SMALL else 512, model.config.vocab_size)
    count = 4 if SMALL else 32

    def draw():
        sample(model, [[5] * 128] * 8, 8, max_tokens=count, min_tokens=count, stop=[0], seeds=range(8),
                decoder=graph.decode)

    def cost(event):  # microseconds
        return event.self_device_time_total if CUDA else event.self_cpu_time_total

    works = {"training pass": lambda: update(model, rows), f"graph sampler, {count} tokens x 64": draw}
    for title, work in works.items():
        work()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as found:
            work()
            if CUDA:
                torch.cuda.synchronize()
        kernels = sorted((event for event in found.key_averages() if cost(event)), key=cost, reverse=True)
        total = sum(map(cost, kernels))
        with open(f"{OUT}/profile.txt", "a") as file:
            print(f"\n{name} {title}: {total / 1e3:.1f} ms, {sum(e.count for e in kernels)} kernels", file=file)
            for e in kernels[:40]:
                print(f"{cost(e) / total:6.1%} {cost(e) / 1e3:9.2f} ms {e.count:7d}  {e.key[:150]}", file=file)
        say(f"{name} profile, {title}", gpu_ms=total / 1e3, kernels=sum(e.count for e in kernels),
            top=[f"{cost(e) / total:.0%} {e.key[:48]}" for e in kernels[:5]])


def fusion(name):
    """Kernels of torch and its compiler for norms, gates and rotary embeddings, instead of transformers' many."""
    rows = gpu.rows_of(2 if SMALL else 12, 4 if SMALL else 512, 512 if SMALL else 151936)
    for way, fused in ("as transformers has them", False), ("fused", True):  # in this order: rotary ones stay fused
        model = gpu.make_model(name, fused)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        seconds = gpu.clock(lambda: update(model, rows), 2)
        peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
        say(f"{name} small operations {way}", update_s=seconds, peak_gb=peak,
            graph_ms=decode_ms(model, 4 if SMALL else 128, graph.decode))
        del model


def blocks(name):
    """What recording again every 64 tokens costs: more tokens a recording."""
    model, before, plain, seconds = gpu.make_model(name), graph.BLOCK, graph.record, []

    def timed(step):
        torch.cuda.synchronize()
        start = time.perf_counter()
        replay = plain(step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return replay

    graph.record = timed
    for block in before, 128, 256:
        graph.BLOCK = block
        try:
            ms = decode_ms(model, 4 if SMALL else 512, graph.decode)
            say(f"{name} graph of {block} tokens", graph_ms=ms, record_ms=1e3 * statistics.median(seconds or [0.0]))
        finally:
            graph.BLOCK = before
    graph.record = plain


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {"demo": demo, "compare": compared, "variants": variants, "shape": shape, "table": table}[what](*rest)
