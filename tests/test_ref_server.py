"""Log-probs against plain float64 transformers; the server against everything that a client can send."""

import copy
import http.client
import http.server
import json
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load, save

import fuzz_wire
from grpo import fused as fused_module, head
import load as load_test
import ref_server
from grpo.attention import pack_attention
from grpo.fused import fuse
from grpo.reference import KeepAlive, Reference, Weights, ask, check_server, request_logps, send, write_reference
from grpo.policy import Policy, batched_logps, fingerprint, token_logps

SHAPE = dict(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Phi3": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "GPTNeoX": {},
    "Gemma3": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi": {},  # its LM head has a bias
    "Lfm2": {"layer_types": ["conv", "full_attention"]},  # tokens that see each other outside attention
}
UNPACKED = ("Lfm2",)


def make_model(family, **changes):
    torch.manual_seed(0)
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(**SHAPE | FAMILIES[family] | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def make_groups():
    """Three prompts, one of them begins like another; completions of several lengths that do so too, or are equal."""
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9, 2], [4]]
    whose, lens = [0, 1, 0, 2, 1, 0, 1], [4, 9, 4, 6, 12, 3, 1]
    generator = torch.Generator().manual_seed(1)
    rows = [prompts[p] + torch.randint(320, (n,), generator=generator).tolist() for p, n in zip(whose, lens)]
    rows[4][6:9], rows[2], rows[6] = rows[1][6:9], rows[0], rows[1][:7]
    return torch.tensor(sum(rows, [])), torch.tensor([len(prompts[p]) for p in whose]), torch.tensor(lens)


