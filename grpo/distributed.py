"""The processes of a run: how they start, add up and end together.

One process a GPU, started by `deepspeed`; or one alone, started by `python`. If one of them fails, all end, and its
error is the last one on the screen. SIGTERM and Ctrl-C ask for the end of the step; the same signal again ends at once.
"""
import os
import signal
import sys
import threading
import traceback

import deepspeed
import torch
import torch.distributed as dist

stopping = threading.Event()  # somebody asked for the end of the run


def start() -> tuple[int, int]:
    """Rank and number of processes; without the deepspeed launcher there is one. SystemExit if they cannot meet."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        place = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        raise SystemExit(f"the processes of this run cannot meet at {place}: {error} (a second run on one machine "
                         "needs a port of its own: deepspeed --master_port 29501 grpo_train.py ...)") from error
    return dist.get_rank(), dist.get_world_size()


def reduce(values: dict[str, float | torch.Tensor], operation=dist.ReduceOp.SUM) -> dict[str, float]:
    """The values summed (or else) over all processes."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device) for value in values.values()])
    dist.all_reduce(numbers, operation)
    return dict(zip(values, numbers.tolist()))


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
    except SystemExit as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except Exception as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) or alone_for(10):
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def alone_for(seconds: float) -> bool:
    """False if the launcher ends this process meanwhile: another one has failed, which is the cause."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return not stopping.wait(seconds)
