"""The shape of `structured_outputs`, from Python and on the wire."""

import json

import pytest
from pydantic import ValidationError

from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.errors import ErrorCode, InvalidJob
from ingine.sampling_params import SamplingParams
from ingine.structured_outputs import KINDS, MAX_CHOICES, MAX_GRAMMAR_BYTES, StructuredOutputsParams
from tests.test_wire import job

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}
GIVEN = {
    "json": SCHEMA,
    "json_object": True,
    "regex": "a+",
    "choice": ["a", "b"],
    "grammar": 'start: "a"',
    "structural_tag": {"structures": [], "triggers": []},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_goes_over_the_wire_and_stays_what_it_is(kind):
    params = SamplingParams(structured_outputs={kind: GIVEN[kind]})
    assert params.structured_outputs.kind == kind
    sent = encode_job(Job(id="a", prompt="x", sampling=params))
    assert decode_job(sent).sampling == params
    assert SamplingParams(**params.given()) == params


def test_a_schema_as_a_map_is_kept_as_text_in_its_order():
    """Properties come in the order of the schema."""
    as_map, as_text = (
        SamplingParams(structured_outputs={"json": schema})
        for schema in (SCHEMA, json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":")))
    )
    assert as_map == as_text and hash(as_map.structured_outputs) == hash(as_text.structured_outputs)
    assert as_map.given()["structured_outputs"]["json"].index('"b"') < 50


def test_vllms_neutral_values_mean_nothing():
    vllm = {name: None for name in KINDS} | {
        "regex": "a",
        "json_object": False,
        "disable_any_whitespace": False,
        "disable_additional_properties": False,
        "disable_fallback": False,
        "whitespace_pattern": None,
    }
    assert StructuredOutputsParams(**vllm).given() == {"regex": "a"}


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({}, "invalid_parameter", "exactly one of json, json_object, regex"),
        ({"json": {}, "regex": "a"}, "invalid_parameter", "not json, regex"),
        ({"json": 5}, "invalid_type", "`sampling.structured_outputs.json` must be a string"),
        ({"regex": b"a"}, "invalid_type", "not bytes"),
        ({"choice": "a"}, "invalid_type", "must be a list"),
        ({"choice": []}, "invalid_parameter", "at least 1 item"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "invalid_type", "choice"),
        ({"choice": [1]}, "invalid_type", "choice.0"),
        ({"json_object": 1}, "invalid_type", "must be true or false"),
        ({"json": {"enum": [b"a"]}}, "invalid_parameter", "cannot be written as JSON"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "invalid_parameter", f"{MAX_GRAMMAR_BYTES} is the limit"),
        ({"whitespace_pattern": "a", "json": {}}, "unknown_field", "whitespace_pattern"),
        ("json", "invalid_type", "must be a map"),
    ],
)
def test_a_wrong_shape_has_a_code_and_names_the_field(asked, code, says):
    with pytest.raises(InvalidJob) as refused:
        decode_job(job(sampling={"structured_outputs": asked}))
    assert (str(refused.value.code), says in str(refused.value)) == (code, True), str(refused.value)
    assert "sampling.structured_outputs" in str(refused.value)


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(ValidationError, match="not valid Unicode"):
        StructuredOutputsParams(regex="\ud800")


def test_a_map_of_more_entries_than_a_map_may_have_goes_as_text():
    schema = {"properties": {f"p{i}": {} for i in range(1025)}}
    with pytest.raises(InvalidJob) as refused:
        decode_job(job(sampling={"structured_outputs": {"json": schema}}))
    assert refused.value.code == ErrorCode.INVALID_SHAPE
    params = SamplingParams(structured_outputs={"json": schema})  # as the client sends it
    assert decode_job(encode_job(Job(id="a", prompt="x", sampling=params))).sampling == params
