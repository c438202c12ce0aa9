"""Hammers a real reference server: right requests and hostile ones, and every second one is broken off half-way.

    python tests/load.py [MODEL_FOLDER] [seconds=600] [clients=8]    # without a folder an untrained tiny model

A defect, and exit 1, is any of: a log-prob that is not the one computed here, by 1e-4; a status that its request does
not deserve, above all a 5xx that is not 503 with Retry-After; a traceback; memory that grows by more than 5 %, files
that stay open; a server that in the end gives no right answer or does not end with 0 at SIGTERM.
"""

import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import Process, make_tiny
from safetensors.torch import load as read_safetensors
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from grpo.policy import token_logps

LIMIT = 2**20  # MAX_BODY_MB=1
TOKEN = "a token for this run"
WRONG = "a wrong answer"
BROKEN_OFF = "broken off in the header", "broken off in the body", "broken off before the answer"


class Request(NamedTuple):
    kind: str
    weight: int  # how often it is sent, next to the others
    pieces: list[bytes]  # sent one after the other
    statuses: set  # that may answer it; "reset" if the server may close before it has read everything
    logps: torch.Tensor | None = None  # the right answer
    pause: float = 0.0  # seconds between the pieces
    head: int = 0  # bytes before the body, of one that may be broken off


# ------------------------------------------------------------------------------------------------- what is sent


def pack(tokens, prompt_lens, completion_lens) -> bytes:
    rows = {"tokens": tokens, "prompt_lens": prompt_lens, "completion_lens": completion_lens}
    return save({name: tensor.int() for name, tensor in rows.items()})


def safetensors(shape: list, offsets: list, names=("tokens",)) -> bytes:
    text = json.dumps({name: {"dtype": "I32", "shape": shape, "data_offsets": offsets} for name in names}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offsets[1])


def make_head(body=b"", method="POST", path="/logps", length=None, token=TOKEN) -> bytes:
    length = len(body) if length is None else length
    lines = f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", f"Content-Length: {length}"
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


