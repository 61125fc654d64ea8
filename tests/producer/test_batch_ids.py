"""The compact set of a batch's ids is a set."""

from hypothesis import given
from hypothesis import strategies as st

from ingine.producer import batch_ids
from ingine.producer.batch_ids import IdSet

ANY_TEXT = st.text(st.characters())


@given(st.lists(ANY_TEXT), st.lists(ANY_TEXT))
def test_it_contains_what_was_added_and_nothing_else(added: list[str], others: list[str]):
    ids = IdSet()
    for text in added:
        ids.add(text)
    assert len(ids) == len(set(added))
    assert all((text in ids) == (text in added) for text in added + others)


def test_ids_of_one_bucket_are_told_apart(monkeypatch):
    monkeypatch.setattr(batch_ids, "_NUM_BUCKET_BYTES", 0)
    ids = IdSet()
    texts = [f"line-{number}" for number in range(2000)]
    for text in texts:
        assert text not in ids
        ids.add(text)
    assert len(ids) == 2000
    assert all(text in ids for text in texts)


def test_a_lone_surrogate_can_be_an_id():
    ids = IdSet()
    ids.add("\ud800")
    assert "\ud800" in ids
    assert "\ud801" not in ids
