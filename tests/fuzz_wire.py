"""Throws bodies of every kind at the server's decoder, `ref_server.read_rows`; hypothesis makes and shrinks them.

    python tests/fuzz_wire.py 100000      # so many cases; a second number is the seed, 0 without it

A body is refused with 400 and one short sentence, or its tensors are those that another decoder, the one in this file,
finds in it, and keep every rule. Anything else is a defect, and so is half a second or 64 MB for a single body.
"""

import json
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import bottle
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ref_server  # noqa: E402

VOCAB_SIZE, MAX_LENGTH = 200, 12  # small, so that bytes and short rows reach both sides of them
NAMES = ["tokens", "prompt_lens", "completion_lens"]
BATCH = 5000  # cases that hypothesis remembers at a time
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # else it leaves a folder where it is started


# ------------------------------------------------------------------------------------------------- what is right


def decode(body: bytes) -> list[np.ndarray]:
    """The three arrays in a right body, read without the safetensors library; an exception for any other."""
    (size,) = struct.unpack_from("<Q", body)
    header, data = json.loads(body[8 : 8 + size].decode()), body[8 + size :]
    header.pop("__metadata__", None)
    arrays, end = dict.fromkeys(NAMES), 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        assert info["dtype"] == "I32" and info["shape"] == [(stop - start) / 4] and stop > start == end
        arrays[name], end = np.frombuffer(data[start:stop], "<i4").astype(np.int64), stop
    tokens, prompt_lens, completion_lens = arrays.values()  # fails if there are more than three, the next line if fewer
    assert end == len(data) and len(prompt_lens) == len(completion_lens)
    assert min(prompt_lens) > 0 and min(completion_lens) > 0 and max(prompt_lens + completion_lens) <= MAX_LENGTH
    assert sum(prompt_lens + completion_lens) == len(tokens) and min(tokens) >= 0 and max(tokens) < VOCAB_SIZE
    return [tokens, prompt_lens, completion_lens]


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(body: bytes, plain: bool) -> str:
    """The kind of outcome. The header of a `plain` body is as clients write it: then what is right must be accepted."""
    memory, start = peak_kb(), time.thread_time()
    try:
        rows, outcome = ref_server.read_rows(body, VOCAB_SIZE, MAX_LENGTH), "accepted"
    except bottle.HTTPResponse as refusal:
        rows, outcome = None, str(refusal.status_code)
        assert outcome == "400", refusal.status_code
        sentence = refusal.body.removesuffix("\n")
        assert len(sentence.splitlines()) == 1 and 0 < len(sentence.strip()) < 500, sentence[:1000]
        sentence.encode()  # a lone surrogate would become a 500 later
    seconds, memory = time.thread_time() - start, peak_kb() - memory
    assert seconds < 0.5 and memory < 64 * 1024, (seconds, memory)
    if rows:
        for tensor, array in zip(rows, decode(body), strict=True):
            assert tensor.dtype == torch.int64 and np.array_equal(tensor.numpy(), array), (tensor, array)
    elif plain:
        try:
            rows = decode(body)
        except (AssertionError, TypeError, ValueError):
            return outcome
        raise AssertionError(f"refused, but right: {rows}")
    return outcome


# ------------------------------------------------------------------------------------------------- what is sent

