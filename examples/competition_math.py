r"""Qwen2.5-1.5B-Instruct on MATH, competition problems: its 7,500 for training, 500 of its 5,000 others to test.

    deepspeed examples/competition_math.py           # all GPUs; needs the Hugging Face hub; any constant behind it

Columns: `problem`, and `solution`, whose \boxed{} `accuracy_reward` compares with that of the completion. The file is
not called math.py, because every script in this folder would import it in place of Python's `math`.
"""
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTANTS = [  # those that differ from grpo_train.py's
    "MODEL=Qwen/Qwen2.5-1.5B-Instruct",
    "DATASET=DigitalLearningGmbH/MATH-lighteval:default:train",
    "EVAL_DATASET=HuggingFaceH4/MATH-500:default:test",
    "QUESTION_COLUMN=problem",
    r"SYSTEM_PROMPT=Reason step by step, and put your final answer within \boxed{}.",
    "REWARDS=accuracy_reward",
    "OUTPUT_DIR=runs/math",
    "STEPS=500",
    "MAX_PROMPT_TOKENS=512",
    "MAX_COMPLETION_TOKENS=1536",
    "BETA=0",
    "LR=1e-6",
    "GRADIENT_CHECKPOINTING=True",
    "EVAL_EVERY=50",
    "SAVE_EVERY=100",
]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.argv[1:] = [*CONSTANTS, *sys.argv[1:]]  # of two values the later wins
    runpy.run_path(str(ROOT / "grpo_train.py"), run_name="__main__")
