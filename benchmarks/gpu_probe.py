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
    global torch, gpu, sample, graph, policy, CUDA, SMALL
    import torch
    CUDA, SMALL = torch.cuda.is_available(), not torch.cuda.is_available()
    import gpu
    from grpo import policy
    from grpo.sampling import graph
    from grpo.sampling import sample
    sections = {"0.5b": (benchmark,), "1.5b": (benchmark, training, profile)}[name]
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


def update(model, rows):
    policy.token_logps(model, *rows).mean().backward()
    model.zero_grad()


def benchmark(name):
    """benchmarks/gpu.py but for its longest completions: decode steps over their floor, MFU."""
    figures = gpu.main(shape=name, tokens="4" if SMALL else "128" if name == "0.5b" else "256", parts="speed")
    say(f"{name} benchmarks/gpu.py", **figures, peak_gb=torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0)


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


def profile(name):
    """Where the time of a training pass and of a replayed decode step goes: profile.txt."""
    from torch.profiler import ProfilerActivity
    model = gpu.make_model(name)
    rows = gpu.rows_of(2 if SMALL else 12, 4 if SMALL else 512, model.config.vocab_size)
    count = 4 if SMALL else 32

    def draw():
        sample(model, [[5] * 128] * 8, 8, max_tokens=count, min_tokens=count, stop=[0], seeds=range(8),
                decode=graph.decode)

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


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {"demo": demo, "compare": compared, "variants": variants, "shape": shape, "table": table}[what](*rest)
