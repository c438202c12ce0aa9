"""The reference server: holds the frozen reference model and returns its log-probs for sampled tokens over HTTP.

    python ref_server.py                                                    # the embedded model, http://127.0.0.1:59875
    CUDA_VISIBLE_DEVICES=1 python ref_server.py MODEL=Qwen/Qwen2.5-1.5B-Instruct
    REF_TOKEN=secret python ref_server.py HOST=0.0.0.0                      # for trainers on other machines

`POST /logps?temperature=1.0` takes and gives safetensors: `tokens` int32 [N] (every row's prompt then its completion,
rows one after the other, no padding), `prompt_lens` and `completion_lens` int32 [B] -> `logps` float32
[sum(completion_lens)], natural log. `GET /health` says what is served. The server keeps no state: kill it, restart it,
start several. It is not a text generator, and plain HTTP is not encrypted: use it inside a network that you trust.

`token_logps` below is the one place where log-probs are computed. The trainer imports it too, so the policy and the
reference agree to rounding until the first update. The client half of the wire format is at the end of the file.
"""
import hmac
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import bottle
import requests
import torch
import waitress
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.checkpoint import checkpoint

from sampler import load_model, override_constants

MODEL = "examples/arithmetic/model"  # local folder or hub name: the model that the policy starts from
HOST = "127.0.0.1"  # any other address needs REF_TOKEN in the environment, here and at the trainer
PORT = 59875
BATCH_TOKENS = 16384  # tokens of one forward pass, padding counted; halved by itself when the GPU is too small
MAX_BODY_MB = 64  # largest request; a larger one is refused before it is read
LOGITS_PER_TILE = 2**24  # logits that are alive at a time while log-probs are made: 64 MB in float32


# ------------------------------------------------------------------------------------------------- the model

