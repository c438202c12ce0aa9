"""Qwen2.5-1.5B-Instruct on GSM8K, grade school mathematics in words: 7,473 problems, and 1,319 to test.

    deepspeed examples/gsm8k.py                                 # all GPUs; needs the Hugging Face hub
    deepspeed examples/gsm8k.py LR=2e-6 OUTPUT_DIR=runs/faster  # any constant of grpo_train.py, as there

Columns: `question`, and `answer`, a solution that ends with "#### " and the number, which `reward_correct` looks for.
"""
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTANTS = [  # those that differ from grpo_train.py's
    "MODEL=Qwen/Qwen2.5-1.5B-Instruct",
    "DATASET=openai/gsm8k:main:train",
    "EVAL_DATASET=openai/gsm8k:main:test[:200]",  # without [:200] all of it, which takes longer
    "OUTPUT_DIR=runs/gsm8k",
    "STEPS=500",
    "MAX_PROMPT_TOKENS=512",
    "MAX_COMPLETION_TOKENS=512",
    "BETA=0",  # or 0.04, with a reference server
    "LR=1e-6",
    "GRADIENT_CHECKPOINTING=True",
    "EVAL_EVERY=50",
    "SAVE_EVERY=100",
]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.argv[1:] = [*CONSTANTS, *sys.argv[1:]]  # of two values the later wins
    runpy.run_path(str(ROOT / "grpo_train.py"), run_name="__main__")