EDGES = [VOCAB_SIZE - 1, VOCAB_SIZE, -1, 0, 1, MAX_LENGTH, MAX_LENGTH + 1, 2**31 - 1, -(2**31)]
ROWS = [  # prompt and completion: the longest that is right, too long, empty, negative, together negative in 32 bits
    *((6, 6), (1, 11), (11, 1), (6, 7), (12, 1), (1, 12), (0, 5), (5, 0), (0, 0), (-1, 3), (3, -1)),
    *[(2**31 - 1, 2**31 - 1)],
]
LENGTHS = [2**64 - 1, 2**63, 2**62, 2**60, 2**40, 2**32, 2**31, 100_000_001, 100_000_000, 7, 2, 1, 0]
DTYPES = {  # as what numpy writes them; there is no I4, and no second line
    **{"I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<f8", "U32": "<u4", "F32": "<f4", "I16": "<i2", "U16": "<u2"},
    **{"F16": "<f2", "BF16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1"},
    **{"F8_E8M0": "u1", "F4": "u1", "F6_E2M3": "u1", "F6_E3M2": "u1", "I4": "<i4", "I\n32": "<i4"},
}
EMPTY = [  # shapes of no number, but for the one without a dimension
    *([0], [0], [0], [0], [], [0, 0], [0] * 70),
    *(shape for n in LENGTHS for shape in ([n, 0], [0, n], [0, n, n])),
]
JSON = [  # what may stand in a header in place of a name, a type, a shape, offsets, a whole tensor
    *("null", "true", "0", "-1", "1.0", "1e999", "9" * 400, "NaN", '""', "{}", "[]", "[[]]", "[0]", "[1]", "[1,1]"),
    *("[0,0]", "[4,0]", "[0,4]", "[-4,0]", "[0,0.0]", "[0,4,8]", "[0,1,0]", "[4,8]", '"I32"', '"I\\n32"', '"\\u2028"'),
    *('"\\ud800"', '"\n"', '"\0"', '"\\u0000"', '"é"', '"', "]", "}", ",", " \n\t", '{"a":', "//", "\ufeff"),
    *(f"[0,{n}]" for n in LENGTHS),
    *(f"[{n},0]" for n in LENGTHS),
    *(f"[{n},{n}]" for n in LENGTHS),
    *(f"[0,{n},{n}]" for n in LENGTHS),
    *(f"[{','.join('0' * n)}]" for n in (9, 65, 2000)),
    *(f"[{','.join('1' * n)}]" for n in (9, 65, 2000)),
    *("[" * n + "]" * n for n in (100, 127, 128, 129, 2000)),
    *('{"a":' * n + "0" + "}" * n for n in (100, 127, 128, 129, 2000)),
    *(f'"{letter * n}"' for letter in ("a", "é", "\\n") for n in (300, 1000, 20_000)),
    "{" + ",".join(f'"{i}":0' for i in range(1000)) + "}",
]
MANY = [",".join(f'"{i}":{{"dtype":"I32","shape":[0],"data_offsets":[0,0]}}' for i in range(n)) for n in (1, 60_000)]
LAYERS = [  # where a body is damaged; the first is right
    *([], ["values"], ["values"], ["values"], ["tensors"], ["tensors"], ["header"], ["header"], ["header"], ["bytes"]),
    *(["values", "bytes"], ["tensors", "header"], ["header", "bytes"], ["more"], ["random header"], ["random body"]),
]


def one_of(*values):
    return st.sampled_from(values)


WHAT, BIT, OFFSET, NOISE = st.integers(0, 5), st.integers(0, 7), st.integers(-1, 40), st.binary(max_size=80)
LAYER, NAME, EDGE, ROW, DTYPE = one_of(*LAYERS), one_of(*NAMES), one_of(*EDGES), one_of(*ROWS), one_of(*DTYPES)
SHAPE, TEXT, LENGTH, MORE = one_of(*EMPTY), one_of(*JSON), one_of(*LENGTHS), one_of(*NAMES * 3, *MANY)
FIELD, TIMES = one_of('"dtype"', '"shape"', '"data_offsets"', '"more"'), one_of(1, 1, 2, 3)


def damage_values(draw, arrays: dict) -> None:
    values, what = arrays[draw(NAME)], draw(WHAT)
    if what == 0:
        values[draw(OFFSET) :] = []
    elif what == 1:
        values.append(draw(EDGE))
    elif values:
        values[draw(st.integers(0, len(values) - 1))] = draw(EDGE)


def damage_tensors(draw, infos: dict) -> None:
    """Another type, another shape, a tensor more or fewer; the header says truly what the body holds."""
    name, what = draw(NAME), draw(WHAT)
    if name not in infos:
        return
    dtype, shape, values = infos[name]
    if what == 0:
        del infos[name]
    elif what == 1:
        infos[draw(one_of("more", "", "__metadata__", name + "\n"))] = infos[name]
    elif what == 2:
        infos[name] = dtype, [1, *shape], values
    elif what == 3:
        infos[name] = dtype, draw(SHAPE), values[:0]
    else:
        dtype = draw(DTYPE)
        infos[name] = dtype, shape, values.astype(DTYPES[dtype])


