"""docs/protocol.md names every field, code and key of the contract."""

import re

from ingine.contract.jobs import Job
from ingine.contract.keys import Keys
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.docs.tables import ROOT, table

PROTOCOL = "docs/protocol.md"


def names(rows: list[dict[str, str]], column: str) -> set[str]:
    return {name for row in rows for name in row[column].split(", ")}


def test_every_error_code():
    assert names(table(PROTOCOL, "Error codes"), "code") == {str(code) for code in ErrorCode}


def test_every_field_of_a_job():
    assert names(table(PROTOCOL, "A job"), "field") == set(Job.model_fields)


def test_every_sampling_parameter():
    text = (ROOT / PROTOCOL).read_text()
    paragraph = text[text.index("`sampling` (defaults") :].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", paragraph)) - {"sampling"}
    assert named == set(SamplingParams.model_fields)


def test_every_key():
    keys = Keys("q")
    documented = {row["key"] for row in table(PROTOCOL, "Keys")}
    expected = {
        *(f"ingine:{{q}}:{name}:high :normal :low" for name in ("jobs", "fair", "ends", "aside")),
        *(keys.delayed, keys.rate("<tenant>"), keys.bytes, keys.deadlines),
        *(keys.job("<id>"), keys.tokens("<id>"), keys.channel("<id>"), keys.replies("<name>")),
        *(keys.idem("<key>"), keys.dead, keys.workers, keys.models, keys.settings, keys.control),
    }
    assert documented == expected