def cut(data: bytes, count: int) -> list[bytes]:
    size = -(-len(data) // count)
    return [data[start : start + size] for start in range(0, len(data), size)]


def chunked(head: bytes, body: bytes, size: int) -> list[bytes]:
    chunks = (body[start : start + size] for start in range(0, len(body), size))
    head = head[: head.index(b"Content-Length")] + b"Transfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks), b"0\r\n\r\n"]


@torch.no_grad()
def make_requests(folder: str) -> list[Request]:
    """Every kind of request, with what may answer it; the model is on the CPU in float32, as the server's here is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, rng, requests = model.config.get_text_config(), random.Random(0), []
    longest = min(1000, config.max_position_embeddings)

    def add(kind, weight, body, statuses, logps=None, **options):
        head = make_head(body, **options)
        requests.append(Request(kind, weight, [head, body], statuses, logps, head=len(head)))

    def make_rows(lens):
        tokens = torch.tensor(rng.choices(range(config.vocab_size), k=sum(map(sum, lens))))
        return tokens, *torch.tensor(lens).T

    shapes = [(3, 5), (1, 1), (7, 2)], [(10, 50)] * 8, [(1, longest - 1)], [(longest - 1, 1), (1, 30)]
    for lens, temperature in zip(shapes, (1.0, 0.7, 1.0, 1.3), strict=True):
        rows = make_rows(lens)
        body, logps = pack(*rows), token_logps(model, *rows, temperature)
        path = f"/logps?temperature={temperature}"
        add("right", 15, body, {200}, logps, path=path)
        head = make_head(body, path=path)
        requests.append(Request("right, in chunks", 2, chunked(head, body, 500), {200}, logps))
        requests.append(Request("right, sent slowly", 1, cut(head + body, 6), {200}, logps, 0.3))
    rows = make_rows([(10, longest - 10)] * (16_000 // longest))  # a whole batch of the server: its peak of memory
    add("right, 64 KB", 1, pack(*rows), {200}, token_logps(model, *rows))

    # As large as may be, and wrong in the last token only: everything is read and checked, nothing is computed.
    lens = [(1, longest - 51)] * ((LIMIT - 400) // (4 * longest - 192))
    rest = (LIMIT - len(pack(*make_rows(lens)))) // 4 - 2  # what is left for one more row, less its two lengths
    rows = make_rows([*lens, (1, rest - 1)])
    rows[0][-1] = config.vocab_size
    largest = pack(*rows)
    assert len(largest) == LIMIT and rest <= longest, (len(largest), rest)
    add("1 MB, a wrong id", 12, largest, {400})
    add("1 MB, cut off", 4, largest[:-100], {400})
    add("1 MB of noise", 4, rng.randbytes(LIMIT), {400})
    for length in LIMIT + 1, 2**40, 10**30:
        add("too large, announced", 2, b"", {413}, length=length)
    add("too large, sent", 3, largest + b"0", {413, "reset"})
    requests.append(Request("too large, in chunks", 2, chunked(make_head(), largest + b"0", 2**16), {413, "reset"}))

    for size in 0, 1, 7, 8, 9, 100, 10_000:
        add("noise", 1, rng.randbytes(size), {400})
    good, many = pack(*make_rows(shapes[0])), [str(i) for i in range(12_000)]
    for body in (
        good[:-1],
        good + b"0",
        struct.pack("<Q", 2**60) + good[8:],
        good.replace(b"I32", b"I\\n"),
        good.replace(b"tokens", b"t" * 6),
        safetensors([9], [0, 4]),
        safetensors([2**40, 2**40], [0, 4]),
        safetensors([0, 2**40, 2**40], [0, 0]),
        safetensors([2**64 - 1, 0], [0, 0]),
        safetensors([0], [0, 0], many),
        b"[" * 100_000,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
    ):
        add("wrong safetensors", 1, body, {400})
    for value in "nan", "-1", "0", "inf", "hot", "%00", "%ff", "1e999":
        add("wrong temperature", 1, good, {400}, path=f"/logps?temperature={value}")
    for token in "", "wrong", TOKEN[:-1], "\xe9":
        add("wrong token", 1, good, {401}, token=token)
    for path in "/", "/nowhere", "/logps/", "/health/../logps", "/%ff%00", "/" + "a" * 5000:
        add("unknown path", 1, good, {404}, path=path)
    for method in "GET", "PUT", "DELETE", "BREW":
        add("wrong method", 1, good, {405}, method=method)
    add("wrong method", 1, good, {405}, path="/health")
    add("health", 6, b"", {200}, method="GET", path="/health")
    for text in b"\x16\x03\x01\x02\r\n\r\n", b"hello\r\n\r\n", make_head(length=-5), make_head(length="ten"):
        requests.append(Request("no HTTP", 1, [text], {400}))
    return requests


# ------------------------------------------------------------------------------------------------- the clients


def exchange(address, request: Request) -> tuple[int | str, dict, bytes]:
    with socket.create_connection(address, timeout=120) as connection:
        try:
            for number, piece in enumerate(request.pieces):
                time.sleep(request.pause if number else 0)
                connection.sendall(piece)
        except ConnectionError:
            pass  # it was refused before all of it was read; the answer may be there all the same
        try:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.headers, answer.read()
        except (ConnectionError, http.client.HTTPException):
            return "reset", {}, b""
        except TimeoutError:
            return "no answer", {}, b""


def break_off(address, request: Request, kind: str, rng: random.Random) -> None:
    data = b"".join(request.pieces)
    end = {BROKEN_OFF[0]: (1, request.head), BROKEN_OFF[1]: (request.head, len(data)), BROKEN_OFF[2]: (len(data),) * 2}
    with socket.create_connection(address, timeout=120) as connection:
        if rng.random() < 0.5:  # closed with a reset, not with an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(data[: rng.randint(*end[kind])])


def hammer(process: Process, address, requests: list[Request], seconds, clients: int, growth: float) -> list[str]:
    counts, defects, samples, lock = Counter(), Counter(), [], threading.Lock()
    weights = [request.weight for request in requests]
    whole = [request for request in requests if request.kind in ("right", "1 MB, a wrong id")]

    def send(request: Request, until: float) -> None:
        status, later = None, True
        while later and (status is None or time.monotonic() < until):
            status, headers, body = exchange(address, request)
            later = status == 503 and b" /logps" in request.pieces[0] and headers.get("Retry-After", "").isdigit()
            with lock:
                counts[request.kind, "503, Retry-After" if later else status] += 1
            if later:
                time.sleep(int(headers["Retry-After"]))
        if later:
            return
        defect = None if status in request.statuses else f"{request.kind}: answered {status} {body[:150]}"
        if not defect and request.logps is not None:
            logps = read_safetensors(body)["logps"]
            if logps.shape != request.logps.shape or not (logps - request.logps).abs().max() < 1e-4:
                defect = f"{request.kind}: {WRONG}"
        if defect:
            with lock:
                defects[defect] += 1

    def client(number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            if rng.random() < 0.5:
                send(rng.choices(requests, weights)[0], until)
                continue
            kind = rng.choice(BROKEN_OFF)
            for _ in range(40 if rng.random() < 0.005 else 1):  # now and then more than there are places for
                break_off(address, rng.choice(whole), kind, rng)
                with lock:
                    counts[kind, None] += 1

    def sample() -> tuple[float, int]:
        """Resident memory in MB, and open files."""
        assert process.popen.poll() is None, f"the server ended:\n{process.out.read_text()[-3000:]}"
        folder = Path(f"/proc/{process.popen.pid}")
        memory = re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())
        return int(memory[1]) / 1024, len(os.listdir(folder / "fd"))

    with ThreadPoolExecutor(clients) as pool:  # each once, so that what the server needs for any of them is there
        list(pool.map(send, requests, [time.monotonic() + 120] * len(requests)))
    files_before = sample()[1]

    start, lines = time.monotonic(), 0
    with ThreadPoolExecutor(clients) as pool:
        hammering = [pool.submit(client, number, start + seconds) for number in range(clients)]
        while (now := time.monotonic() - start) < seconds:
            memory, files = sample()
            samples.append((now, memory))
            if now >= 10 * lines:
                lines += 1
                with lock:
                    later = sum(n for (_, status), n in counts.items() if status == "503, Retry-After")
                    text = f"{counts.total()} requests, {later} told to come again, {defects.total()} defects"
                print(f"{now:4.0f} s: {text}, {memory:.0f} MB, {files} open files", flush=True)
            time.sleep(min(1, seconds / 200))
    for future in hammering:
        future.result()  # raises what its client could not stand

    for request in requests:
        if request.kind in ("right", "health"):
            before = counts[request.kind, 200]
            send(request, time.monotonic() + 60)
            defects[f"{request.kind}: no answer at the end"] += counts[request.kind, 200] == before
    deadline = time.monotonic() + 10
    while (files := sample()[1]) > files_before + clients and time.monotonic() < deadline:
        time.sleep(0.1)
    process.popen.send_signal(signal.SIGTERM)
    code, log = process.wait(100)

    warm = statistics.median(memory for now, memory in samples if 0.1 <= now / seconds < 0.2)
    late = statistics.median(memory for now, memory in samples if 0.9 <= now / seconds)
    grown = 100 * (late / warm - 1)
    defects[f"the memory grew by {grown:.1f} %"] += grown > growth
    defects[f"{files} files are open, there were {files_before}"] += files > files_before + clients
    defects[f"SIGTERM ended the server with {code}"] += code != 0
    defects["a traceback:\n" + log[log.find("Traceback") :][:3000]] += "Traceback" in log

    print(f"\n{'request':<32}{'sent':>8}  answers")
    for kind in [*dict.fromkeys(request.kind for request in requests), *BROKEN_OFF]:
        answers = {str(status): n for (name, status), n in counts.items() if name == kind}
        text = ", ".join(f"{n} x {status}" for status, n in sorted(answers.items()) if status != "None")
        print(f"{kind:<32}{sum(answers.values()):>8}  {text}")
    for name, value in {
        "told to come again": sum(n for (_, status), n in counts.items() if status == "503, Retry-After"),
        "wrong answers": sum(n for defect, n in defects.items() if defect.endswith(WRONG)),
        "5xx other than 503 with Retry-After": sum(n for (_, status), n in counts.items() if status in range(500, 600)),
        "resident memory after the warm-up, MB": f"{warm:.1f}",
        "resident memory at the end, MB": f"{late:.1f}",
        "growth, %": f"{grown:.1f}",
        "open files before": files_before,
        "open files at the end": files,
        "exit status at SIGTERM": code,
    }.items():
        print(f"{name:<40}{value:>8}")
    return [f"{n} x {defect}" for defect, n in defects.items() if n]


def load(folder="", seconds=600.0, clients=8, growth=5.0) -> list[str]:
    """The defects that so many clients find in so many seconds, when memory may grow by so many percent."""
    with tempfile.TemporaryDirectory() as temporary:
        if not folder:
            make_tiny(folder := f"{temporary}/model")
        requests = make_requests(folder)
        program = [sys.executable, "ref_server.py", f"MODEL={Path(folder).resolve()}", "PORT=0", "MAX_BODY_MB=1"]
        environment = {"REF_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": ""}
        process = Process(program, Path(temporary) / "out.txt", environment)
        try:
            host, port = process.wait_for(r"http://(127.0.0.1):(\d+)").groups()
            return hammer(process, (host, int(port)), requests, seconds, int(clients), growth)
        finally:
            process.popen.kill()
            process.popen.wait()


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    options = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    found = load(*folders, **{name: float(value) for name, value in options.items()})
    print(*(found or ["no defect"]), sep="\n")
    sys.exit(bool(found))
