"""Patterns of an adapter's config: matched as by PEFT, and none keeps a verb busy."""

import contextlib
import itertools
import json
import re
import secrets
import shutil
import time
import warnings

import numpy as np
import pytest
import tiny
from exposed_models import group
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_export import load_adapter, swap_onnx
from lora_export.cli import _run
from lora_export.errors import AdapterError
from lora_export.formats.reading import patterns
from lora_export.formats.reading.lora_config import pattern_values
from lora_export.formats.reading.patterns import LIMIT_S, check, fullmatch, match, within
from lora_export.formats.reading.targeting import is_targeted, unsaved

# Each doubles or squares its work with every letter of a long name, for `re` and for `regex`.
SLOW = {
    "pairs": r"(.|..)*[^\w.]",
    "words": r"([\w.]|[\w.][\w.])*[!?]",
    "nested": r"((.|..)+)+[^\w.]",
    "counted": r"((.{1,100}){1,100}){1,100}[^\w.]",
    "looking ahead": r"(?=(.|..)*[^\w.]).*",
    "optional": r"((.|..)*\.?)*[^\w.]",
}
# What hangs `re`, and is matched at once.
HANGS_RE = {"plus": r"(a+)+$", "letters": r"([a-z.]+)*!", "either": r"(x|x)*y"}
LONG = "a" * 60


