"""The labels that make a container a berth."""

from __future__ import annotations

import pytest

from quicferry.host import berths
from quicferry.protocol.api import Address
from quicferry.protocol.errors import FerryError

GOOD = {
    berths.LABEL_BERTH: "a",
    berths.LABEL_SERVICE: "echo",
    berths.LABEL_PORT: "4242",
    berths.LABEL_ADDRESS: "127.0.0.1:14242",
}


def test_the_labels_are_read() -> None:
    facts = berths.facts({**GOOD, "other": "x"}, container="c" * 64, image="i" * 64, init_pid=42)
    assert (facts.name, facts.service, facts.port) == ("a", "echo", 4242)
    assert facts.address == Address(host="127.0.0.1", port=14242)


def test_ipv6_addresses_may_be_in_brackets() -> None:
    labels = {**GOOD, berths.LABEL_ADDRESS: "[fd00::2]:4242"}
    facts = berths.facts(labels, container="c", image="i", init_pid=42)
    assert facts.address == Address(host="fd00::2", port=4242)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (berths.LABEL_BERTH, "a b"),
        (berths.LABEL_BERTH, ""),
        (berths.LABEL_SERVICE, "x" * 65),
        (berths.LABEL_PORT, "0"),
        (berths.LABEL_PORT, "many"),
        (berths.LABEL_ADDRESS, "127.0.0.1"),
        (berths.LABEL_ADDRESS, "127.0.0.1:99999"),
        (berths.LABEL_ADDRESS, "localhost:4242"),
        (berths.LABEL_ADDRESS, "berth.example:4242"),
        (berths.LABEL_ADDRESS, "0.0.0.0:4242"),
        (berths.LABEL_ADDRESS, "[::]:4242"),
        (berths.LABEL_ADDRESS, "127.0.0:4242"),
    ],
)
def test_a_wrong_label_is_named_with_what_is_right(label: str, value: str) -> None:
    with pytest.raises(FerryError) as caught:
        berths.facts({**GOOD, label: value}, container="c0ffee", image="i", init_pid=42)
    assert caught.value.code == "bad_request"
    assert "c0ffee" in caught.value.message
    assert berths.LABEL_ADDRESS in caught.value.hint


def test_an_address_is_told_from_a_name() -> None:
    with pytest.raises(FerryError) as caught:
        berths.facts({**GOOD, berths.LABEL_ADDRESS: "localhost:4242"}, container="c", image="i", init_pid=42)
    assert "'localhost' is not an IP address literal" in caught.value.message
    assert "$.address" in caught.value.message
