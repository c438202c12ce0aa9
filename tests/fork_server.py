"""A `python` that needs no second to start: the scripts run in forks of one process that has imported everything.

    python tests/fork_server.py SOCKET                              # the server
    python -IS tests/fork_server.py SOCKET script.py argument ...   # the script, with this one's output and signals
"""
import json
import os
import signal
import socket
import sys


def serve(path: str) -> None:
    sys.path.insert(0, os.path.dirname(__file__))
    from forked import run
    import matplotlib.figure  # noqa: F401
    from deepspeed.ops import op_builder
    from deepspeed.runtime.zero.muon import original_muon  # noqa: F401: with all of torch.compile
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    op_builder.AsyncIOBuilder().is_compatible(verbose=False)  # imports setuptools
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".unfinished")
    listener.listen(16)
    os.rename(path + ".unfinished", path)  # whoever sees it can connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the scripts
    while True:
        client, _ = listener.accept()
        message, outputs, *_ = socket.recv_fds(client, 2**18, 2)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            wait_for(client, outputs, run, json.loads(message))
        for descriptor in outputs:
            os.close(descriptor)
        client.close()


def wait_for(client, outputs: list[int], run, program: list) -> None:
    script = os.fork()
    if script == 0:
        client.close()
        for place, descriptor in enumerate(outputs, start=1):
            os.dup2(descriptor, place)
            os.close(descriptor)
        run(*program)
    for descriptor in outputs:
        os.close(descriptor)
    client.send(b"%d" % script)
    _, status = os.waitpid(script, 0)
    client.send(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def ask(path: str, program: list[str]) -> int:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(path)
    message = json.dumps([os.getcwd(), dict(os.environ), program]).encode()
    socket.send_fds(client, [message], [1, 2])
    script = int(client.recv(20))
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda number, _: os.kill(script, number))
    return abs(int(client.recv(20) or 1))


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