def make_rows(vocab_size=320, lens=((3, 5), (1, 1), (7, 2), (2, 11)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (sum(map(sum, lens)),), generator=generator)
    tokens[7] = 2  # EOS, which is also the padding
    return tokens, *torch.tensor(lens).T


def expected_logps(model, tokens, prompt_lens, completion_lens, temperature=1.0):
    """Row by row, without padding, from the model's own float64 logits."""
    return plain_logps(copy.deepcopy(model).double(), tokens, prompt_lens, completion_lens, temperature)


def plain_logps(model, tokens, prompt_lens, completion_lens, temperature):
    logps = []
    for row, p in zip(tokens.split((prompt_lens + completion_lens).tolist()), prompt_lens.tolist()):
        distribution = (model(row[None]).logits[0] / temperature).log_softmax(-1)
        logps += [distribution[t - 1, row[t]] for t in range(p, len(row))]
    return torch.stack(logps)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_plain_transformers(family):
    model = make_model(family)
    with torch.no_grad():
        for packed in False, True:
            if packed:
                pack_attention(model)
                assert (model.config._attn_implementation == "packed") == (family not in UNPACKED)
            for rows, temperature in (make_rows(), 1.0), (make_rows(), 0.6), (make_groups(), 1.0):
                ours = token_logps(model, *rows, temperature)
                assert ours.dtype == torch.float32 and ours.shape == (rows[2].sum(),)
                assert (ours - expected_logps(model, *rows, temperature)).abs().max() < 2e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_transformers(family, tied, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_TILE", 1000)  # ten tiles
    model, rows = make_model(family, tie_word_embeddings=tied), make_groups()
    weights = torch.linspace(-1, 2, rows[2].sum())
    pack_attention(model)
    (token_logps(model, *rows, 0.7) * weights).sum().backward()
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    (plain_logps(exact, *rows, 0.7) * weights).sum().backward()
    for (name, ours), plain in zip(model.named_parameters(), exact.parameters()):
        assert (ours.grad - plain.grad).norm() <= 2e-5 * plain.grad.norm() + 1e-6, name


@pytest.mark.parametrize("family, compiled", [*((family, False) for family in FAMILIES), ("Qwen2", True)])
def test_fused_operations_change_neither_values_nor_gradients(family, compiled, monkeypatch):
    if not compiled:  # the operations as they are written, without torch.compile
        for module in head, fused_module:
            monkeypatch.setattr(module, "compiled", lambda function: function)
    fused, plain, rows = make_model(family), make_model(family), make_groups()
    with torch.no_grad():  # what a norm multiplies by must not be 1: some add 1 to it
        for ours, other in zip(fused.parameters(), plain.parameters()):
            ours.copy_(other.add_(torch.linspace(-0.3, 0.4, other.numel()).view_as(other) if other.dim() == 1 else 0))
    file = sys.modules[type(fused).__module__]
    monkeypatch.setattr(file, "apply_rotary_pos_emb", getattr(file, "apply_rotary_pos_emb", None), raising=False)
    pack_attention(fused)
    fuse(fused)
    token_logps(fused, *rows).sum().backward()
    monkeypatch.undo()
    exact = plain.double()
    (expected := plain_logps(exact, *rows, 1.0)).sum().backward()
    assert (token_logps(fused, *rows) - expected).abs().max() < 2e-5
    for (name, ours), other in zip(fused.named_parameters(), exact.parameters()):
        assert (ours.grad - other.grad).norm() <= 2e-5 * other.grad.norm() + 1e-6, name
    changed = sum("forward" in vars(module) for module in fused.modules())
    norms_and_gates = {"Qwen3": 11, "Phi3": 5, "Cohere": 2, "Gemma2": 0, "Gemma3": 0, "GPTNeoX": 0, "Phi": 0}
    assert changed == norms_and_gates.get(family, 7)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_heads_passes_on_a_gpu_are_those_of_softmax(cap):
    generator = torch.Generator().manual_seed(0)
    logits, scale = torch.randn(6, 50, generator=generator), 1.7
    place = torch.tensor([3, -1, 7, 49, 0, -1])  # -1: the target is in another tile
    total = head.compiled(head.log_sum_exp)(logits, scale)
    exact = (scale * logits.double()).requires_grad_()
    torch.testing.assert_close(total.double(), exact.logsumexp(1).detach(), atol=1e-6, rtol=0)
    loss = exact.logsumexp(1).sum() - exact[range(6), place][place >= 0].sum()
    expected = torch.autograd.grad(loss, exact)[0] * (1 - (logits.double() / cap) ** 2 if cap else 1)
    error = head.compiled(head.softmax_error)(logits, total, place, scale, cap, torch.float32)
    torch.testing.assert_close(error.double(), expected, atol=1e-6, rtol=0)


def test_no_token_is_computed_twice_after_the_same_text():
    model, rows, seen = make_model("Qwen2"), make_groups(), []
    pack_attention(model)
    model.base_model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True)
    token_logps(model, *rows)
    texts = {tuple(row[:end].tolist()) for row in rows[0].split((rows[1] + rows[2]).tolist())
             for end in range(1, len(row) + 1)}
    assert seen[0].shape == (1, len(texts)) and len(texts) == 6 + 1 + rows[2].sum() - (3 + 4 + 1)  # see make_groups


def test_bfloat16_costs_no_more_than_its_rounding():
    model, rows = make_model("Qwen2"), make_groups()
    pack_attention(model)
    exact = token_logps(model, *rows)
    exact.sum().backward()
    exact_grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.bfloat16()
    rounded = token_logps(model, *rows)
    rounded.sum().backward()
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 0.1
    assert (model.lm_head.weight.grad.float() - exact_grad).norm() < 0.02 * exact_grad.norm()


def test_tiles_of_the_head_change_neither_values_nor_gradients(tiny, monkeypatch):
    model, _ = tiny
    results = []
    for logits_per_tile in 2**24, 1000:
        monkeypatch.setattr(head, "LOGITS_PER_TILE", logits_per_tile)
        model.zero_grad()
        logps = token_logps(model, *make_rows())
        (logps * torch.arange(19.0)).sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    assert (results[0][1] - results[1][1]).norm() < 1e-5 * results[0][1].norm()


def test_the_batch_is_halved_when_memory_is_short(tiny):
    model, _ = tiny
    sizes = []

    def out_of_memory_over_20_tokens(module, arguments, keywords):
        sizes.append(keywords["input_ids"].numel())
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError("injected")

    hook = model.base_model.register_forward_pre_hook(out_of_memory_over_20_tokens, with_kwargs=True)
    logps = batched_logps(model, *make_rows(), 1.0, 10_000)
    with pytest.raises(torch.OutOfMemoryError):  # a single row that does not fit cannot be helped
        batched_logps(model, *make_rows(lens=((20, 20),)), 1.0, 10_000)
    hook.remove()
    assert max(sizes) > 20
    torch.testing.assert_close(logps, batched_logps(model, *make_rows(), 1.0, 10_000), atol=1e-5, rtol=0)


def test_server_agrees_with_plain_transformers(tiny, server):
    model, _ = tiny
    rows = make_rows()
    with torch.no_grad():
        expected = expected_logps(model, *rows, 0.8)
    answer = request_logps(server, *rows, 0.8)
    assert [len(row) for row in answer] == rows[2].tolist()
    assert (torch.cat(answer) - expected).abs().max() < 2e-4
    check_server(server, model, "tiny", list(range(20)), Weights(fingerprint(model)))
    check_server(server, model, "tiny", [5], Weights(fingerprint(model)))  # a prompt of a single token


def test_server_says_what_it_holds(server, tiny, tiny_folder):
    health = requests.get(f"{server}/health").json()
    known = {"vocab_size": 327, "max_length": 1024, "reference": fingerprint(tiny[0])}
    assert health == {"status": "ok", "model": tiny_folder, "dtype": "float32", **known}


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(tiny):
    model, others = copy.deepcopy(tiny[0]), set()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 0.01
            others.add(fingerprint(model))
            parameter.view(-1)[0] -= 0.01
    assert len(others) == len([*model.parameters()]) and fingerprint(tiny[0]) not in others
    assert fingerprint(copy.deepcopy(tiny[0]).bfloat16()) == fingerprint(tiny[0])


def test_a_proxy_for_the_internet_is_not_asked(server, tiny, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    check_server(server, tiny[0], "tiny", list(range(20)), Weights(fingerprint(tiny[0])))


def test_another_model_is_refused_by_the_trainer_at_any_time(server, tiny):
    weights = Weights(fingerprint(tiny[0]))
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)  # as after a few steps: log-probs differ by 0.001
    with pytest.raises(SystemExit, match="409: MODEL=.* with weights .*: restart it with the trainer's MODEL"):
        check_server(server, other, "tiny", list(range(20)), Weights(fingerprint(other)))
    with pytest.raises(SystemExit, match=f"with weights {weights.name}, not another"):  # later on, too
        request_logps(server, *make_rows(), 1.0, Weights("another"))
    request_logps(server, *make_rows(), 1.0, weights)

    other = copy.deepcopy(tiny[0])
    for module in other.modules():  # the same weights, with another config.json: rope_theta
        if hasattr(module, "inv_freq"):
            module.inv_freq.pow_(0.3)
    assert fingerprint(other) == weights.name
    with pytest.raises(SystemExit, match="not the policy's with the same weights: start it with .* MODEL=tiny"):
        check_server(server, other, "tiny", list(range(20)), weights)


def test_a_broken_server_of_several_is_left_out():
    """One whose GPU is lost answers every request with 500."""
    answers = {}
    for status in 500, 200:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self, status=status):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass
        running = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        answers[status] = f"http://127.0.0.1:{running.server_port}"
    for _ in range(3):
        assert ask("GET", ",".join(answers.values()), "/health", 9).server == answers[200]
    with pytest.raises(SystemExit, match="answered 500"):
        ask("GET", answers[500], "/health", 9)


