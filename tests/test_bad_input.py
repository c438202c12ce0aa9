"""Whatever a user writes ends in a right result or in one sentence: the input, and what the sentence says."""
import copy
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, rows
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from grpo.data import load_prompts
from grpo.policy import Policy, load_model, stop_ids
from grpo.sampling import sample
from grpo.scoring import check_rewards, load_rewards
from grpo.types import Prompt

MINE = '''
import asyncio, functools

def half(completions, **columns):
    return [0.5] * len(completions)

def plain(completions, question):
    return [float(len(text)) for text in question]

async def slow(completions, **columns):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)

class Callable:
    def __call__(self, completions, **columns):
        return [2.0] * len(completions)

of_trl = lambda completions, trainer_state, log_metric, log_extra, **columns: (
    log_metric("updates", trainer_state.global_step) or log_extra("letters", list(map(len, completions)))
    or log_extra("step", ["x"] * len(completions))
    or [float(trainer_state.max_steps)] * len(completions))

class Options:
    def __init__(self, **options):
        pass

def needs(completions, **columns):
    return [float(text == right) for text, right in zip(completions, columns["solution"])]

def infinite(completions, **columns):
    return [float("inf") for _ in completions]

part, thing = functools.partial(half), Callable()
none = lambda completions, **columns: None
short = lambda completions, **columns: [1.0]
words = lambda completions, **columns: ["good"] * len(completions)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    path = tmp_path_factory.mktemp("bad input")  # with a blank
    (path / "mine.py").write_text(MINE)
    (path / "judge.py").write_text("from rewards import reward_model\nf = reward_model('model')")  # no classifier
    (path / "wrong.py").write_text("def f(:")
    (path / "model").symlink_to(tiny_folder)
    (path / "ok.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n\n{"question": "2 + 1", "answer": 3}\n')
    (path / "two.jsonl").write_text('{"question": "1 + 1"}\n{"question": "2 + 1"}\n')
    (path / "ok.csv").write_text("question,answer\n1 + 1,2\n")
    (path / "ok.json").write_text('[{"question": "1 + 1"}]')
    (path / "ok.jsonl.gz").write_bytes(gzip.compress((path / "two.jsonl").read_bytes()))
    (path / "broken.csv").write_text('"')
    (path / "broken.parquet").write_text("nothing")
    (path / "broken.jsonl.gz").write_text("nothing")
    (path / "text.txt").write_text("1 + 1\n")
    return path


@pytest.fixture(scope="module")
def run(folder):
    """run(program, *arguments) -> (exit status, output), in a fork of a process that has imported everything."""
    process = subprocess.Popen([sys.executable, ROOT / "tests/forked.py"], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

    def ask(*program, **environment):
        process.stdin.write(json.dumps([str(folder), environment, program]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(60)


def train(run, tmp_path, *arguments, **environment):
    return run(str(ROOT / "grpo_train.py"), "MODEL=model", "DATASET=ok.jsonl", "EVAL_DATASET=ok.jsonl", "BETA=0",
               "STEPS=1", "EVAL_EVERY=0", "SAVE_EVERY=0", "PROMPTS_PER_STEP=2", "GROUP_SIZE=2", "REWARDS=mine:half",
               "MAX_COMPLETION_TOKENS=4", f"OUTPUT_DIR={tmp_path}/run", *arguments, **environment)


REFUSED = {
    "MODEL=": "MODEL is empty",
    "MODEL=nowhere/at/all": "cannot load MODEL=nowhere/at/all",
    "DTYPE=float16": "expected one of auto, float32, bfloat16",
    "DATASET=": "DATASET is empty",
    "DATASET=nowhere.jsonl": "cannot read the data set nowhere.jsonl: .*No such file",
    "DATASET=broken.csv": "cannot read the data set broken.csv",
    "DATASET=broken.parquet": "cannot read the data set broken.parquet",
    "DATASET=broken.jsonl.gz": "cannot read the data set broken.jsonl.gz",
    "DATASET=text.txt": "expected a .jsonl, .json, .csv, .parquet or .arrow file",
    "DATASET=two.jsonl::test": "Unknown split",
    "DATASET=two.jsonl::tr[": "Unrecognized instruction",
    "QUESTION_COLUMN=problem": "needs a column problem",
    "OUTPUT_DIR=": "OUTPUT_DIR is empty",
    "OUTPUT_DIR=/dev/null": "cannot be written",
    "REWARDS=": "no reward function",
    "REWARDS=mine:nothing": "module 'mine' has no attribute 'nothing'",
    "REWARDS=nowhere:f": "No module named 'nowhere'",
    "REWARDS=wrong:f": "SyntaxError",
    "REWARDS=math:pi": "is not a function",
    "REWARDS=nan*mine:half": "the weight of half is nan",
    "REWARDS=mine:half,mine:half": "REWARDS holds half twice",
    "REWARDS=mine:none": "reward lambda returned None, expected a list",
    "REWARDS=mine:short": "returned 1 values for 2 completions",
    "REWARDS=mine:words": "returned .*good.*, expected a list of numbers",
    "REWARDS=get_cosine_scaled_reward": "Does it make a reward function?",
    "REWARDS=accuracy_reward": "missing a required argument: 'solution'",
    "REWARDS=rewad_format": "no reward function rewad_format",
    "REWARDS=texts": "reward texts returned .*, expected a list of numbers and None",
    "REWARDS=check_answers": "reward check_answers returned None",
    "REWARDS=mine:Callable": "Does it make a reward function?",
    "REWARDS=mine:Options": "reward Options returned .*, expected a list of numbers",
    "REWARDS=mine:needs": r"raised KeyError\('solution'\) at the completion .*; columns: \['question', 'answer'\]",
    "REWARDS=mine:infinite": "reward infinite returned inf",
    "REWARDS=judge:f": "its files lack these weights.*: score.weight",
    "SEED=-1": "SEED=-1",
    "SEED=99999999999": "SEED=99999999999: expected",
    "STEPS=-1": "STEPS=-1: expected a number, 0 or above",
    "STEPS=1.5": "STEPS=1.5: expected int",
    "PROMPTS_PER_STEP=0": "expected a number over 0",
    "GROUP_SIZE=1": "expected a number over 1",
    "GROUP_SIZE=10000000000000": "expected a number over 1, up to 65536",
    "MAX_PROMPT_TOKENS=1": "more than MAX_PROMPT_TOKENS=1 tokens",
    "MAX_COMPLETION_TOKENS=100000": "is over the .* tokens of MODEL",
    "MIN_COMPLETION_TOKENS=9": "MIN_COMPLETION_TOKENS=9 is over the limit",
    "TEMPERATURE=0": "expected a number over 1e-06",
    "TEMPERATURE=1e-300": "expected a number over 1e-06",
    "SAMPLER=other": "expected one of auto, transformers, graph, vllm",
    "SAMPLER=vllm": "requirements-vllm.txt",
    "IS_CAP=0": "expected a number over 0",
    "LOSS_TYPE=gpro": "expected one of grpo, dr_grpo",
    "BETA=nan": "BETA=nan: expected a finite number",
    "REF_SYNC_EVERY=5": "with BETA=0 there is no reference",
    "UPDATES_PER_BATCH=0": "expected a number over 0",
    "REF_MIXUP_ALPHA=2": "expected a number over 0, up to 1",
    "LR=nan": "LR=nan: expected a finite number",
    "LR=inf": "LR=inf: expected a finite number",
    "LR=-inf": "LR=-inf: expected a finite number",
    "TEMPERATURE=inf": "TEMPERATURE=inf: expected a finite number",
    "TEMPERATURE=nan": "TEMPERATURE=nan: expected a finite number",
    "IS_CAP=inf": "IS_CAP=inf: expected a finite number",
    "CLIP_HIGH=1e300": "expected a finite number, at most 1e30",
    "CLIP_LOW=nan": "CLIP_LOW=nan: expected a finite number",
    "MAX_GRAD_NORM=inf": "MAX_GRAD_NORM=inf: expected a finite number",
    "LR=fast": "LR=fast: expected float",
    "MAX_SKIPPED_STEPS=0": "expected a number over 0",
    "ZERO_STAGE=4": "expected one of 0, 1, 2, 3",
    "LORA_RANK=5000": "is over the 128 numbers of a hidden state",
    "KEEP_CHECKPOINTS=-1": "expected a number, 0 or above",
    "TRACKERS=mlflow": "expected csv, tensorboard, wandb",
    "TRACKERS=wandb": "DeepSpeed cannot start with DS_CONFIG: UsageError",
    "RESUME=yes": "expected bool",
    "lr=1": "unknown constant 'lr=1'",
    "--lr": "unknown constant '--lr'",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_a_wrong_value_is_one_sentence(run, tmp_path, argument):
    code, text = train(run, tmp_path, argument)
    assert code == 1 and "Traceback" not in text, text
    assert re.search(REFUSED[argument], text), text


@pytest.mark.parametrize("package, argument", {
    "wandb": "TRACKERS=wandb", "tensorboard": "TRACKERS=tensorboard", "peft": "LORA_RANK=4",
    "datasets": "DATASET=ok.csv"}.items())
def test_a_missing_package_is_one_sentence_with_the_way_out(run, tmp_path, package, argument):
    code, text = train(run, tmp_path, argument, WITHOUT=package)
    assert code == 1 and "Traceback" not in text, text
    assert text.rstrip().endswith(f"(pip install {package})"), text


def test_a_package_that_is_not_asked_for_may_be_missing(run, tmp_path):
    code, text = train(run, tmp_path, "DATASET=two.jsonl", WITHOUT="wandb,tensorboard,peft,datasets,math_verify,vllm")
    assert code == 0 and "Traceback" not in text, text


@pytest.mark.parametrize("argument, sentence", [
    ("EVAL_SAMPLES=0", "EVAL_SAMPLES=0: expected a number over 0"),
    ("TEMPERATURE=0", "TEMPERATURE=0.0: expected a number over 1e-06"),
    ("TEMPERATURE=inf", "TEMPERATURE=inf: expected a finite number"),
    ("MODEL=model,model,model", "expected one model or two"),
    ("EVAL_DATASET=", "EVAL_DATASET=: nothing to evaluate on"),
    ("EVAL_DATASET=nowhere.csv", "cannot read the data set nowhere.csv"),
    ("REWARDS=mine:nothing", "no reward function mine:nothing")])
def test_a_wrong_value_of_evaluate_is_one_sentence(run, tmp_path, argument, sentence):
    code, text = run("-m", "grpo.evaluate", "MODEL=model", "EVAL_DATASET=ok.jsonl", f"OUTPUT_DIR={tmp_path}", argument)
    assert code == 1 and "Traceback" not in text and sentence in text, text


@pytest.mark.parametrize("argument, sentence", [
    ("PORT=-1", "PORT=-1: expected"), ("PORT=99999", "PORT=99999: expected a number over -1, up to 65535"),
    ("HOST=0.0.0.0", "set REF_TOKEN"), ("HOST=nowhere.invalid", "set REF_TOKEN"),
    ("MODEL=nowhere/at/all", "cannot load MODEL"),
    ("DTYPE=int8", "expected one of auto")])
def test_a_wrong_value_of_the_server_is_one_sentence(run, argument, sentence):
    code, text = run(str(ROOT / "ref_server.py"), "MODEL=model", "PORT=0", argument, REF_TOKEN="")
    assert code == 1 and "Traceback" not in text and sentence in text, text


def config(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(change):
    def changed(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    return changed


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UP = "model.layers.1.mlp.up_proj.weight"
TOO_LARGE = ("the tokenizer has 327 ids, the embedding only 300: save the model after "
             r"model.resize_token_embeddings\(len\(tokenizer\)\)")
BROKEN = {  # what is wrong in a model folder: file, how it is changed, sentence
    "half a config": ("config.json", half, "config.json' is not a valid JSON file"),
    "an empty config": ("config.json", lambda path: path.write_text(""), "config.json' is not a valid JSON file"),
    "a config that is null": ("config.json", lambda path: path.write_text("null"), "cannot load MODEL=.*TypeError"),
    "no config": ("config.json", os.remove, "model_type"),
    "a LoRA adapter": ("config.json", lambda path: path.rename(path.parent / "adapter_config.json"),
                       "is a LoRA adapter"),
    "an unknown type": ("config.json", config(model_type="qwen99"), "model type `qwen99`"),
    "another type": ("config.json", config(model_type="gpt2"), "its files lack these weights.* transformer.h.0"),
    "no language model": ("config.json", config(model_type="vit"), "this kind of AutoModel: AutoModelForCausalLM"),
    "a word for a number": ("config.json", config(hidden_size="big"), "Field 'hidden_size' expected int, got str"),
    "more layers": ("config.json", config(num_hidden_layers=4, layer_types=["full_attention"] * 4),
                    "its files lack these weights.* model.layers.3"),
    "wider layers": ("config.json", config(intermediate_size=400), f"its files lack these weights.* {UP}"),
    "an unknown activation": ("config.json", config(hidden_act="foo"), "cannot load MODEL=.*KeyError: 'foo'"),
    "half the weights": ("model.safetensors", half, "cannot load MODEL=.*SafetensorError"),
    "a pointer of Git LFS": ("model.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/"),
                             "cannot load MODEL=.*SafetensorError"),
    "no weights": ("model.safetensors", os.remove, "no file named model.safetensors"),
    "a missing tensor": ("model.safetensors", weights(lambda tensors: tensors.pop(UP)),
                         f"its files lack these weights.*: {UP} "),
    "a tensor of NaN": ("model.safetensors", weights(lambda tensors: tensors[UP].fill_(float("nan"))),
                        f"its files lack these weights.*: {UP} "),
    "a small embedding": ("model.safetensors", weights(lambda tensors: tensors.update(
        {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:300].clone()})), TOO_LARGE),
    "half a tokenizer": ("tokenizer.json", half, "cannot load MODEL=.*JSONDecodeError"),
    "an empty tokenizer": ("tokenizer.json", lambda path: path.write_text("{}"), "cannot load MODEL=.*'added_tokens'"),
    "no tokenizer": ("tokenizer.json", os.remove, "knows neither letters nor digits: is tokenizer.json missing"),
    "a list of options": ("tokenizer_config.json", lambda path: path.write_text("[]"), "cannot load MODEL=.*'list'"),
    "half a generation config": ("generation_config.json", half, "generation_config.json' is not a valid JSON file"),
    "a list as generation config": ("generation_config.json", lambda path: path.write_text("[]"),
                                    "cannot load MODEL=.*TypeError: 'list'"),
    "a word as EOS": ("generation_config.json", config(eos_token_id="</s>"), "eos_token_id is '</s>'"),
    "half a template": ("chat_template.jinja", half, "MODEL's chat template says: unexpected"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder_is_one_sentence(run, tmp_path, tiny_folder, name):
    file, change, sentence = BROKEN[name]
    shutil.copytree(tiny_folder, tmp_path / "model")
    if sentence == TOO_LARGE:  # the configuration agrees with the weights
        config(vocab_size=300, pad_token_id=None, eos_token_id=None)(tmp_path / "model/config.json")
    change(tmp_path / "model" / file)
    model = f"MODEL={tmp_path}/model"
    answers = {"trainer": train(run, tmp_path, model)}
    answers["evaluate"] = run("-m", "grpo.evaluate", model, "EVAL_DATASET=ok.jsonl", f"OUTPUT_DIR={tmp_path}/run")
    if name not in ("a word as EOS", "half a template"):  # a server needs neither
        answers["server"] = run(str(ROOT / "ref_server.py"), model, "PORT=0")
    for code, text in answers.values():
        assert code == 1 and "Traceback" not in text and re.search(sentence, text), text


ACCEPTED = {
    "DATASET=ok.csv": {}, "DATASET=ok.json": {}, "DATASET=ok.jsonl.gz": {}, "DATASET=two.jsonl::train[:1]": {},
    "EVAL_DATASET=": {}, "SYSTEM_PROMPT=": {}, "TEMPERATURE=1e30": {}, "TRACKERS=csv": {},
    "OUTPUT_DIR=here/with blank/\u00f6": None,
    "REWARDS=0.5 * mine:half , mine:thing": {"reward": 2.25, "reward/half": 0.5, "reward/Callable": 2.0},
    "REWARDS=mine:slow": {"reward/slow": 1.0}, "REWARDS=mine:part": {"reward/half": 0.5},
    "REWARDS=mine:plain": {"reward/plain": 5.0}, "REWARDS=mine:of_trl": {"reward/lambda": 1.0, "updates": 0.0},
}


@pytest.mark.parametrize("argument", ACCEPTED)
def test_an_odd_value_is_right(run, tmp_path, argument):
    code, text = train(run, tmp_path, argument)
    assert code == 0 and "Traceback" not in text, text
    if ACCEPTED[argument] is not None:
        last = rows(tmp_path / "run/metrics.jsonl")[-1]
        assert ACCEPTED[argument].items() <= last.items()
        steps = {row["step"] for row in rows(tmp_path / "run/completions.jsonl")}
        assert steps == set(range(1, last["step"] + 1))  # whatever a reward function calls its own


def test_too_high_a_learning_rate_ends_the_run_with_that_cause(run, tmp_path):
    code, text = train(run, tmp_path, "LR=1e9", "WARMUP_STEPS=0", "STEPS=9", "GROUP_SIZE=4", "REWARDS=reward_len")
    assert code == 1 and "Traceback" not in text, text
    assert "not finite, 5 times in a row. Likely: LR=1000000000.0 is too high" in text, text


NO_SERVER = "choose another PORT and REF_SERVER"
SERVERS = {  # what answers at REF_SERVER: status and body of /health, sentence
    "another site": (404, "nothing here", f"/health answered 404: nothing here .*{NO_SERVER}"),
    "a page for any address": (200, "<html>hello</html>", f"is no reference server: {NO_SERVER}"),
    "a list": (200, "[1]", f"is no reference server: {NO_SERVER}"),
    "another health": (200, '{"status": "ok", "dtype": "float32"}', f"is no reference server: {NO_SERVER}"),
    "a redirection": (302, "", f"/health answered 302: .*{NO_SERVER}"),
    "an error page": (500, "<p>\n" * 2000, rf"/health answered 500: (<p> ){{90,100}}.*{NO_SERVER}"),
    "a wrong token": (401, "set REF_TOKEN", "answered 401: set REF_TOKEN$"),
    "an older server": (200, '{"model": "M", "dtype": "float32", "vocab_size": 9}', "is no reference server"),
    "the same everywhere": (200, '{"model": "M", "dtype": "float32", "reference": "a"}', "does not answer as ref_server"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_something_else_at_the_server_s_address_is_one_sentence(run, tmp_path, name):
    status, body, sentence = SERVERS[name]

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        code, text = train(run, tmp_path, "BETA=0.1", f"REF_SERVER=http://127.0.0.1:{service.server_port}/")
        service.shutdown()
    assert code == 1 and "Traceback" not in text and re.search(sentence, text.strip()), text


@pytest.mark.parametrize("address", ["localhost", "localhost:1", "", "ftp://a", "http://", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_named(run, tmp_path, address):
    code, text = train(run, tmp_path, "BETA=0.1", f"REF_SERVER={address}")
    assert code == 1 and "Traceback" not in text, text
    assert f"REF_SERVER={address} is no address like http://127.0.0.1:59875" in text, text


HOMEMADE = '''
from transformers import Qwen2Config, Qwen2ForCausalLM