def config_with(folder, **changes):
    """Copy tiny Llama's adapter, the config changed."""
    shutil.copytree(tiny.adapter("llama"), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def keyed(key, pattern):
    """Return a pattern as the config has it under a key."""
    if key in ("rank_pattern", "alpha_pattern"):
        return {key: {pattern: 4}}
    if key == "layers_pattern":
        return {key: pattern, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    return {key: pattern}


KEYS = ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]


# In front of a layer's number there are a few letters only, for which most are quick.
CASES = [
    (name, key) for key in KEYS for name in SLOW if key != "layers_pattern" or name in ("nested", "counted")
]


@pytest.fixture
def quick(monkeypatch):
    """Give all patterns of a reading a tenth of their time: these take for ever, or more than any budget."""
    monkeypatch.setattr(patterns, "LIMIT_S", LIMIT_S / 10)


@group("llama")
@pytest.mark.parametrize(("name", "key"), CASES)
def test_what_takes_too_long_is_refused_with_its_file(name, key, quick, tmp_path):
    folder = config_with(tmp_path / "a", **keyed(key, SLOW[name]))
    started = time.process_time()
    with pytest.raises(AdapterError, match="takes more than") as caught:
        load_adapter(folder)
    assert str(folder) in caught.value.message
    assert key in caught.value.message
    assert f"{SLOW[name]!r}"[1:-1] in caught.value.message
    assert caught.value.hint
    assert time.process_time() - started < 1


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("call", [match, fullmatch])
def test_one_budget_for_all_matches(name, call, quick):
    started = time.process_time()
    # 15 letters are matched in some milliseconds: none is slow for itself.
    texts = [f"{'a' * 15}.{number}" for number in range(100_000)] + [f"{LONG}.1"]
    with within("adapter 'x' (a file)"), pytest.raises(AdapterError, match=r"adapter 'x' \(a file\)"):
        all(call("rank_pattern", SLOW[name], text) is None for text in texts)
    assert time.process_time() - started < 2 * LIMIT_S + 1
    # The next one has a budget of its own.
    with within("adapter 'y'"):
        assert call("rank_pattern", r"a+(b|c)", "aab")


@pytest.mark.parametrize("name", HANGS_RE)
def test_what_hangs_re_and_need_not(name):
    started = time.process_time()
    assert not fullmatch("target_modules", HANGS_RE[name], f"{LONG}!?")
    assert time.process_time() - started < 0.5


def test_many_slow_keys_share_the_budget(quick):
    config = {"rank_pattern": {f"(.|..)*[^{number}\\w.]": 4 for number in range(50)}}
    started = time.process_time()
    with within("adapter 'x'"), pytest.raises(AdapterError, match="rank_pattern"):
        pattern_values(config, "rank_pattern", LONG)
    assert time.process_time() - started < 2 * LIMIT_S + 1


def test_what_is_honest_and_large_is_not_refused():
    """As PEFT writes it for ranks that differ: a key for each module."""
    paths = [f"model.layers.{n}.mlp.{part}_proj" for n in range(100) for part in ("gate", "up", "down")]
    for keys in (paths, [f"{re.escape(path)}(x|y)?" for path in paths]):
        config = {"rank_pattern": {key: number for number, key in enumerate(keys)}}
        with within("adapter 'x'"):
            found = [pattern_values(config, "rank_pattern", path) for path in paths]
        assert found == [[number] for number in range(len(paths))]


@pytest.mark.parametrize(
    ("keys", "paths", "says"),
    [
        # More keys than are kept compiled, for each of many modules. Compiling and matching spend one budget:
        # which of them has the last of it is the machine's affair.
        ([f"x{n}[ab]+" for n in range(5000)], 2000, "takes? more than"),
        ([f"x{n}[ab]" for n in range(5000)], 2000, "takes? more than"),
        (["x" * n for n in range(4000)], 2000, "more than 5000000 times"),
    ],
)
def test_matches_of_many_keys_count(keys, paths, says):
    config = {"rank_pattern": dict.fromkeys(keys, 4)}
    started = time.process_time()
    texts = [f"l.{number}.q" for number in range(paths)]
    with within("adapter 'x'"), pytest.raises(AdapterError, match=says):
        all(not pattern_values(config, "rank_pattern", text) for text in texts)
    assert time.process_time() - started < 4


def test_the_number_of_keys_counts(monkeypatch):
    monkeypatch.setattr(patterns, "_MOST_PATTERNS", 1000)
    for number, refusal in ((1000, contextlib.nullcontext()), (1001, pytest.raises(AdapterError))):
        config = {"rank_pattern": dict.fromkeys((f"x{n}[ab]+" for n in range(number)), 4)}
        with within("adapter 'x'"), refusal as caught:
            assert not pattern_values(config, "rank_pattern", "l.0.q")
    assert "is one of more than 1000" in caught.value.message


def test_what_is_only_compiled_counts(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_S", 0.2)
    monkeypatch.setattr(patterns, "_MOST_GRANTED_S", 0.4)
    config = {"rank_pattern": {f"{n}" * 9000 + "(a)": 4 for n in range(600)}}
    started = time.process_time()
    with within("adapter 'x'"), pytest.raises(AdapterError, match="to compile"):
        pattern_values(config, "rank_pattern", "l.0.q")
    assert time.process_time() - started < 3


@pytest.mark.parametrize("key", ["x{}(a|b)+", "x{}[ab]"], ids=["limited", "plain re"])
def test_the_time_that_a_message_names_is_what_they_had(key, monkeypatch):
    """The clock is the test's: each call of it is a millisecond later than the one before."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(patterns.time, "thread_time", lambda: next(ticks) / 1000)
    config = {"rank_pattern": dict.fromkeys(map(key.format, range(4200)), 4)}
    with within("adapter 'x'"), pytest.raises(AdapterError, match="takes more than") as caught:
        all(not pattern_values(config, "rank_pattern", f"l.{number}.q") for number in range(500))
    said = float(re.search(r"more than ([\d.]+) s", caught.value.message)[1])
    # Every second call of the clock ends what is measured; what is between counts once a path is done.
    assert said == pytest.approx(next(ticks) / 2000, rel=0.1)
    assert said <= 3


def test_a_key_for_each_of_many_modules_is_quick():
    paths = [f"model.layers.{n}.experts.{m}.{p}_proj" for n in range(20) for m in range(64) for p in "uvw"]
    config = {"rank_pattern": {path: number for number, path in enumerate(paths)}}
    started = time.process_time()
    with within("adapter 'x'"):
        found = [pattern_values(config, "rank_pattern", path) for path in paths]
    assert found == [[number] for number in range(len(paths))]
    assert time.process_time() - started < 3


def test_a_key_for_each_of_many_whole_paths_is_quick():
    """As they are made for a file without a config, whose ranks differ."""
    paths = [f"model-{m}.layers.{n}.{p}_proj" for m in range(3) for n in range(400) for p in "uvw"]
    config = {"rank_pattern": {"^" + re.escape(path): number for number, path in enumerate(paths)}}
    started = time.process_time()
    with within("adapter 'x'"):
        found = [pattern_values(config, "rank_pattern", path) for path in paths]
        assert not pattern_values(config, "rank_pattern", f"x.{paths[0]}")
    assert found == [[number] for number in range(len(paths))]
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:" * 24 + "a" + "){1,9}" * 24,
        "(?:" * 24 + "a" + ")+" * 24,
        "(a{1000}){1000}",
        "a{9}?" * 40_000,
        "[\\0-\uffff]" * 10_000,
        "(?i)" + "[a-z]" * 9000,
        "x" * 60_000,
        "(" + "ab|" * 30_000 + ")+",
    ],
    ids=["ranges", "plus", "squared", "many", "wide sets", "caseless sets", "long", "long and branching"],
)
@pytest.mark.parametrize("call", [match, lambda *given: check(*given[:2])], ids=["match", "check"])
def test_what_is_large_once_compiled_is_refused_before(pattern, call):
    """Twenty repeats inside one another take ``regex`` a gigabyte; no time limit ends a compilation."""
    started = time.process_time()
    with within("adapter 'x'"), pytest.raises(AdapterError, match="rank_pattern"):
        call("rank_pattern", pattern, "a")
    assert time.process_time() - started < 0.5


def test_what_repeats_write_out_counts_together():
    config = {"rank_pattern": {f"(ab{n}){{900}}": 4 for number in range(500) for n in (number,)}}
    with within("adapter 'x'"), pytest.raises(AdapterError, match="once repeats are written out"):
        pattern_values(config, "rank_pattern", "l.0.q")


MANY = [f"q{number}" for number in range(200_000)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": [*MANY, "q_proj"]}, None),
        ({"exclude_modules": MANY}, None),
        ({"layers_to_transform": list(range(200_000))}, None),
        ({"target_parameters": [f"{name}.w" for name in MANY]}, None),
        ({"target_parameters": MANY}, "target_parameters"),
        ({"target_parameters": [f"q_proj.{name}" for name in MANY]}, "target_parameters"),
        ({"modules_to_save": MANY}, "modules_to_save"),
        ({"trainable_token_indices": {name: [1] for name in MANY}}, "trainable_token_indices"),
        ({"use_bdlora": {"nblocks": 1, "target_modules_bd_a": MANY}}, "target_modules_bd_a"),
    ],
)
def test_lists_of_many_names_are_looked_up_or_refused(changes, says, tmp_path):
    """Comparing each with each of 1000 modules takes minutes."""
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.parent.mkdir()
    front = "base_model.model.model.layers"
    sizes = {"A": (1, 2), "B": (2, 1)}
    save_file(
        {
            f"{front}.{n}.q_proj.lora_{part}.weight": np.ones(shape, np.float32)
            for n in range(1000)
            for part, shape in sizes.items()
        },
        file,
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (file.parent / "adapter_config.json").write_text(json.dumps(config | changes))
    started = time.process_time()
    with pytest.raises(AdapterError) if says else contextlib.nullcontext() as caught:
        load_adapter(file.parent)
    assert time.process_time() - started < 4
    assert not says or says in str(caught.value.problems)


def test_modules_to_save_are_found_as_plain_ends():
    known = ["model.score.weight", "model.lm_head.dense.weight", "x.weight"]
    config = {"modules_to_save": ["score", "head", "none", "model.score"]}
    assert unsaved(config, [], known) == ["score", "head", "model.score"]
    assert unsaved(config, ["model.score.weight"], known) == ["head"]


_SPECIAL = ["a+", "(", "^a", "^a.b", r"^a\.b", r"a\-b", r"^\.", "a|b"]
KEY_LETTERS = st.text("ab.", min_size=1, max_size=5)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    keys=st.lists(
        st.one_of(
            KEY_LETTERS,
            KEY_LETTERS.map(re.escape),
            st.sampled_from(_SPECIAL),
        )
    ),
    path=st.text("ab.-\n", min_size=1, max_size=7),
)
def test_keys_are_found_as_peft_finds_them(keys, path):
    """`get_pattern_key` of ``peft.utils.other``, for all keys that match."""
    config = {"rank_pattern": {key: number for number, key in enumerate(keys)}}
    wanted = []
    for key, value in config["rank_pattern"].items():
        with contextlib.suppress(re.error):
            if re.match(rf"(.*\.)?({key})$", path):
                wanted.append(value)
    if not wanted and path in config["rank_pattern"]:
        wanted = [config["rank_pattern"][path]]
    assert pattern_values(config, "rank_pattern", path) == wanted


@group("llama")
@pytest.mark.parametrize("key", ["rank_pattern", "target_modules"])
def test_each_verb_ends(key, quick, tmp_path, capsys):
    adapter = config_with(tmp_path / "a", **keyed(key, SLOW["words"]))
    base, graph = tiny.checkpoint("llama"), tiny.base_onnx("llama", "dynamo")
    given = ["--adapter", adapter]
    swap_onnx(graph, tmp_path / "for.onnx", adapter=tiny.adapter("llama"))
    verbs = [
        ["inspect", adapter],
        ["merge", "--base", base, *given, "-o", tmp_path / "m"],
        ["merge-onnx", "--base", base, *given, "-o", tmp_path / "c.onnx"],
        ["merge-onnx", "--base", graph, *given, "-o", tmp_path / "m.onnx"],
        ["swap-onnx", "--base", graph, *given, "-o", tmp_path / "s.onnx"],
        ["bank-onnx", "--base", graph, "--adapter", f"a={adapter}", "-o", tmp_path / "b.onnx"],
        ["convert-adapter", adapter, "--for", tmp_path / "for.onnx", "-o", tmp_path / "c.safetensors"],
        ["parity", "--reference", base, "--candidate", graph, *given],
    ]
    for verb in verbs:
        started = time.process_time()
        assert _run([str(word) for word in verb], False) == 1, verb
        assert time.process_time() - started < 4, verb
        error = capsys.readouterr().err
        assert str(adapter) in error
        assert key in error
        assert "takes more than 0.1 s" in error


# --- the meaning is that of re -----------------------------------------------------------------------

TEXTS = st.text("ab.1_[]{}:-e<=&|~^ \n", max_size=12)
PIECES = st.one_of(
    st.sampled_from(
        ["a", "b", r"\.", ".", r"\d", r"\w", "_", r"\[", r"\\", "^", "$", r"\b", r"\{", "e", "1"]
    ),
    st.sampled_from(
        ["{e<=1}", "{e}", "{i}", "{1e}", "{", "{}", "{,}", "{ 1}", "{1 }", "}", "]", ":", "&&", "||", "~~"]
    ),
    st.sampled_from(
        ["[[:alpha:]]", "[[a]", "[^[]", "[]a]", "[^]a]", "[a&&b]", "[a||b]", "[a--b]", "[a~~b]", r"[\]a]"]
    ),
    st.sampled_from(
        ["(?#[{e})", "(?:a)", "(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?>a)", "(?P<n>a)", "(?i:A)", "(?a)"]
    ),
    st.sampled_from(
        [
            r"\N{LATIN SMALL LETTER A}",
            r"\N{FULL STOP}",
            r"[\N{RIGHT SQUARE BRACKET}b]",
            r"\N",
            r"\N{no}",
            r"[_\N{HYPHEN-MINUS}1]",
            r"\\N{1}",
        ]
    ),
    st.sampled_from(
        ["{2}", "{1,2}", "{,2}", "{0,}", "*", "+", "?", "*?", "+?", "??", "*+", "|", "(", ")", r"(a|b)"]
    ),
)
PATTERNS = st.lists(PIECES, max_size=8).map("".join)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pattern=PATTERNS, text=TEXTS, prefixed=st.booleans())
def test_the_same_as_re(pattern, text, prefixed):
    pattern = rf"(.*\.)?({pattern})$" if prefixed else pattern
    for ours, theirs in ((match, re.match), (fullmatch, re.fullmatch)):
        try:
            expected = theirs(pattern, text)
        except re.error:
            with pytest.raises(re.error):
                ours("k", pattern, text)
            continue
        found = ours("k", pattern, text)
        assert (found and (found.span(), found.groups())) == (
            expected and (expected.span(), expected.groups())
        )


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "(?:" * 300 + "a" + "){1,9}" * 300])
def test_what_is_nested_too_deeply(pattern):
    with pytest.raises((re.error, AdapterError)):
        match("rank_pattern", pattern, "a")


@pytest.mark.parametrize("pattern", ["a|" * 60_000, "(?x)a | b # {e}"])
def test_what_no_limit_can_hold(pattern):
    with pytest.raises(AdapterError, match="rank_pattern"):
        match("rank_pattern", pattern, "a")


GROUPS = st.recursive(
    st.sampled_from(["a", "b", "q", r"\1", r"\2", "(?P<n>b)", "(?P=n)", "(?(2)a|q)", "(?(1)b)"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.tuples(inner, inner).map("|".join),
        inner.map("({})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}"])).map(
            lambda two: "({}){}".format(*two)
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pattern=GROUPS, text=st.text("abq", max_size=5))
@example(pattern="((a)|b(?(2)a|q))*", text="aba")
@example(pattern="(?:(a)|b(?(1)a|q))+", text="aba")
def test_groups_that_a_pattern_refers_to(pattern, text):
    """As `re`, or refused where a group is repeated: the two packages differ there."""
    try:
        expected = re.fullmatch(pattern, text)
    except re.error:
        assume(False)
    if re.search(r"\\\d|\(\?\(|P=", pattern) and re.search(r"\)[*+{]", pattern):
        with pytest.raises(AdapterError, match="refers to a group"):
            fullmatch("rank_pattern", pattern, text)
    else:
        assert bool(fullmatch("rank_pattern", pattern, text)) == bool(expected)


@pytest.mark.parametrize(
    "pattern", [r"(a)\1", r"(?P<n>a|b)(?P=n)", r"(a)?(?(1)b|q)", r"(\))\1*", "(a)[)*]\\1+"]
)
def test_references_without_a_repeated_group_are_matched(pattern):
    for text in map("".join, itertools.product("ab)q*", repeat=3)):
        for own in (text[:2], text):
            assert bool(fullmatch("k", pattern, own)) == bool(re.fullmatch(pattern, own))


@pytest.mark.parametrize("pattern", ["[[a]b", "[a&&b]", "[+--]", "[a~~b]c*", "[[a]b]*", "[a||b]+"])
def test_compilers_warn_nobody(pattern):
    text = f"({pattern})q{secrets.token_hex(4)}"  # in no cache
    with pytest.warns(FutureWarning):
        re.compile(text)
    re.purge()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        match("rank_pattern", text, "a")
        check("rank_pattern", f"{text}x")
    assert not said


@pytest.mark.parametrize("pattern", ["(lay)ers", "(x)?layers", r"(\d)layers"])
def test_a_layers_pattern_with_a_group_of_its_own(pattern):
    """PEFT takes the first group for the number, and stops where it is none; so no layer is meant."""
    config = {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": pattern}
    assert not is_targeted(config, "model.layers.0.q")
    assert is_targeted(config | {"layers_pattern": "layers"}, "model.layers.0.q")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        (r"\N{LATIN SMALL LETTER Q}", "a.q"),
        (r"\N{LATIN SMALL LETTER Q}{2}", "a.qq"),
        (r"(\N{LATIN SMALL LETTER Q}|k)+", "a.kq"),
        (r"[\N{RIGHT SQUARE BRACKET}\N{LATIN SMALL LETTER K}]+", "a.k]"),
        (r"[a\N{HYPHEN-MINUS}z]+", "a-z"),
        (r"a\N{FULL STOP}q?", "axq"),
        (r"\\N{2}", r"\NN"),
    ],
)
def test_a_character_by_its_name(pattern, path):
    expected = bool(re.match(rf"(.*\.)?({pattern})$", path))
    assert bool(pattern_values({"alpha_pattern": {pattern: 4}}, "alpha_pattern", path)) == expected
