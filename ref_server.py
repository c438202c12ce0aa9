"""The reference server: holds the frozen reference model and returns its log-probs for sampled tokens over HTTP.

    python ref_server.py                                                    # the embedded model, http://127.0.0.1:59875
    CUDA_VISIBLE_DEVICES=1 python ref_server.py MODEL=Qwen/Qwen2.5-1.5B-Instruct
    REF_TOKEN=secret python ref_server.py HOST=0.0.0.0                      # for trainers on other machines

`POST /logps?temperature=1.0` takes and gives safetensors: `tokens` int32 [N] (every row's prompt then its completion,
rows one after the other, no padding), `prompt_lens` and `completion_lens` int32 [B] -> `logps` float32
[sum(completion_lens)], natural log. `GET /health` says what is served. The server saves nothing: kill it, restart it,
start several. It is not a text generator, and plain HTTP is not encrypted: use it inside a network that you trust.

`PUT /weights/NAME?start=0&size=...` brings other weights, a safetensors file piece by piece, its bytes from `start` on.
After the last piece the server switches to the new weights, between two answers; until then it keeps the old ones.
After a restart it holds MODEL's again, whose name is their `fingerprint`. A request for log-probs with `reference=NAME`
is answered 409 unless the server has these weights; without it any weights will do.

The log-probs are computed by `grpo.policy.token_logps`, as the trainer's. The trainer's side of the exchange is
`grpo/reference.py`.
"""
import hmac
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import bottle
import torch
import waitress
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from grpo.constants import Over, explained, override_constants
from grpo.policy import batched_logps, fingerprint, load_model, max_tokens_of

MODEL = "examples/arithmetic/model"  # local folder or hub name: the model that the policy starts from
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator; or either of them by name, as the trainer's
TRUST_REMOTE_CODE = False  # True runs the Python files of MODEL, if it has any
HOST = "127.0.0.1"  # any other address needs REF_TOKEN in the environment, here and at the trainer
PORT: Over(-1, 65535) = 59875
BATCH_TOKENS = 16384  # tokens of one forward pass, with padding and what rows share; halved when the GPU is too small
MAX_BODY_MB = 64  # largest request; a larger one is refused before it is read
PLACES = 24  # requests in work or waiting, of the server's 32 threads; one more is told to come again
unreadable = (SafetensorError, KeyError, ValueError, TypeError, RuntimeError)  # what loading broken safetensors raises


# ------------------------------------------------------------------------------------------------- the server

def expect(condition, sentence: str, status=400) -> None:
    if not condition:
        sentence = " ".join(sentence.split())[:400]  # it may repeat what the client sent
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        headers |= {"Retry-After": "1"} if status == 503 else {}
        raise bottle.HTTPResponse(sentence + "\n", status, headers)


def read_rows(body: bytes, vocab_size: int, max_length: int) -> list[torch.Tensor]:
    """The checked tensors of a request's body: tokens, prompt_lens, completion_lens (int64, CPU)."""
    names = ["tokens", "prompt_lens", "completion_lens"]
    header = int.from_bytes(body[:8], "little")  # one of a million tensors takes seconds and a gigabyte to read
    expect(header <= 4096, f"the body is not safetensors with {names}: {header} bytes of header, expected some 250")
    try:
        tensors = load(body)
    except unreadable as error:
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
    sizes = {"vocab_size": config.vocab_size, "max_length": max_tokens_of(model)}
    places, served = threading.BoundedSemaphore(PLACES), {"reference": fingerprint(model)}
    app.default_error_handler = lambda error: error.body

    @app.install
    def guarded(route):
        def answer(**arguments):
            try:
                given = bottle.request.environ.get("HTTP_AUTHORIZATION", "").encode("latin-1")
                right = not token or hmac.compare_digest(given, f"Bearer {token}".encode())
                expect(right, "wrong or missing bearer token: set REF_TOKEN to the server's", 401)
                return route(**arguments)
            except bottle.HTTPResponse as refusal:
                return refusal.with_traceback(None)  # with it the body would stay in memory for long
        return answer

    @app.get("/health")
    def health():
        return {"status": "ok", "model": name, "dtype": str(model.dtype).removeprefix("torch.")} | sizes | served

    @app.post("/logps")
    def logps():
        given = bottle.request.query
        temperature = given.get("temperature", -1, type=float) if "temperature" in given else 1.0
        expect(0 < temperature < float("inf"), "temperature must be a positive number")
        expect(places.acquire(blocking=False), f"{PLACES} requests are waiting already", 503)
        try:
            body = bottle.request.environ["wsgi.input"]
            answer = worker.submit(answer_rows, body, temperature, given.get("reference")).result()
        finally:
            places.release()
        bottle.response.content_type = "application/octet-stream"
        return save({"logps": answer})

    def answer_rows(body, temperature, reference):  # in one thread, which reads a body when its turn has come
        here, rows = served["reference"], read_rows(body.read(), **sizes)
        other = (f"MODEL={name} with weights {here}, not {reference}: restart it with the trainer's MODEL, "
                 "unless another run uses it")
        expect(reference in (None, here), other, 409)
        try:
            return batched_logps(model, *rows, temperature, BATCH_TOKENS)
        except torch.OutOfMemoryError:
            expect(False, f"a row of {max(rows[1] + rows[2])} tokens does not fit in the server's memory", 413)

    accept_weights(app, model, name, worker, served)
    return app