def test_a_connection_notices_that_the_machine_is_gone(server):
    """By probes of the kernel, as the machine says nothing: at most 10 + 4 * 5 seconds after the last one."""
    with requests.Session() as session:
        session.mount("http://", KeepAlive())
        with session.get(f"{server}/health", stream=True) as answer:
            line = answer.raw.connection.sock
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            seconds = [line.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
                       for name in ("IDLE", "INTVL", "CNT")]
            assert seconds == [10, 5, 4]


def body(**changes):
    tokens, prompt_lens, completion_lens = (tensor.int() for tensor in make_rows())
    tensors = {"tokens": tokens, "prompt_lens": prompt_lens, "completion_lens": completion_lens} | changes
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def with_header(dtype: str, shape: list[int]) -> bytes:
    text = json.dumps({"tokens": {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}).encode()
    return len(text).to_bytes(8, "little") + text + b"0000"


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_BODIES = {
    "empty": (b"", "not safetensors"),
    "text": (b"hello", "not safetensors"),
    "pickle": (pickle.dumps({"tokens": [1]}), "not safetensors"),
    "truncated": (body()[:-3], "not safetensors"),
    "longer than it says": (body() + b"more", "not safetensors"),
    "header of 2**60 bytes": ((2**60).to_bytes(8, "little") + b"{}", "not safetensors"),
    "header that lies": (with_header("I32", [9]), "not safetensors"),
    "huge shape": (with_header("I32", [2**40, 2**40]), "not safetensors"),
    "unknown type": (with_header("X9", [1]), "not safetensors"),
    "lacks a tensor": (body(prompt_lens=None), r"the body holds \['completion_lens', 'tokens'\]"),
    "one tensor more": (body(more=ints(1)), "the body holds"),
    "floats": (body(tokens=torch.zeros(32)), "tokens is torch.float32"),
    "long integers": (body(tokens=torch.zeros(32, dtype=torch.long)), "tokens is torch.int64"),
    "two dimensions": (body(tokens=torch.zeros(4, 8, dtype=torch.int32)), r"tokens is torch.int32 \[4, 8\]"),
    "no rows": (body(prompt_lens=ints(), completion_lens=ints()), "expected int32"),
    "more prompts than completions": (body(prompt_lens=ints(3, 1, 7, 2, 1)), "not as many"),
    "an empty prompt": (body(prompt_lens=ints(3, 0, 8, 2)), "has no token"),
    "an empty completion": (body(completion_lens=ints(5, 0, 3, 11)), "has no token"),
    "a negative length": (body(completion_lens=ints(5, -1, 4, 11)), "has no token"),
    "lengths that overflow": (
        body(prompt_lens=ints(*[2**31 - 1] * 4), completion_lens=ints(*[2**31 - 1] * 4)),
        "at most 1024",
    ),
    "a row longer than the model": (
        body(tokens=ints(*[0] * 1030), prompt_lens=ints(1029), completion_lens=ints(1)),
        "1030 tokens, the model takes at most 1024",
    ),
    "lengths that do not add up": (body(prompt_lens=ints(3, 1, 7, 3)), "add up to 33, but there are 32"),
    "an id over the vocabulary": (body(tokens=torch.full((32,), 327, dtype=torch.int32)), "expected 0 to 326"),
    "a negative id": (body(tokens=torch.full((32,), -1, dtype=torch.int32)), "token ids from -1"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_with_one_sentence(server, name):
    data, sentence = BAD_BODIES[name]
    answer = requests.post(f"{server}/logps", data=data, timeout=20)
    assert answer.status_code == 400 and answer.text.count("\n") == 1
    assert re.search(sentence, answer.text), answer.text


@pytest.mark.parametrize("temperature", ["0", "-1", "nan", "inf", "hot"])
def test_a_bad_temperature_is_refused(server, temperature):
    answer = requests.post(f"{server}/logps?temperature={temperature}", data=body())
    assert answer.status_code == 400 and "temperature" in answer.text


def test_unknown_pages_and_methods_are_refused_in_plain_text(server):
    assert requests.get(f"{server}/weights").status_code == 404
    answer = requests.get(f"{server}/logps")
    assert answer.status_code == 405 and "<" not in answer.text


def test_a_declared_body_over_the_limit_is_refused_before_it_is_read(server):
    host, port = server.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.putrequest("POST", "/logps")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()  # and not one byte of the body
    assert connection.getresponse().status == 413


def test_idle_and_half_open_connections_do_not_block_others(server):
    host, port = server.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(100)]
    for connection in idle[:50]:
        connection.sendall(b"POST /logps HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    start = time.monotonic()
    assert requests.post(f"{server}/logps", data=body(), timeout=20).status_code == 200
    assert time.monotonic() - start < 5
    for connection in idle:
        connection.close()


def test_the_token_is_wanted_and_the_work_in_flight_is_finished(launch, tiny_folder):
    process = launch("ref_server.py", f"MODEL={tiny_folder}", "PORT=0", env={"REF_TOKEN": "secret"})
    url = process.wait_for(r"http://127.0.0.1:\d+")[0]
    for headers in {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret".encode()}:
        assert requests.get(f"{url}/health", headers=headers).status_code == 401
        assert requests.post(f"{url}/logps", data=body(), headers=headers).status_code == 401
    with pytest.raises(SystemExit, match="401: wrong or missing bearer token"):
        check_server(url, None, "tiny", [1, 2], None)

    # SIGTERM while a large request is being computed: the answer still comes, then the process ends with 0.
    lens = torch.tensor([[10, 900]] * 120)
    tokens, answers = torch.randint(320, (int(lens.sum()),)), []
    data = save({"tokens": tokens.int(), "prompt_lens": ints(*[10] * 120), "completion_lens": ints(*[900] * 120)})
    client = threading.Thread(
        target=lambda: answers.append(
            requests.post(f"{url}/logps", data=data, headers={"Authorization": "Bearer secret"}, timeout=120)
        )
    )
    client.start()
    time.sleep(1)
    process.popen.send_signal(signal.SIGTERM)
    assert client.is_alive()
    assert process.wait(100)[0] == 0
    client.join(10)
    assert answers[0].status_code == 200 and len(load(answers[0].content)["logps"]) == 120 * 900


def test_it_does_not_start_where_it_should_not(launch, tiny_folder, server):
    port = server.rsplit(":", 1)[1]
    starts = {
        ("PORT=" + port,): "cannot listen on 127.0.0.1:" + port,
        ("HOST=0.0.0.0",): "set REF_TOKEN in the environment",
        ("MODEL=nowhere/at/all", "PORT=0"): "cannot load MODEL=nowhere/at/all",
        ("GPU=1",): "unknown constant 'GPU=1'",
    }
    for arguments, sentence in starts.items():
        process = launch("ref_server.py", *arguments, env={"REF_TOKEN": ""})
        code, text = process.wait(100)
        assert code == 1 and sentence in text and "Traceback" not in text, text


def test_an_absent_server_is_named_within_30_seconds():
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"http://127.0.0.1:9/health.*python ref_server.py MODEL="):
        check_server("http://127.0.0.1:9", None, "tiny", [1, 2], None)
    assert time.monotonic() - start < 30


@pytest.fixture
def other(tiny):
    """The tiny model with other weights."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def test_a_new_reference_is_taken_over_whole_or_not_at_all(launch, tiny, tiny_folder, other, tmp_path, monkeypatch):
    monkeypatch.setenv("REF_TOKEN", "secret")
    url = launch("ref_server.py", f"MODEL={tiny_folder}", "PORT=0").wait_for(r"http://127.0.0.1:\d+")[0]
    file, rows = tmp_path / "reference.safetensors", make_rows()
    write_reference(file, other, alpha=1)
    content = file.read_bytes()
    one_less = save({name: tensor for name, tensor in load(content).items() if "norm" not in name})
    broken = save({name: tensor / 0 for name, tensor in load(content).items()})

    def put(body, start=0, size=len(content), name="new", token="secret"):
        query, headers = {"start": start, "size": size}, {"Authorization": f"Bearer {token}"}
        return requests.put(f"{url}/weights/{name}", data=body, params=query, headers=headers, timeout=20)

    half = len(content) // 2
    for answer, status, sentence in [
        (put(content, token="wrong"), 401, "bearer token"),
        (put(content, size=2**40), 400, "size="),
        (put(content, size="x"), 400, "size=-1"),
        (put(b""), 400, "start=0"),
        (put(content, start=1), 400, "start=1"),
        (put(content[half:], start=half), 409, "only 0 bytes"),
        (put(b"x" * half, size=half), 400, "not safetensors"),
        (put(one_less, size=len(one_less)), 400, "another model"),
        (put(broken, size=len(broken)), 400, "NaN"),
        (put(content[:half]), 200, ""),
        (put(content[half + 1 :], start=half + 1), 409, f"only {half} bytes"),
        (put(content[:half], name="newer"), 200, ""),
        (put(content[half:], start=half), 409, "only 0 bytes of new"),
    ]:
        assert answer.status_code == status and sentence in answer.text and answer.text.count("\n") == (status != 200)
        assert torch.equal(torch.cat(request_logps(url, *rows, 1.0)), batched_logps(tiny[0], *rows, 1.0, 16384))

    start = time.monotonic()
    with pytest.raises(SystemExit, match="no answer from a reference server at http://127.0.0.1:9/health in 1 s"):
        send("http://127.0.0.1:9", Weights("new", file), patience=1)
    assert time.monotonic() - start < 5
    send(url, Weights("new", file), bytes_at_once=1000_000)
    with pytest.raises(SystemExit, match="409: MODEL=.* with weights new, not .*unless another run uses it"):
        request_logps(url, *rows, 1.0, Weights(fingerprint(tiny[0])))
    assert torch.equal(torch.cat(request_logps(url, *rows, 1.0)), batched_logps(other, *rows, 1.0, 16384))
    answer = torch.cat(request_logps(url, *rows, 1.0, Weights("new", file)))
    assert torch.equal(answer, batched_logps(other, *rows, 1.0, 16384))
    # it is asked for one that it does not have, and is sent it
    write_reference(file, tiny[0], alpha=1)
    answer = torch.cat(request_logps(url, *rows, 1.0, Weights("old", file)))
    assert torch.equal(answer, batched_logps(tiny[0], *rows, 1.0, 16384))


def test_a_renewal_goes_on_without_a_silent_server_of_several(alone, launch, tiny_folder, tmp_path, capsys):
    url = launch("ref_server.py", f"MODEL={tiny_folder}", "PORT=0").wait_for(r"http://127.0.0.1:\d+")[0]
    policy, absent = Policy(tiny_folder, 50), "http://127.0.0.1:9"
    Reference(f"{absent},{url}", 1.0, 999, "").renew(policy, str(tmp_path), "next", 1, patience=1)
    assert "no answer from a reference server at http://127.0.0.1:9/health in 1 s" in capsys.readouterr().out
    assert requests.get(f"{url}/health", timeout=9).json()["reference"] == "next"
    with pytest.raises(SystemExit, match="no answer from a reference server at http://127.0.0.1:9/health in 1 s"):
        Reference(absent, 1.0, 999, "").renew(policy, str(tmp_path), "another", 1, patience=1)


def test_processes_that_send_the_same_weights_do_not_disturb_each_other(launch, tiny_folder, other, tmp_path):
    """As after a restart of the server, when the requests of all of them are refused."""
    url = launch("ref_server.py", f"MODEL={tiny_folder}", "PORT=0").wait_for(r"http://127.0.0.1:\d+")[0]
    write_reference(tmp_path / "reference.safetensors", other, alpha=1)
    file = tmp_path / "reference.safetensors"
    code = ("import os, sys; from pathlib import Path; from grpo.reference import Weights, send\n"
            "if all([os.fork() for _ in range(4)]):\n"  # so there are 16 processes, and this one waits for 4
            "    sys.exit(any([os.wait()[1] for _ in range(4)]))\n"
            f"send('{url}', Weights('new', Path('{file}')), bytes_at_once={file.stat().st_size // 5})\n"
            "try:\n    while True:\n        assert not os.wait()[1]\nexcept ChildProcessError:\n    pass\n")
    sender = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert sender.returncode == 0, sender.stderr
    assert requests.get(f"{url}/health", timeout=9).json()["reference"] == "new"


def test_the_reference_mixes_with_the_policy(tiny, other, tmp_path):
    file = tmp_path / "reference.safetensors"
    write_reference(file, tiny[0], alpha=1)
    for _ in range(2):
        write_reference(file, other.bfloat16(), alpha=0.01)
    mixed, first = load(file.read_bytes()), dict(tiny[0].named_parameters())
    for name, parameter in other.named_parameters():
        expected = 0.99**2 * first[name].double() + (1 - 0.99**2) * parameter.double()
        assert mixed[name].dtype == torch.float32 and (mixed[name] - expected).abs().max() < 1e-6


def test_more_requests_than_it_has_places_for_come_again(server):
    lens = torch.tensor([[10, 500]] * 8)
    rows = torch.randint(320, (int(lens.sum()),)), lens[:, 0], lens[:, 1]
    data = save(dict(zip(("tokens", "prompt_lens", "completion_lens"), (tensor.int() for tensor in rows))))
    with ThreadPoolExecutor(40) as clients:
        patient = [clients.submit(request_logps, server, *rows, 1.0) for _ in range(10)]
        answers = list(clients.map(lambda _: requests.post(f"{server}/logps", data=data, timeout=60), range(30)))
        assert all(len(torch.cat(answer.result())) == 4000 for answer in patient)
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(int(answer.headers["Retry-After"]) > 0 and answer.text.count("\n") == 1 for answer in refused)


def test_a_server_of_several_may_be_absent(server, tiny_folder, capsys):
    servers, policy = f"http://127.0.0.1:9,{server}", Policy(tiny_folder, 50)
    Reference(servers, 1.0, 999, policy.fingerprint).check(policy, list(range(20)))
    assert "no answer from a reference server at http://127.0.0.1:9/health in 25 s" in capsys.readouterr().out


def test_a_few_thousand_broken_bodies():
    fuzz_wire.fuzz(3000)  # `make fuzz` tries 100,000


def test_rude_clients_for_a_quarter_of_a_minute(tiny_folder):
    assert load_test.load(tiny_folder, 15, growth=50) == []  # `make load` for ten minutes, where memory settles
