"""The control stream's codec: any split decodes the same, any bytes raise nothing but our own error."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quicferry.protocol import control
from quicferry.protocol.control import (
    MAX_LINE_BYTES,
    Ack,
    FromClient,
    FromServer,
    Hello,
    LineDecoder,
    Migrate,
    Moved,
    Ready,
    Rollback,
)
from quicferry.protocol.errors import FerryError

names = st.text("abcXYZ019_-", min_size=1, max_size=64)
from_client = st.one_of(
    st.builds(Hello, client=names, quiesce=st.booleans()),
    st.builds(Ack, id=names, refused=st.text(max_size=50)),
    st.builds(Ready, id=names),
    st.builds(
        Moved,
        id=names,
        source=st.sampled_from(["wrapper", "application"]),
        interruption_ms=st.floats(0, 3_600_000, allow_nan=False),
    ),
)
from_server = st.one_of(
    st.builds(
        Migrate,
        id=names,
        addr=st.sampled_from(["192.0.2.1", "2001:db8::1"]),
        port=st.integers(1, 65_535),
        epoch=st.integers(0, 10),
        quiesce_ms=st.integers(0, 1000),
    ),
    st.builds(Rollback, id=names),
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def decode(kind: object, parts: list[bytes]) -> tuple[list[Any], str]:
    """The messages, and the code of the error that ended them."""
    decoder: LineDecoder[Any] = LineDecoder(kind)
    messages = []
    for part in parts:
        try:
            for message in decoder.feed(part):
                messages.append(message)  # noqa: PERF402 - those before an error count
        except FerryError as error:
            return messages, error.code
    return messages, ""


@given(st.lists(from_client, max_size=8), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_split_of_a_clients_lines_decodes_the_same(messages: list[Any], cuts: list[int]) -> None:
    data = b"".join(control.encode(message) for message in messages)
    assert decode(FromClient, pieces(data, cuts)) == (messages, "")


@given(st.lists(from_server, max_size=8), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_split_of_a_servers_lines_decodes_the_same(messages: list[Any], cuts: list[int]) -> None:
    data = b"".join(control.encode(message) for message in messages)
    assert decode(FromServer, pieces(data, cuts)) == (messages, "")


@given(st.binary(max_size=3 * MAX_LINE_BYTES), st.lists(st.integers(0, 20_000), max_size=20))
def test_any_bytes_raise_nothing_else(data: bytes, cuts: list[int]) -> None:
    for kind in (FromClient, FromServer):
        assert decode(kind, pieces(data, cuts)) == decode(kind, [data])


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner)))
def test_any_json_that_is_no_message_is_refused(value: Any) -> None:
    messages, code = decode(FromClient, [json.dumps(value).encode() + b"\n"])
    assert (messages, code) == ([], "bad_request")


@given(
    st.dictionaries(
        st.sampled_from(["type", "id", "client", "v", "refused", "source", "interruption_ms", "addr", "port"]),
        st.one_of(st.sampled_from(["hello", "ack", "moved", "migrate"]), st.integers(), st.floats(), st.text()),
    )
)
def test_almost_messages_decode_or_are_refused(value: Any) -> None:
    for kind in (FromClient, FromServer):
        messages, code = decode(kind, [json.dumps(value).encode() + b"\n"])
        assert bool(messages) != bool(code)


@given(from_client, st.lists(st.integers(0, 300), min_size=1, max_size=3), st.binary(min_size=1, max_size=3))
def test_a_damaged_line_never_costs_more_than_itself(message: Any, places: list[int], noise: bytes) -> None:
    line = bytearray(control.encode(message))
    for place in places:
        line[place % len(line)] = noise[0]
    messages, code = decode(FromClient, [b"\n", bytes(line)])
    assert code in ("", "bad_request")
    assert all(isinstance(found, msgspec.Struct) for found in messages)


def test_the_limit_is_exact() -> None:
    frame = b'{"type":"ready","id":"a","pad":""}'
    longest = frame[:-2] + b"x" * (MAX_LINE_BYTES - len(frame)) + b'"}'
    assert len(longest) == MAX_LINE_BYTES
    assert decode(FromClient, [longest, b"\n"]) == ([Ready(id="a")], "")
    assert decode(FromClient, [longest + b" ", b"\n"]) == ([], "bad_request")
    assert decode(FromClient, [longest + b" \n"]) == ([], "bad_request")


def test_no_more_than_a_line_is_kept() -> None:
    decoder: LineDecoder[Any] = LineDecoder(FromClient)
    with pytest.raises(FerryError, match="longer than"):
        list(decoder.feed(b"x" * 10_000_000))
    assert len(decoder._buffer) == 0
    assert list(decoder.feed(b'{"type":"ready","id":"a"}\n')) == []  # after an error nothing is taken


def test_messages_before_a_bad_line_count() -> None:
    data = b'{"type":"ready","id":"a"}\n\n  \nnonsense\n{"type":"ready","id":"b"}\n'
    assert decode(FromClient, [data]) == ([Ready(id="a")], "bad_request")


def test_the_error_names_the_field() -> None:
    with pytest.raises(FerryError) as caught:
        list(LineDecoder(FromClient).feed(b'{"type":"ack","id":"no spaces"}\n'))
    assert caught.value.path == "$.id"


def test_each_side_takes_only_the_others_messages() -> None:
    assert decode(FromServer, [control.encode(Ready(id="a"))])[1] == "bad_request"
    assert decode(FromClient, [control.encode(Rollback(id="a"))])[1] == "bad_request"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"type":"hello","client":"car-7"}', Hello(client="car-7")),
        (b'{"type":"hello","client":"c","v":1,"quiesce":true,"new":{}}', Hello(client="c", quiesce=True)),
        (b'{"type":"ack","id":"m1","refused":"why"}', Ack(id="m1", refused="why")),
        (
            b'{"type":"moved","id":"m1","source":"wrapper","interruption_ms":34.1}',
            Moved(id="m1", source="wrapper", interruption_ms=34.1),
        ),
    ],
)
def test_the_documents_examples(line: bytes, message: Any) -> None:
    assert decode(FromClient, [line + b"\r\n"]) == ([message], "")