def accept_weights(app, model, name: str, worker, served: dict) -> None:
    """Other weights for `model`, called `name`: a route of `app`.

    `worker` computes the answers, one after the other; `served["reference"]` says whose they are.
    """
    largest, arriving = 4 * model.num_parameters() + 2**20, {}

    @app.put("/weights/<reference>")
    def weights(reference):
        start, size = (bottle.request.query.get(key, -1, type=int) for key in ("start", "size"))
        body = bottle.request.environ["wsgi.input"].read()
        expect(0 < size <= largest, f"size={size}: expected 1 to {largest} bytes")
        expect(0 <= start < start + len(body) <= size, f"start={start}: not the place of {len(body)} in {size} bytes")
        try:
            if start == 0 and reference not in arriving:
                arriving.clear()
                arriving[reference] = tempfile.NamedTemporaryFile()
            file = arriving.get(reference)
            there = os.fstat(file.fileno()).st_size if file else 0
            expect(start <= there, f"start={start}: only {there} bytes of {reference} are here, start again", 409)
            os.pwrite(file.fileno(), body, start)
        except OSError as error:
            expect(False, f"no room for {size} bytes of weights: {error}", 503)
        if start + len(body) == size:
            arriving.clear()
            worker.submit(take_over, file.name, reference).result()
        return served

    def take_over(path, reference):
        try:
            new = load_file(path)
        except unreadable as error:
            expect(False, f"the weights are not safetensors: {error}")
        old = dict(model.named_parameters())
        same = old.keys() == new.keys() and all(old[key].shape == new[key].shape for key in old)
        expect(same, f"{reference} holds the weights of another model than {name}")
        finite = all(one.isfinite().all() for one in new.values())
        expect(finite, f"{reference} holds NaN or infinity")
        with torch.no_grad():
            for key, parameter in old.items():
                parameter.copy_(new[key])
        served["reference"] = reference


def main():
    token = os.environ.get("REF_TOKEN", "").strip()
    if HOST not in ("127.0.0.1", "localhost") and not token:
        raise SystemExit(f"HOST={HOST} can be reached from other machines: set REF_TOKEN in the environment first")
    hint = " (choose another with PORT=...)"
    with explained(f"cannot listen on {HOST}:{PORT}", OSError, hint):
        listener = socket.create_server((HOST, PORT), backlog=1024)  # before the model is loaded, to fail at once
    model, _ = load_model(MODEL, dtype=DTYPE, trust_remote_code=TRUST_REMOTE_CODE)
    if model.device.type == "cpu":
        os.nice(10)  # the trainer may be on the same cores, and goes first
    server = waitress.create_server(
        make_app(model, MODEL, token), sockets=[listener], threads=32, connection_limit=900, asyncore_use_poll=True,
        channel_timeout=60, max_request_body_size=MAX_BODY_MB * 2**20 + 1)

    stop, runner = threading.Event(), threading.Thread(target=server.run, daemon=True)
    for number in signal.SIGTERM, signal.SIGINT:
        if signal.getsignal(number) != signal.SIG_IGN:  # Ctrl-C is not for a script's background job
            signal.signal(number, lambda *_: stop.set())
    runner.start()
    print("reference model %s at http://%s:%d" % (MODEL, *listener.getsockname()[:2]), flush=True)
    while runner.is_alive() and not stop.wait(1):
        pass
    server.accepting, deadline = False, time.monotonic() + 60
    while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len for channel in [*server.active_channels.values()]):
        time.sleep(0.05)
    os._exit(not stop.is_set())  # whatever is still being computed


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    main()