def token_logps(model, tokens, prompt_lens, completion_lens, temperature=1.0):
    """Log-probs of the completion tokens under `model` at a temperature; packed rows in, packed log-probs out.

    tokens (N,) every row's prompt then its completion; prompt_lens, completion_lens (B,), all at least 1.
    Returns (sum(completion_lens),) float32, natural log, differentiable. No mask by token value anywhere, so EOS
    counts also where it doubles as padding. Rows are padded on the right, where a causal model never looks.
    """
    lens = prompt_lens + completion_lens
    position = torch.arange(int(lens.max()), device=tokens.device)
    is_token = position < lens[:, None]  # (B, L)
    is_completion = is_token & (position >= prompt_lens[:, None])
    rows = torch.zeros_like(is_token, dtype=torch.long).masked_scatter(is_token, tokens.long())
    hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state  # (B, L, H)
    hidden = hidden[:, :-1][is_completion[:, 1:]]  # (C, H): position t predicts token t + 1
    targets = rows[is_completion]  # (C,)

    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1) / temperature  # Cohere, Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def tile_logps(hidden, targets):
        logits = head(hidden).float()  # (tile, V)
        logits = scale * (cap * torch.tanh(logits / cap) if cap else logits)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    size = max(1, LOGITS_PER_TILE // config.vocab_size)
    # In the backward pass a tile's logits are made again, so that no two tiles' logits are ever alive together.
    recompute = torch.is_grad_enabled() and len(targets) > size
    return torch.cat([checkpoint(tile_logps, *tile, use_reentrant=False) if recompute else tile_logps(*tile)
                      for tile in zip(hidden.split(size), targets.split(size))])


def micro_batches(rows: list, budget: int) -> list[list]:
    """Rows, each a dict with its `length`, in batches of similar length, longest first.

    Rows x longest length is at most `budget`, but a longer row makes a batch by itself.
    """
    batches = []
    for row in sorted(rows, key=lambda row: -row["length"]):
        if not batches or batches[-1][0]["length"] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def batched_logps(model, tokens, prompt_lens, completion_lens, temperature, budget):
    """`token_logps` of any number of rows, `budget` tokens at a time, half of it when memory is short; on the CPU."""
    lens, logps = (prompt_lens + completion_lens).tolist(), [None] * len(prompt_lens)
    rows = [{"index": i, "length": len(row), "tokens": row} for i, row in enumerate(tokens.split(lens))]
    try:
        for batch in micro_batches(rows, budget):
            index = [row["index"] for row in batch]
            inputs = torch.cat([row["tokens"] for row in batch]), prompt_lens[index], completion_lens[index]
            answer = token_logps(model, *(tensor.to(model.device) for tensor in inputs), temperature).cpu()
            for i, row_logps in zip(index, answer.split(completion_lens[index].tolist())):
                logps[i] = row_logps
        return torch.cat(logps)
    except torch.OutOfMemoryError:
        if budget <= max(lens):
            raise
    return batched_logps(model, tokens, prompt_lens, completion_lens, temperature, min(budget, sum(lens)) // 2)


# ------------------------------------------------------------------------------------------------- the server

def expect(condition, sentence: str, status=400) -> None:
    if not condition:
        raise bottle.HTTPResponse(sentence + "\n", status, content_type="text/plain; charset=utf-8")


def read_rows(body: bytes, vocab_size: int, max_length: int) -> list[torch.Tensor]:
    """The checked tensors of a request's body: tokens, prompt_lens, completion_lens (int64, CPU)."""
    names = ["tokens", "prompt_lens", "completion_lens"]
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, ValueError) as error:
        expect(False, f"the body is not safetensors with {names}: {error}")
    expect(tensors.keys() == set(names), f"the body holds {sorted(tensors)}, expected {names}")
    for name, tensor in tensors.items():
        right = tensor.dtype == torch.int32 and tensor.dim() == 1 and len(tensor)
        expect(right, f"{name} is {tensor.dtype} {[*tensor.shape]}, expected int32 [n] with n > 0")
    tokens, prompt_lens, completion_lens = rows = [tensors[name].long() for name in names]
    expect(len(prompt_lens) == len(completion_lens), "there are not as many prompt_lens as completion_lens")
    expect(min(prompt_lens.min(), completion_lens.min()) > 0, "a prompt or a completion has no token")
    lens = prompt_lens + completion_lens
    expect(lens.max() <= max_length, f"a row has {lens.max()} tokens, the model takes at most {max_length}")
    expect(lens.sum() == len(tokens), f"the lengths add up to {lens.sum()}, but there are {len(tokens)} tokens")
    known = 0 <= tokens.min() and tokens.max() < vocab_size
    expect(known, f"token ids from {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1}")
    return rows


def make_app(model, name: str, token: str = "") -> bottle.Bottle:
    """The WSGI application that serves `model`, called `name`, to clients that know `token`."""
    app, worker, config = bottle.Bottle(), ThreadPoolExecutor(1), model.config.get_text_config()
    sizes = {"vocab_size": config.vocab_size, "max_length": getattr(config, "max_position_embeddings", sys.maxsize)}
    app.default_error_handler = lambda error: error.body

    @app.hook("before_request")
    def authenticate():
        given = bottle.request.get_header("Authorization", "")
        right = not token or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())
        expect(right, "wrong or missing bearer token: set REF_TOKEN to the server's", 401)

    @app.get("/health")
    def health():
        return {"status": "ok", "model": name, "dtype": str(model.dtype).removeprefix("torch.")} | sizes

    @app.post("/logps")
    def logps():
        given = bottle.request.query
        temperature = given.get("temperature", -1, type=float) if "temperature" in given else 1.0
        expect(0 < temperature < float("inf"), "temperature must be a positive number")
        rows = read_rows(bottle.request.body.read(), **sizes)
        try:
            answer = worker.submit(batched_logps, model, *rows, temperature, BATCH_TOKENS).result()
        except torch.OutOfMemoryError:
            expect(False, f"a row of {max(rows[1] + rows[2])} tokens does not fit in the server's memory", 413)
        bottle.response.content_type = "application/octet-stream"
        return save({"logps": answer})

    return app


