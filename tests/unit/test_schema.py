"""The generated files are current, complete, and say what the structs say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quicferry.protocol import agents, api, control, events, handover, schema, wire
from quicferry.protocol.errors import CODES, FerryError

ROOT = Path(__file__).parents[2]
AGAIN = "run: python -m quicferry.protocol.schema shared/quicferry/schemas docs/errors.md"


def test_the_schemas_in_the_package_are_current() -> None:
    found = {
        path.name: path.read_bytes()
        for path in (resources.files("quicferry") / "schemas").iterdir()
        if path.is_file()
    }
    assert found == schema.schemas(), AGAIN


def test_the_page_of_errors_is_current() -> None:
    assert (ROOT / "docs/errors.md").read_text(encoding="utf-8") == schema.errors_page(), AGAIN


def test_the_module_writes_both(tmp_path: Path) -> None:
    folder, page = tmp_path / "new" / "schemas", tmp_path / "errors.md"
    folder.mkdir(parents=True)
    (folder / "of_old.json").write_text("{}")
    subprocess.run([sys.executable, "-m", "quicferry.protocol.schema", folder, page], check=True, timeout=60)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == schema.schemas()
    assert page.read_text(encoding="utf-8") == schema.errors_page()
    wrong = subprocess.run(
        [sys.executable, "-m", "quicferry.protocol.schema"], capture_output=True, check=False, timeout=60
    )
    assert wrong.returncode == 2
    assert b"usage" in wrong.stderr


def messages_of(module: Any) -> set[type]:
    return {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and value not in (events.Event, api.Address, api.Place, api.Options, api.MigrationStatus)
    }


def test_every_message_has_a_schema() -> None:
    known = "".join(content.decode() for content in schema.schemas().values())
    for module in (agents, api, control, events, handover):
        for message in messages_of(module):
            assert f'"#/$defs/{message.__name__}"' in known, message


@pytest.mark.parametrize("name", schema.MESSAGES)
def test_references_resolve(name: str) -> None:
    text = schema.schemas()[f"{name}.json"].decode()
    whole = json.loads(text)
    assert set(re.findall(r'"#/\$defs/(\w+)"', text)) == set(whole["$defs"])
    assert whole["$id"] == f"urn:quicferry:v1:{name}"


def test_the_schema_and_the_decoder_agree_on_names() -> None:
    """The pattern means the same to a JSON Schema validator and to us: no name carries a line end into a subject."""
    pattern = json.loads(schema.schemas()["migrate_request.json"])["$defs"]["MigrateRequest"]["properties"]["service"]
    for name, fits in {"echo": True, "a" * 64: True, "a" * 65: False, "": False, "a.b": False, "a\n": False}.items():
        assert bool(re.search(pattern["pattern"], name)) is fits
        request = json.dumps({"service": name}).encode()
        if fits:
            assert wire.decode(request, api.MigrateRequest).service == name
        else:
            with pytest.raises(FerryError):
                wire.decode(request, api.MigrateRequest)


def test_examples_in_the_documentation_are_messages() -> None:
    """Each JSON block in docs/protocol.md that is preceded by a comment naming its schema decodes as that message."""
    page = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    examples = re.findall(r"<!-- (\w+) -->\n```json\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 12
    for name, text in examples:
        kind, _ = schema.MESSAGES[name]
        for line in text.strip().splitlines():
            decoded = wire.decode(line.encode(), kind)
            shown, real = json.loads(line), json.loads(wire.encode(decoded))
            assert {key: real.get(key, shown[key]) for key in shown} == shown, name


def test_the_documentation_names_every_event_and_subject() -> None:
    page = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    for event in messages_of(events):
        assert f"`{event.__struct_config__.tag}`" in page
    for verb in ("prepare", "pre_dump", "dump", "release", "abort", "restore", "resume"):
        assert f"`{verb}`" in page


@pytest.mark.parametrize("code", CODES)
def test_an_error_travels_unchanged(code: str) -> None:
    error = FerryError(code, "A sentence.", hint="A hint.", path="$.x")
    body = wire.decode(wire.encode(api.ErrorReply(error=error.body())), api.ErrorReply).error
    again = FerryError.of(body)
    assert (again.code, again.message, again.hint, again.path) == (code, "A sentence.", "A hint.", "$.x")


@pytest.mark.parametrize(
    "kind", [agents.AgentRequest, agents.ArmRequest, handover.Adopted, control.Migrate, api.Berth]
)
def test_no_integer_is_larger_than_every_json_reader_keeps(kind: type) -> None:
    """Python's have no end: one of 400 digits fails at its first meeting with a float, far from where it came in."""
    schema_of = json.dumps(msgspec.json.schema(kind))
    assert '"type": "integer"' in schema_of
    for number in re.findall(r'\{[^{}]*"type": "integer"[^{}]*\}', schema_of):
        assert "maximum" in json.loads(number), number


def test_every_integer_of_an_event_has_an_end() -> None:
    for number in re.findall(r'\{[^{}]*"type": "integer"[^{}]*\}', json.dumps(msgspec.json.schema(events.AnyEvent))):
        assert {"minimum", "maximum"} <= json.loads(number).keys(), number


def test_a_berth_is_named_as_the_log_can_name_it() -> None:
    berth = {
        "node": "n",
        "berth": "b",
        "service": "echo",
        "address": {"host": "127.0.0.1", "port": 1},
        "port": 1,
        "occupied": True,
        "container": "",
        "image": "",
        "seen_ms": 1,
    }
    wire.decode(json.dumps(berth).encode(), api.Berth)
    for field in ("node", "berth", "service"):
        with pytest.raises(FerryError) as caught:
            wire.decode(json.dumps({**berth, field: "a.b"}).encode(), api.Berth)
        assert caught.value.path == f"$.{field}"


@pytest.mark.parametrize("host", ["localhost", "localhost:4242", "0.0.0.0", "::", "::ffff:0.0.0.0", "[::1]", "1.2.3"])
def test_an_address_is_one_that_a_client_would_go_to(host: str) -> None:
    """They refuse anything else, and the server then leaves without any of them."""
    place = {"node": "n", "berth": "b", "address": {"host": host, "port": 1}}
    with pytest.raises(FerryError) as caught:
        wire.decode(json.dumps(place).encode(), api.Place)
    assert (caught.value.code, caught.value.path) == ("bad_request", "$.address")
    assert host in caught.value.message
    # What a client hears is for its policy to refuse, with an ack.
    line = json.dumps({"type": "migrate", "id": "m1", "addr": host, "port": 1}).encode()
    assert wire.decode(line, control.Migrate).address.host == host


def test_a_refusal_is_short_whatever_it_refuses() -> None:
    with pytest.raises(FerryError) as caught:
        wire.decode(b'{"kind":"' + b"x" * 200_000 + b'"}', events.AnyEvent)
    assert len(str(caught.value)) < 300