class HomemadeConfig(Qwen2Config):
    model_type = "homemade"

class HomemadeForCausalLM(Qwen2ForCausalLM):
    config_class = HomemadeConfig
'''


def test_a_model_with_code_of_its_own_is_run_on_request_and_saved_with_it(run, launch, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model/modeling_homemade.py").write_text(HOMEMADE)
    names = {"AutoConfig": "HomemadeConfig", "AutoModelForCausalLM": "HomemadeForCausalLM"}
    config(model_type="homemade", auto_map={name: f"modeling_homemade.{value}" for name, value in names.items()},
           architectures=["HomemadeForCausalLM"])(tmp_path / "model/config.json")
    model, trust = f"MODEL={tmp_path}/model", "TRUST_REMOTE_CODE=True"
    score = "-m", "grpo.evaluate", "EVAL_DATASET=ok.jsonl", f"OUTPUT_DIR={tmp_path}/evaluation"
    for code, text in (train(run, tmp_path, model), run(*score, model),
                       run(str(ROOT / "ref_server.py"), model, "PORT=0")):
        assert code == 1 and "Traceback" not in text and "TRUST_REMOTE_CODE=True runs a model's own code" in text, text

    process = launch("ref_server.py", model, trust, "PORT=0")
    words = model, trust, f"REF_SERVER={process.wait_for('http://127.0.0.1:[0-9]+')[0]}", "BETA=0.1", "SAVE_EVERY=1"
    code, text = train(run, tmp_path, *words, "REF_SYNC_EVERY=1", "REWARDS=reward_len", "LR=0.01", "WARMUP_STEPS=0")
    assert code == 0, text
    assert rows(tmp_path / "run/metrics.jsonl")[-1]["grad_norm"] > 0
    saved = tmp_path / "run/step_1"
    assert (saved / "modeling_homemade.py").read_text() == HOMEMADE
    before, after = (load_file(folder / "model.safetensors")[UP] for folder in (tmp_path / "model", saved))
    assert before.shape == after.shape and not before.equal(after)
    code, text = run(*score, f"MODEL={saved}", trust)
    assert code == 0, text

    # the server has the renewed reference now, which a run that does not renew cannot start from
    code, text = train(run, tmp_path, *words, f"OUTPUT_DIR={tmp_path}/plain")
    assert code == 1 and "Traceback" not in text, text
    assert re.search("with weights .*-1, not .*: restart it with the trainer's MODEL, unless another run uses it", text), text


def test_all_processes_end_with_the_sentence(launch, few, tmp_path):
    program = "deepspeed", "--num_accelerators", "2", "--master_port=29640", "grpo_train.py"
    code, text = launch(*program, *few, "REF_SERVER=localhost", f"OUTPUT_DIR={tmp_path}/run").wait(90)
    said = [line for line in text.splitlines() if "[launch.py" not in line and line.strip()]
    assert code == 1 and "REF_SERVER=localhost is no address like http://127.0.0.1:59875" in said[-1], text
    assert "Traceback" not in text and "frame #" not in text, text


ROWS = {  # a row of a data set: what is wrong with it
    '{}': "needs a column question",
    '{"conversations": [{"from": "human", "value": "a"}]}': "conversations are ShareGPT's",
    '{"question": null}': "row 2 .* found {'question': None}",
    '{"question": ""}': "row 2 .* found {'question': ''}",
    '{"question": "  "}': "row 2 .*expected a text",
    '{"question": 5}': "row 2 .*expected a text",
    '{"prompt": null}': "row 2 .* found {'prompt': None}",
    '{"prompt": ""}': "row 2 .* found {'prompt': ''}",
    '{"prompt": []}': r"row 2 .* found {'prompt': \[\]}",
    '{"prompt": 5}': "row 2 .*prompt is 5, expected a text or a list of chat messages",
    '{"prompt": {"role": "user", "content": "a"}}': "row 2 .*expected a text or a list",
    '{"prompt": ["a"]}': "row 2 .*prompt holds 'a', expected a message with role and content",
    '{"prompt": [{"role": "user"}]}': "row 2 .*expected a message with role and content",
    '{"prompt": [{"content": "a"}]}': "row 2 .*expected a message with role and content",
    '{"prompt": [{"role": "user", "content": null}]}': "row 2 .*expected a message with role and content",
    '{"prompt": [{"from": "human", "value": "a"}]}': "row 2 .*the messages are ShareGPT's: rename from to role",
    '{"question": "half of \\ud83d"}': "row 2 .*surrogates not allowed",
    '{"question": "a", "more": 1}': "row 2 .*the columns are",
    '{"question": "a"': "line 3 is not a JSON object",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_row_is_named(tiny, tmp_path, row):
    name = "prompt" if "prompt" in row else "question"
    first = row if "needs" in ROWS[row] or "ShareGPT's" in ROWS[row][:30] else json.dumps({name: "1 + 1"})
    path = tmp_path / "data.jsonl"
    path.write_text(f"{first}\n\n{row}\n")
    with pytest.raises(SystemExit, match=ROWS[row]):
        load_prompts(str(path), tiny[1], "Think.", 99)


def test_a_prompt_with_a_token_that_the_embedding_lacks_is_named(tiny, tiny_folder, tmp_path):
    tiny[0].save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(tiny[1])
    rows = tiny[0].get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<{n}>" for n in range(rows + 1 - len(tokenizer))], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    policy = Policy(str(tmp_path / "model"), 50)  # as Gemma 3's tokenizer, which has a token for images
    assert len(policy.tokenizer) == policy.vocab_size + 1
    last = policy.tokenizer.decode(rows)
    (tmp_path / "data.jsonl").write_text(f'{{"question": "1"}}\n{{"question": "1 {last}"}}\n')
    with pytest.raises(SystemExit, match=f"row 2 .* the prompt has '{last}', which the embedding has no row for"):
        load_prompts(f"{tmp_path}/data.jsonl", policy.tokenizer, "", 99, vocab_size=policy.vocab_size)


@pytest.mark.parametrize("answer", [
    "null", "NaN", '"N/A"', '"nan"', "[1]", '{"a": 1}', '""', "true", "Infinity", '"#"'])
def test_an_answer_that_is_none_is_refused_with_its_row(tiny, tmp_path, answer):
    path = tmp_path / "data.jsonl"
    long = json.dumps({"question": "1 + 1 " * 99, "answer": "1"})  # left out, but counted
    path.write_text(f'{long}\n{{"question": "a", "answer": "1"}}\n{{"question": "b", "answer": {answer}}}\n')
    prompts = load_prompts(str(path), tiny[1], "", 99)
    with pytest.raises(SystemExit, match="reward_correct cannot judge the data set: row 3: the answer"):
        check_rewards(load_rewards(["reward_correct"]), tiny[1], prompts)


def test_a_data_column_may_have_any_name(tiny, tmp_path):
    path = tmp_path / "data.jsonl"
    names = "functions prompts prompt_texts completions completion_ids rows given trainer_state log_metric".split()
    path.write_text(json.dumps({"question": "a", "answer": "1"} | dict.fromkeys(names, "data")) + "\n")
    prompts = load_prompts(str(path), tiny[1], "", 99)
    check_rewards(load_rewards(["reward_format", "reward_correct"]), tiny[1], prompts)


def with_template(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def prompts_of(row: dict, tokenizer, folder, system="") -> list[Prompt]:
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    return load_prompts(f"{folder}/data.jsonl", tokenizer, system, 99)


def test_a_text_begins_with_bos_where_the_tokenizer_says_so(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, plain = tokenizer.bos_token_id, tokenizer("1 + 1", add_special_tokens=False).input_ids
    assert prompts_of({"prompt": "1 + 1"}, tokenizer, tmp_path)[0].ids == plain
    tokenizer._tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    for text in "1 + 1", "<bos>1 + 1":
        assert prompts_of({"prompt": text}, tokenizer, tmp_path)[0].ids == [bos, *plain]


def test_a_template_that_leaves_a_message_out_is_named_and_one_that_wants_parts_gets_them(tiny, tmp_path):
    of_parts = "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}|" \
               "{% endif %}{% endfor %}{% endfor %}"
    (prompt,) = prompts_of({"question": "What is 1 + 1?"}, with_template(tiny[1], of_parts), tmp_path, "Be short.")
    assert prompt.text == "Be short.|What is 1 + 1?|"
    no_system = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(SystemExit, match="row 1 .* MODEL's chat template leaves out 'Be short.' .SYSTEM_PROMPT="):
        prompts_of({"question": "1 + 1"}, with_template(tiny[1], no_system), tmp_path, "Be short.")
    dated = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompts_of({"question": "1"}, with_template(tiny[1], dated), tmp_path)[0].text == "01 Jan 2026 1"
    tools = "{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}" \
            "{% endfor %}"
    row = {"prompt": [{"role": "user", "content": "1", "tool_calls": None}]}  # as Parquet gives messages all keys
    assert prompts_of(row, with_template(tiny[1], tools), tmp_path)[0].text == "1"


def test_a_stop_that_is_no_token_ends_nothing(tiny_folder, tmp_path):
    model, tokenizer = load_model(tiny_folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 5000, -1]
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    samples = sample(model, [[5, 6]], 2, max_tokens=3, stop=[], temperature=0)  # and without any it is the limit
    assert [len(one.tokens) for one in samples] == [3, 3]
