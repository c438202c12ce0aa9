"""The trainer's side of the reference model: its log-probs from `ref_server.py`, and its renewal, on both sides.

Every exchange has a limit in time, says what it waits for, and goes to another server of the list when one is silent.

Iterative GRPO (DeepSeekMath, Algorithm 1): now and then the reference becomes the policy, or mixes with it.
`write_reference` puts the new one into a file, and `send` brings it to the servers. A request for log-probs names the
reference that it is for; a server with another one, because it was killed and started again, is sent the file again.
"""
import itertools
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import requests
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from grpo.checkpoint import merged

turn = itertools.count(int(os.environ.get("RANK", 0)))  # whose turn it is among the servers
silent_until = {}  # those that did not answer are left alone for a while
sending = threading.Lock()


class NoAnswer(SystemExit):
    """From no server, in the time that there was."""


class Reference(NamedTuple):
    """Weights that servers are sent, instead of those that they were started with."""
    name: str  # another one each time
    file: Path  # safetensors, by the names of the model's parameters


# ------------------------------------------------------------------------------------------------- log-probs

def ask(method: str, servers: str, path: str, patience: float, accept=200, body=None) -> requests.Response:
    """One HTTP exchange with the next one of the servers (addresses with commas between) that answers, tried again for
    `patience` seconds: its answer, if it is 200 or `accept`, with its address as `server`. SystemExit says what is
    wrong."""
    headers = {"Authorization": f"Bearer {os.environ.get('REF_TOKEN', '')}"}
    start = now = time.monotonic()
    while now < start + patience:
        urls = [url for url in servers.split(",") if silent_until.get(url, 0) < now] or servers.split(",")
        url, pause = urls[next(turn) % len(urls)], 0.5
        limits = 5, max(1, (start + patience - now) / len(urls))  # seconds to connect, and between two bytes
        try:
            with requests.Session() as session:
                session.trust_env = False  # a proxy for the internet is nothing for these servers
                answer = session.request(method, url + path, data=body, headers=headers, timeout=limits,
                                         allow_redirects=False)
        except requests.RequestException as error:
            silent_until[url], reason = time.monotonic() + 30, error
        else:
            if answer.status_code in (200, accept):
                answer.server = url
                return answer
            reason = f"{url}{path} answered {answer.status_code}: {said(answer)}"
            if answer.status_code != 503:
                raise SystemExit(reason)
            pause = int(answer.headers["Retry-After"])
        time.sleep(pause)
        now = time.monotonic()
    raise NoAnswer(f"no answer from a reference server at {url}{path} in {patience:.0f} s (start it: "
                   f"python ref_server.py MODEL=...): {reason}")


def said(answer: requests.Response) -> str:
    return answer.content.decode(errors="replace").strip()


def request_logps(servers: str, tokens, prompt_lens, completion_lens, temperature, reference: Reference | None = None,
                  patience=300.0) -> tuple[torch.Tensor, ...]:
    """The reference log-probs of packed rows (see `token_logps`), one float32 tensor a row, from the next of the
    servers (addresses with commas between)."""
    rows = {"tokens": tokens, "prompt_lens": prompt_lens, "completion_lens": completion_lens}
    body = save({name: tensor.to("cpu", torch.int32) for name, tensor in rows.items()})
    query = urlencode({"temperature": temperature, "reference": reference.name if reference else ""})
    for _ in range(5):
        answer = ask("POST", servers, f"/logps?{query}", patience, 409 if reference else 200, body)
        if answer.status_code == 200:
            return load(answer.content)["logps"].split(completion_lens.tolist())
        send(answer.server, reference)
    raise SystemExit(f"five times, instead of {reference.name}: {said(answer)}")


def check_servers(servers: str, model, name: str, ids: list[int]) -> None:
    """`check_server` for each of them; one that does not answer is reported, and fatal if no other one does."""
    absent = []
    for url in servers.split(","):
        try:
            check_server(url, model, name, ids)
        except NoAnswer as error:
            absent.append(error)
            print(error, flush=True)
    if len(absent) == len(servers.split(",")):
        raise absent[0]


@torch.no_grad()
def check_server(url: str, model, name: str, ids: list[int]) -> None:
    """SystemExit if no server is at `url`, or if its log-probs of `ids` are not those of `model`, known as `name`."""
    health = ask("GET", url, "/health", patience=25).json()
    if health["dtype"] != (dtype := str(model.dtype).removeprefix("torch.")):
        print(f"the reference server at {url} computes in {health['dtype']}, the policy in {dtype}: the KL starts "
              "above 0 (set DTYPE for one of them)", flush=True)
    tokens, difference = torch.tensor(ids, device=model.device), float("inf")
    if health["vocab_size"] == model.config.get_text_config().vocab_size:
        theirs = request_logps(url, tokens, torch.tensor([1]), torch.tensor([len(ids) - 1]), 1.0)[0]
        ours = model(tokens[None]).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[1:, None])[:, 0].cpu()
        difference = (ours - theirs).abs().mean()
    if not difference < 0.1:  # bfloat16 rounds by less, another model differs by more
        raise SystemExit(f"the reference server at {url} holds {health['model']}, which is not the policy's model: "
                         f"start it with python ref_server.py MODEL={name}")


# ------------------------------------------------------------------------------------------------- another reference

def renew_reference(servers: str, folder: str, model, gathered, name: str, alpha: float, patience=300.0) -> Reference:
    """Brings the next reference, called `name`, to the servers when every process has the answers of the one before it.

    By all processes together. Within `gathered()` the parameters of `model` are whole. With an `alpha` of 0 it is what
    the folder holds. SystemExit if a server does not take it.
    """
    reference = Reference(name, Path(folder) / "reference.safetensors")
    dist.barrier()
    with gathered():
        if dist.get_rank() == 0 and alpha:
            write_reference(reference.file, merged(model), alpha)
    if dist.get_rank() == 0:
        send(servers, reference, patience)
    dist.barrier()
    return reference


def write_reference(file: Path, model, alpha: float) -> None:
    """The next reference, alpha * model + (1 - alpha) * what is in the file; if alpha is 1 just the model's weights.

    A mixture is kept in float32, where it does not stop moving when alpha is small.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if alpha < 1:
        with safe_open(file, "pt") as old:
            weights = {name: old.get_tensor(name).float().lerp(tensor.cpu().float(), alpha)
                       for name, tensor in weights.items()}
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file.with_suffix(".unfinished"))
        os.replace(file.with_suffix(".unfinished"), file)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"cannot write {file}: {error}") from error


def send(servers: str, reference: Reference, patience=300.0, bytes_at_once: int = 2**20) -> None:
    """Brings the weights to every one of the servers. SystemExit if one does not take them, or does not answer for
    `patience` seconds."""
    for url in servers.split(","):
        with sending, open(reference.file, "rb") as file:
            size, start, restarts = os.fstat(file.fileno()).st_size, 0, 0
            there = ask("GET", url, "/health", patience).json()["reference"]
            while there != reference.name and start < size:
                file.seek(start)
                piece = file.read(bytes_at_once)
                answer = ask("PUT", url, f"/weights/{reference.name}?{urlencode({'start': start, 'size': size})}",
                             patience, 409, piece)
                start += len(piece)
                if answer.status_code == 409:  # the server was killed meanwhile and does not have the beginning
                    start, restarts = 0, restarts + 1
                if restarts > 10:
                    raise SystemExit(f"{url} does not take the reference {reference.name}: {said(answer)}")
