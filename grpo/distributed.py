"""The processes of a run: start, share values, shut down.

`deepspeed` starts one process for each GPU, `python` a single one. If a process fails, all end, and its error is the
last one on the screen. SIGTERM or Ctrl-C ends the run after the current step; the same signal again ends it at once.
"""
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from grpo.constants import explained

stopping = threading.Event()  # set by a signal: end the run after the current step


def start() -> tuple[int, int]:
    """Rank and number of processes (one without the deepspeed launcher). SystemExit if they cannot connect."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    with explained("the processes of this run cannot meet at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ),
                   dist.DistNetworkError, hint=" (a second run on one machine needs a port of its own: "
                                               "deepspeed --master_port 29501 grpo_train.py ...)"):
        # NCCL's ten minutes are over while one process still downloads the model, or has a longer completion
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size()


def of_all(value) -> list:
    """The value, any picklable object, of every process, in their order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reduce(values: list[float | torch.Tensor]) -> list[float]:
    """Each value summed over all processes."""
    return [sum(some) for some in zip(*of_all([float(value) for value in values]))]


def std(values: list[float]) -> float:
    """The sample standard deviation of all processes' values, NaN aside; NaN if there are not two of them."""
    numbers = torch.tensor(sum(of_all(values), []), dtype=torch.float64)
    return numbers[~numbers.isnan()].std().item()


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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout.flush()  # the error comes last
        cause = error.__cause__ or error
        hint = f" (pip install {cause.name})" if isinstance(cause, ModuleNotFoundError) else ""
        of_another = isinstance(cause, dist.DistError) or "gloo" in str(cause)
        said = f"{error}{hint}" if isinstance(error, SystemExit) or hint else traceback.format_exc()
        if not (of_another and stopping.wait(10)):  # the launcher ends this process meanwhile, if it saw the other fail
            print(said, file=sys.stderr)
    sys.stdout.flush()
    os._exit(1)