def main():
    token = os.environ.get("REF_TOKEN", "")
    if HOST not in ("127.0.0.1", "localhost", "::1") and not token:
        raise SystemExit(f"HOST={HOST} can be reached from other machines: set REF_TOKEN in the environment first")
    try:
        listener = socket.create_server((HOST, PORT), backlog=1024)  # before the model is loaded, to fail at once
    except OSError as error:
        raise SystemExit(f"cannot listen on {HOST}:{PORT}: {error.strerror} (choose another with PORT=...)")
    model, _ = load_model(MODEL)
    server = waitress.create_server(
        make_app(model, MODEL, token), sockets=[listener], threads=32, connection_limit=900, asyncore_use_poll=True,
        channel_timeout=60, max_request_body_size=MAX_BODY_MB * 2**20 + 1)

    stop, runner = threading.Event(), threading.Thread(target=server.run, daemon=True)
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda *_: stop.set())
    runner.start()
    print("reference model %s at http://%s:%d" % (MODEL, *listener.getsockname()[:2]), flush=True)
    while runner.is_alive() and not stop.wait(1):
        pass
    server.accepting, deadline = False, time.monotonic() + 60
    while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len for channel in [*server.active_channels.values()]):
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------- the client

def ask(method: str, url: str, patience: float, **options) -> requests.Response:
    """One HTTP exchange, tried again for `patience` seconds while nobody answers; SystemExit says what went wrong."""
    headers = {"Authorization": f"Bearer {os.environ.get('REF_TOKEN', '')}"}
    deadline = time.monotonic() + patience
    while True:
        try:
            response = requests.request(
                method, url, headers=headers, timeout=(5, max(1, deadline - time.monotonic())), **options)
        except requests.RequestException as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"no answer from a reference server at {url} in {patience:.0f} s (start it: "
                                 f"python ref_server.py MODEL=...): {error}") from None
            time.sleep(0.5)
        else:
            if response.status_code != 200:
                raise SystemExit(f"{url} answered {response.status_code}: {response.text.strip()}")
            return response


def request_logps(url, tokens, prompt_lens, completion_lens, temperature, patience=300.0) -> tuple[torch.Tensor, ...]:
    """The reference log-probs of packed rows (see `token_logps`) from the server at `url`, one float32 tensor a row."""
    rows = {"tokens": tokens, "prompt_lens": prompt_lens, "completion_lens": completion_lens}
    body = save({name: tensor.to("cpu", torch.int32) for name, tensor in rows.items()})
    answer = ask("POST", f"{url}/logps", patience, params={"temperature": temperature}, data=body)
    return load(answer.content)["logps"].split(completion_lens.tolist())


@torch.no_grad()
def check_server(url: str, model, name: str, ids: list[int]) -> None:
    """SystemExit if no server is at `url`, or if its log-probs of `ids` are not those of `model`, known as `name`."""
    health = ask("GET", f"{url}/health", patience=25).json()
    tokens, difference = torch.tensor(ids, device=model.device), float("inf")
    if health["vocab_size"] == model.config.get_text_config().vocab_size:
        theirs = request_logps(url, tokens, torch.tensor([1]), torch.tensor([len(ids) - 1]), 1.0)[0]
        ours = model(tokens[None]).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[1:, None])[:, 0].cpu()
        difference = (ours - theirs).abs().mean()
    if not difference < 0.1:  # bfloat16 rounds by less, another model differs by more
        raise SystemExit(f"the reference server at {url} holds {health['model']}, which is not the policy's model: "
                         f"start it with python ref_server.py MODEL={name}")


if __name__ == "__main__":
    override_constants(globals(), sys.argv[1:])
    main()
