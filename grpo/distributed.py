"""The processes of a run: start, all-reduce, shut down.

`deepspeed` starts one process for each GPU, `python` a single one. If a process fails, all end, and its error is the
last one on the screen. SIGTERM or Ctrl-C ends the run after the current step; the same signal again ends it at once.
"""
import os
import signal
import sys
import threading
import traceback

import deepspeed
import torch
import torch.distributed as dist

stopping = threading.Event()  # set by a signal: end the run after the current step


def start() -> tuple[int, int]:
    """Rank and number of processes (one without the deepspeed launcher). SystemExit if they cannot connect."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        place = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        raise SystemExit(f"the processes of this run cannot meet at {place}: {error} (a second run on one machine "
                         "needs a port of its own: deepspeed --master_port 29501 grpo_train.py ...)") from None
    return dist.get_rank(), dist.get_world_size()


def reduce(values: list[float | torch.Tensor], operation=dist.ReduceOp.SUM) -> list[float]:
    """All-reduce: each value summed over all processes, or combined by another operation."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device) for value in values])
    dist.all_reduce(numbers, operation)
    return numbers.tolist()


def largest(value: float) -> float:
    """The largest of all processes' values."""
    return reduce([value], dist.ReduceOp.MAX)[0]


def std(values: list[float]) -> float:
    """The sample standard deviation of all processes' values, NaN aside."""
    numbers = torch.tensor(values, dtype=torch.float64)
    numbers = numbers[~numbers.isnan()]
    total, count = reduce([numbers.sum(), len(numbers)])
    squares = reduce([(numbers - total / max(1, count)).square().sum()])[0]
    return (squares / max(1, count - 1)) ** 0.5


def from_first(value):
    """The first process's value, any picklable object."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def stop_at_signals() -> None:
    """From now on the first SIGTERM or SIGINT only sets `stopping`. The launcher makes both of one Ctrl-C."""
    def ask(number, frame):
        signal.signal(number, signal.SIG_DFL)
        if not stopping.is_set() and os.environ["RANK"] == "0":
            print("\nstopping after this step; the same signal again ends at once", file=sys.stderr, flush=True)
        stopping.set()

    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, ask)


def run(main) -> None:
    """Calls main(). An error is printed and ends this process at once, whatever its threads are waiting for."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except (Exception, SystemExit) as error:
        cause = error.__cause__ or error
        hint = f" (pip install {cause.name})" if isinstance(cause, ModuleNotFoundError) else ""
        if not isinstance(cause, dist.DistError) and "gloo" not in str(cause) or alone_for(10):
            if isinstance(error, SystemExit) or hint:
                print(f"{error}{hint}", file=sys.stderr)
            else:
                traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def alone_for(seconds: float) -> bool:
    """False if the launcher ends this process meanwhile: another one has failed, which is the cause."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return not stopping.wait(seconds)
