"""Runs grpo_train.py several times in the same processes, which spares their start.

    deepspeed --num_accelerators 2 tests/in_turn.py COMMON=1 ... -- ZERO_STAGE=0 ... -- ZERO_STAGE=1 ...
"""

import runpy
import sys

import deepspeed

sys.path.insert(0, ".")
from grpo import head  # noqa: E402

head.LOGITS_PER_TILE = 2**14  # several tiles, as many as a process has tokens for
initialize = deepspeed.initialize


def initialize_and_split_all(config, **options):
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small models would stay whole with ZeRO 3
    return initialize(config=config, **options)


deepspeed.initialize = initialize_and_split_all
common, *turns = " ".join(sys.argv[1:]).split(" -- ")
for turn in turns:
    sys.argv = ["grpo_train.py", *common.split(), *turn.split()]
    runpy.run_path("grpo_train.py", run_name="__main__")
