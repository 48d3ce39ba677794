"""What is said about refusals: never what was given, never twice, and no kind is left without an answer."""

from itertools import combinations
from typing import get_args

import pytest

from lora_export.base.planning.hints import BY_VALUE, Into, Situation, Verb, hints_of
from lora_export.errors import SiteError
from lora_export.plan import RefusalKind, refuse

KINDS = get_args(RefusalKind)
VERBS = get_args(Verb)
PLACES = ("folder", *VERBS, "swap graph", "bank graph")


@pytest.mark.parametrize("into", PLACES)
def test_each_hint_is_said_once_and_none_is_empty(into):
    assert set(PLACES) == {name for arg in get_args(Into) for name in (get_args(arg) or (arg,))}
    for kinds in map(set, combinations(KINDS, 2)):
        for checked in (False, True):
            hints = hints_of(kinds, Situation(into=into, checked=checked, some=True, parting="part them"))
            assert len(hints) == len(set(hints))
            assert all(hints)
            assert not any("{" in hint for hint in hints)


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_that_was_given_is_not_asked_for(verb):
    for kind in KINDS:
        hints = hints_of({kind}, Situation(into=verb, checked=True))
        assert not any("give --checkpoint" in hint for hint in hints), kind


@pytest.mark.parametrize("kind", ["not found", "nameless"])
def test_values_are_asked_for_first_unless_a_part_has_to_be_named(kind):
    alone = hints_of({kind}, Situation(into="swap-onnx", checked=False))
    assert alone == [BY_VALUE]
    other = hints_of({kind}, Situation(into="swap-onnx", checked=False, given=["rename them"]))
    assert other == [BY_VALUE, "rename them"]
    part = Situation(into="swap-onnx", checked=False, given=["give --component unet"], tells_part=True)
    assert hints_of({kind}, part) == ["give --component unet"]


def test_what_is_known_to_help_takes_the_place_of_guesses():
    for kind in ("ambiguous", "not found"):
        known = hints_of({kind}, Situation(into="merge-onnx", given=["do this"]))
        assert known == ["do this"]
    assert hints_of({"not exposed"}, Situation(into="bank graph")) == [
        "make the graph again with this adapter (bank-onnx --adapter)"
    ]
    assert hints_of({"not exposed"}, Situation(into="bank graph", given=["do this"])) == ["do this"]


@pytest.mark.parametrize(
    ("into", "words"), [("folder", "merges the others"), ("swap graph", "convert-adapter")]
)
def test_the_way_on_without_some_is_said_last(into, words):
    some = hints_of({"shape"}, Situation(into=into, some=True))
    assert words in some[-1]
    assert some[:-1] == hints_of({"shape"}, Situation(into=into, some=False))


def test_a_refusal_lists_all_and_each_hint_once():
    with pytest.raises(SiteError) as caught:
        refuse("adapter 'a'", "m.onnx", ["x  gone", "y  gone"], ["one", "", "one", "two"], count=2, total=5)
    assert caught.value.message == "adapter 'a' has 2 parameters with no place in m.onnx (of 5)"
    assert caught.value.hint == "one; two"
    assert caught.value.problems == ("x  gone", "y  gone")