def damage_header(draw, header: dict) -> None:
    """Text in place of a name or a value, a field more or fewer, a tensor twice, other offsets."""
    name, what = json.dumps(draw(NAME)), draw(WHAT)
    info = header.get(name)
    if what == 0:
        header['"__metadata__"'] = draw(TEXT)
    elif what == 1:
        header[name] = draw(TEXT)
    elif not isinstance(info, dict):
        return
    elif what == 2:
        header[draw(TEXT)] = header.pop(name) if draw(WHAT) else info
    elif what == 3:
        info.pop(draw(FIELD), None)
    elif what == 4:
        info['"data_offsets"'] = json.dumps([draw(OFFSET), draw(OFFSET)])
    else:
        info[draw(FIELD)] = draw(TEXT)


def damage_bytes(draw, body: bytearray) -> None:
    what, position = draw(WHAT), draw(st.integers(0, len(body)))
    if what == 0:
        del body[position:]
    elif what == 1:
        body += draw(NOISE)
    elif what == 2:
        body[position:position] = draw(NOISE)
    elif what == 3:
        body[:8] = struct.pack("<Q", draw(LENGTH))
    elif position < len(body):
        body[position] ^= 1 << draw(BIT)


def join(header: dict, more: str) -> str:
    """The JSON of a header whose keys and values are text already."""
    parts = [f"{k}:{join(v, '') if isinstance(v, dict) else v}" for k, v in header.items()]
    return "{" + ",".join(parts + [more] * bool(more)) + "}"


class Body(bytes):
    """Bytes that are not shown by the megabyte when they have found a defect."""

    def __repr__(self):
        return super().__repr__() if len(self) < 5000 else f"<{len(self)} bytes: {self[:500]!r} ...>"


@st.composite
def bodies(draw) -> tuple[Body, bool]:
    """A body, and whether its header is that of a client."""
    layers, lens = draw(LAYER), [1 + n % (MAX_LENGTH // 2) for n in draw(st.binary(min_size=1, max_size=4))]
    lens, times = list(zip(lens, reversed(lens))), draw(TIMES) if layers else 0
    if "values" in layers and draw(WHAT) > 2:
        lens[-1:], times = [draw(ROW)] * draw(WHAT), times - 1
    count = max(0, (sum(map(sum, lens)) + 2**31) % 2**32 - 2**31)  # as a sum in 32 bits, to be found out
    ids = [i % VOCAB_SIZE for i in draw(st.binary(min_size=count, max_size=count))]  # one draw is quicker than many
    arrays = {"tokens": ids, "prompt_lens": [p for p, _ in lens], "completion_lens": [c for _, c in lens]}
    for _ in range(times * ("values" in layers)):
        damage_values(draw, arrays)
    infos = {name: ("I32", [len(values)], np.array(values, "<i4")) for name, values in arrays.items()}
    for _ in range(times * ("tensors" in layers)):
        damage_tensors(draw, infos)

    header, data = {}, b""
    for name, (dtype, shape, values) in infos.items():
        end = len(data) + values.nbytes
        info = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
        header[json.dumps(name)] = {json.dumps(key): json.dumps(value) for key, value in info.items()}
        data += values.tobytes()
    for _ in range(times * ("header" in layers)):
        damage_header(draw, header)
    more = draw(MORE) if "more" in layers else ""
    if more in NAMES:  # a tensor twice
        more = f"{json.dumps(more)}:{draw(TEXT)}"
    text = join(header, more).encode()
    if "random header" in layers:
        text = draw(NOISE)
    body = bytearray(struct.pack("<Q", len(text)) + text + data)
    if "random body" in layers:
        body[:] = draw(NOISE)
    for _ in range(times * ("bytes" in layers)):
        damage_bytes(draw, body)
    return Body(body), {*layers} <= {"values", "tensors"}


# ------------------------------------------------------------------------------------------------- the run


def fuzz(cases: int, first_seed: int = 0) -> Counter:
    """How many of so many cases had which outcome; an exception with the smallest case if one is a defect."""
    outcomes = Counter()

    for start in range(0, cases, BATCH):

        @seed(first_seed + start // BATCH)
        @settings(
            max_examples=min(BATCH, cases - start),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(bodies())
        def batch(case):
            outcomes[check(*case)] += 1

        batch()
    return outcomes


def main(cases: int = 100_000, first_seed: int = 0) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    outcomes = fuzz(cases, first_seed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
    print(f"{outcomes.total()} cases from seed {first_seed}: {kinds}, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
