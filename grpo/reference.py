"""The trainer's side of the reference model: its log-probs from `ref_server.py`, and its renewal.

Every exchange has a time limit and goes to another server of the list when one is silent; an error says what the
trainer was waiting for.

Iterative GRPO (DeepSeekMath, Algorithm 1): now and then the reference becomes the policy, or mixes with it. The new
weights are written into a file and sent to the servers. A request for log-probs names the reference that it is for;
a server that holds another one, because it was restarted, is sent the file again.
"""
import itertools
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import requests
import torch
import torch.distributed as dist
from requests.adapters import HTTPAdapter
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from grpo.checkpoint import merged
from grpo.constants import explained, require
from grpo.metrics import Metrics
from grpo.policy import token_logps
from grpo.types import Group, MicroBatch, PendingLogps, in_batches, pack, samples_of

turn = itertools.count(int(os.environ.get("RANK", 0)))  # which server is next
silent_until = {}  # servers that did not answer are left out for a while
sending = threading.Lock()


class Weights(NamedTuple):
    """The reference's weights, which a server must have to be asked."""
    name: str  # of the servers' MODEL its `fingerprint`; of others another one each time
    file: Path | None = None  # others: safetensors, by the names of the model's parameters


class Reference:
    """Asks the servers (addresses with commas between) for log-probs at a temperature, in requests of some `tokens`.

    The reference is the servers' MODEL, which has this `fingerprint`, until it is renewed.
    """

    def __init__(self, servers: str, temperature: float, tokens: int, fingerprint: str):
        self.servers, self.temperature, self.tokens = servers, temperature, tokens
        self.weights = Weights(fingerprint)
        # a server works on one request at a time, and has room for 24: the others wait here, where no clock runs
        most = min(2 * len(servers.split(",")), 24 // int(os.environ.get("WORLD_SIZE", 1)))
        self.threads = ThreadPoolExecutor(max(1, most))

    def check(self, policy, ids: list[int]) -> None:
        """`check_server` for each server, where the policy is the reference; by all processes, see `visit`."""
        visit(self.servers, lambda url: check_server(url, policy.module.model, policy.path, ids, self.weights))

    def request(self, groups: list[Group]) -> None:
        """From now on the servers work on the `ref_logps` of the groups' samples."""
        for samples in in_batches(samples_of(groups), self.tokens):
            answer = self.threads.submit(request_logps, self.servers, *pack(samples), self.temperature, self.weights)
            for row, sample in enumerate(samples):
                sample.ref_logps = PendingLogps(answer, row)

    def collect(self, batch: MicroBatch, metrics: Metrics) -> None:
        """Waits for the batch's `ref_logps` (C,). A filler was never asked for; its weight is 0, so any numbers do."""
        if batch.ref_logps is None:
            metrics.lap("train")
            answers = [one.ref_logps.result() if one.ref_logps else one.sampler_logps for one in batch.samples]
            batch.ref_logps = torch.cat(answers).to(batch.tokens.device)
            metrics.lap("ref_wait")

    def renew(self, policy, folder: str, name: str, alpha: float, patience=300.0) -> None:
        """Brings the next reference, called `name`, to the servers; by all processes together.

        It is alpha * policy + (1 - alpha) * the one before, or with an `alpha` of 0 what the folder holds. SystemExit
        if a server does not take it, or all are silent for `patience` seconds; one of several that is silent gets it
        when it is back.
        """
        dist.barrier()  # every process has its answers of the reference before
        self.weights = Weights(name, Path(folder) / "reference.safetensors")
        with policy.gathered():
            if dist.get_rank() == 0 and alpha:
                write_reference(self.weights.file, merged(policy.model), alpha)
        if dist.get_rank() == 0:
            ask("GET", self.servers, "/health", patience)  # until one of them answers
            visit(self.servers, lambda url: send(url, self.weights, min(patience, 25)))
        dist.barrier()


class NoAnswer(SystemExit):
    """No server answered in time."""


# ------------------------------------------------------------------------------------------------- log-probs

class KeepAlive(HTTPAdapter):
    """Finds out within half a minute that a machine is gone, however long its answer may take."""

    def init_poolmanager(self, *arguments, **options):
        tcp = socket.IPPROTO_TCP
        probes = [(tcp, socket.TCP_KEEPIDLE, 10), (tcp, socket.TCP_KEEPINTVL, 5), (tcp, socket.TCP_KEEPCNT, 4)]
        options["socket_options"] = [(tcp, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *probes]
        super().init_poolmanager(*arguments, **options)


def ask(method: str, servers: str, path: str, patience: float, accept=200, body=None, loading=1) -> requests.Response:
    """One HTTP exchange with the next of the servers that answers, tried for `patience` seconds; one that listens but
    is `loading` its model may take so many seconds.

    Returns the response, with the server's address as `server`, if its status is 200 or `accept`. SystemExit says what
    is wrong.
    """
    headers = {"Authorization": f"Bearer {os.environ.get('REF_TOKEN', '').strip()}".encode()}
    deadline = time.monotonic() + patience
    while (now := time.monotonic()) < deadline:
        urls = [url for url in servers.split(",") if silent_until.get(url, 0) < now] or servers.split(",")
        url, pause = urls[next(turn) % len(urls)], 0.5
        limits = 5, max(loading, (deadline - now) / len(urls))  # seconds to connect, and between two bytes
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy of the environment
                session.mount("http://", KeepAlive())
                answer = session.request(method, url.rstrip("/") + path, data=body, headers=headers, timeout=limits,
                                         allow_redirects=False)
        except ValueError as error:
            raise SystemExit(f"REF_SERVER={url} is no address like http://127.0.0.1:59875: {error}") from None
        except requests.RequestException as error:
            silent_until[url], reason = time.monotonic() + 30, error
        else:
            if answer.status_code in (200, accept):
                answer.server = url
                return answer
            reason = f"{url}{path} answered {answer.status_code}: {said(answer)}"
            if answer.status_code == 500 and "," in servers:  # a broken GPU, for example
                silent_until[url] = time.monotonic() + 30
            elif answer.status_code != 503:
                ours = answer.status_code in (400, 401, 409, 413)
                raise SystemExit(reason + " (no reference server: choose another PORT and REF_SERVER)" * (not ours))
            pause = int(answer.headers.get("Retry-After", 1))
        time.sleep(pause)
    raise NoAnswer(f"no answer from a reference server at {url}{path} in {patience:.0f} s (start it: "
                   f"python ref_server.py MODEL=...): {reason}")


def said(answer: requests.Response) -> str:
    return " ".join(answer.content.decode(errors="replace").split())[:400]


def request_logps(servers: str, tokens, prompt_lens, completion_lens, temperature,
                  weights: Weights | None = None, patience=300.0) -> tuple[torch.Tensor, ...]:
    """The reference log-probs of ragged rows (see `token_logps`), one float32 tensor a row, from the next of the
    servers (addresses with commas between). SystemExit if it does not have the `weights` and cannot be sent them."""
    rows = {"tokens": tokens, "prompt_lens": prompt_lens, "completion_lens": completion_lens}
    body = save({name: tensor.to("cpu", torch.int32) for name, tensor in rows.items()})
    query = urlencode({"temperature": temperature} | ({"reference": weights.name} if weights else {}))
    for _ in range(5):
        answer = ask("POST", servers, f"/logps?{query}", patience, 409 if weights and weights.file else 200, body)
        if answer.status_code == 200:
            with explained(f"{answer.server} does not answer as ref_server.py does"):
                return load(answer.content)["logps"].split(completion_lens.tolist())  # eq. 4: log pi_ref
        several = servers != answer.server
        visit(answer.server, lambda url: send(url, weights, 25 if several else 300), spare=several)
    raise SystemExit(f"five times, instead of {weights.name}: {said(answer)}")


def visit(servers: str, task, spare=False) -> None:
    """`task(url)` for each of the servers; one that does not answer is reported, and fatal if no other one does, unless
    there is a `spare` one."""
    urls, absent = servers.split(","), 0
    for url in urls:
        try:
            task(url)
        except NoAnswer as error:
            absent += 1
            require(absent < len(urls) or spare, str(error))
            print(error, flush=True)


def health_of(url: str, patience: float) -> dict:
    answer = ask("GET", url, "/health", patience, loading=300)
    try:
        health = answer.json()
        return {key: health[key] for key in ("dtype", "model", "reference")}
    except (ValueError, TypeError, KeyError):
        raise SystemExit(f"what answers at {url} is no reference server: choose another PORT and REF_SERVER") from None


@torch.no_grad()
def check_server(url: str, model, name: str, ids: list[int], weights: Weights) -> None:
    """SystemExit if no server is at `url`, if it does not have the `weights`, which are those of `model`, known as
    `name`, or if its log-probs of `ids` are others."""
    health = health_of(url, 25)
    if health["dtype"] != (dtype := str(model.dtype).removeprefix("torch.")):
        print(f"the reference server at {url} computes in {health['dtype']}, the policy in {dtype}: the KL starts "
              "above 0 (set DTYPE for one of them)", flush=True)
    ids = ids if len(ids) > 1 else 2 * ids
    row = [torch.tensor(numbers, device=model.device) for numbers in (ids, [1], [len(ids) - 1])]
    difference = (token_logps(model, *row).cpu() - request_logps(url, *row, 1.0, weights)[0]).abs().mean()
    # bfloat16 rounds by less
    require(difference < 0.1, f"the reference server at {url} holds {health['model']}, whose log-probs are not the "
                              f"policy's with the same weights: start it with python ref_server.py MODEL={name}")


# ------------------------------------------------------------------------------------------------- other weights

def write_reference(file: Path, model, alpha: float) -> None:
    """The next reference, alpha * model + (1 - alpha) * what is in the file; if alpha is 1 just the model's weights.

    A mixture is kept in float32, where it does not stop moving when alpha is small.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if alpha < 1:
        with safe_open(file, "pt") as old:
            weights = {name: old.get_tensor(name).float().lerp(tensor.cpu().float(), alpha)
                       for name, tensor in weights.items()}
    with explained(f"cannot write {file}"):
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file.with_suffix(".unfinished"))
        os.replace(file.with_suffix(".unfinished"), file)


def send(url: str, weights: Weights, patience=300.0, bytes_at_once: int = 2**20) -> None:
    """Brings the weights to a server. SystemExit if it does not take them, or does not answer for `patience` seconds
    at first."""
    with sending, open(weights.file, "rb") as file:
        size, start, restarts = os.fstat(file.fileno()).st_size, 0, 0
        there = health_of(url, patience)["reference"]
        while there != weights.name and start < size:
            file.seek(start)
            piece = file.read(bytes_at_once)
            answer = ask("PUT", url, f"/weights/{weights.name}?{urlencode({'start': start, 'size': size})}",
                         300, 409, piece)  # seconds; the last piece waits for requests before it, and for the switch
            start += len(piece)
            if answer.status_code == 409:  # it was killed meanwhile, or another process sends the same
                start, restarts = 0, restarts + 1
            else:
                there = answer.json()["reference"]
            require(restarts <= 10, f"{url} does not take the reference {weights.name}: {said(answer)}")
