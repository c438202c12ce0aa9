"""Process supervision on the embedded task: a reward for each written step.

    python ref_server.py
    deepspeed grpo_train.py REWARDS=0*reward_correct,examples.steps:reward_steps OUTPUT_DIR=runs/steps

`reward_correct` has no weight: it is only logged, and the policy learns from the steps alone.
"""
import re


def reward_steps(completions, prompts, **columns) -> list[list[tuple[int, float]]]:
    """+1 for a line that carries out the question's next operation rightly and for the end after the last; else -1."""
    values = []
    for completion, prompt in zip(completions, prompts):
        first, *operations = re.search(r"What is (.*)\?", prompt)[1].replace("+ ", "+").replace("- ", "-").split()
        total, steps = int(first), []
        for line in re.finditer(r"<think>\n|(.+)\n", completion):
            if line[1] is None:
                continue
            expected = "</think>"
            if operations:
                operation = operations.pop(0)
                expected = f"{total} {operation[0]} {operation[1:]} = {total + int(operation)}"
                total += int(operation)
            steps.append((line.end(), 1.0 if line[1] == expected else -1.0))
            if steps[-1][1] < 0 or expected == "</think>":
                break
        values.append(steps)
    return values
