"""The tables of docs/reference/request-fields.md name every field, and say what the code does.

`request_fields.json` has the fields, each with values that are not its default.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ingine.producer.openai.batch_format import Line, parse_line
from ingine.producer.submission import build_submission
from ingine.sampling_params import SamplingParams
from tests.docs.tables import table

FIELDS: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("request_fields.json").read_text()
)
VLLM, CHAT, COMPLETIONS = FIELDS
BODIES = {
    CHAT: ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
    COMPLETIONS: ("/v1/completions", {"model": "m", "prompt": "hi"}),
}


def rows(heading: str) -> dict[str, dict[str, str]]:
    return {row["field"]: row for row in table("docs/reference/request-fields.md", heading)}


@pytest.mark.parametrize("heading", FIELDS)
def test_every_field_has_a_row_with_a_reason(heading):
    of_fields = rows(heading)
    assert of_fields.keys() == FIELDS[heading].keys()
    assert {row["ingine"] for row in of_fields.values()} <= {"taken", "refused", "ignored"}
    assert not [
        name
        for name, row in of_fields.items()
        if row["ingine"] != "taken" and not row["what it does, or why not"]
    ]


@pytest.mark.parametrize("name", FIELDS[VLLM])
def test_a_sampling_parameter_of_vllm_is_what_its_row_says(name):
    fields = FIELDS[VLLM][name]
    if name == "logit_bias":
        fields = {name: {int(token_id): bias for token_id, bias in fields[name].items()}}
    says = rows(VLLM)[name]["ingine"]
    if says == "refused":
        with pytest.raises(ValidationError) as refused:
            SamplingParams(**fields)
        assert [fault["loc"][0] for fault in refused.value.errors()] == [name]
    else:
        given = SamplingParams(**fields).given()
        assert given.keys() == ({name} if says == "taken" else set())


def parse(heading: str, fields: dict[str, Any]) -> Line:
    url, body = BODIES[heading]
    line = {"custom_id": "a", "url": url, "body": body | fields}
    return parse_line(1, json.dumps(line).encode(), model=None, known_ids=set())


@pytest.mark.parametrize(("heading", "name"), [(h, name) for h in BODIES for name in FIELDS[h]])
def test_a_field_of_a_body_is_what_its_row_says(heading, name):
    says = rows(heading)[name]["ingine"]
    plain, line = parse(heading, {}), parse(heading, FIELDS[heading][name])
    if says == "refused":
        assert line.refusal.code == "unsupported_parameter" and line.refusal.param == name
    else:
        assert line.refusal is None
        build_submission(**line.arguments)
        changes = (line.arguments, line.echo) != (plain.arguments, plain.echo)
        assert changes == (says == "taken")
