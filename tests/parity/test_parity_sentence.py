"""The sentence that a parity check begins with: what is wrong in everyday words, wherever it is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import broken_exports as broken
import numpy as np
import parity_reports
import pytest
import tiny

from lora_export import Adapter
from lora_export.parity import sentence as sentences
from lora_export.parity.check import check_parity
from lora_export.parity.result import (
    Generated,
    Localisation,
    OutputMetrics,
    ParityReport,
    Verdict,
)
from lora_export.parity.sentence import failure_sentence, sentence
from lora_export.reports.files import content
from lora_export.reports.parity.to_junit import junit_xml
from lora_export.reports.parity.to_text import check_lines
from lora_export.reports.parity.words import verdict_line

QUICK: dict[str, Any] = {"samples": 2, "batches": (2,), "sequences": (5,), "localise": False}


def verdict(kind: Any, name: str, state: str = "sql", output: str = "logits", **changes: Any) -> Verdict:
    return dataclasses.replace(
        Verdict(kind=kind, name=name, state=state, output=output, value=0.5, limit=0.05, passed=False),
        **changes,
    )


def report(
    *failed: Verdict,
    applied: float | None = None,
    error: float | None = None,
    own: float = 1e-6,
    **changes: Any,
) -> ParityReport:
    """A report of one adapter, with a scaling of 4, in which only these verdicts failed."""
    row = OutputMetrics(
        state="sql",
        output="logits",
        max_abs=0.0,
        mean_abs=0.0,
        relative=0.1,
        worst_position=0.1,
        cosine=1.0,
        own_relative=own,
        effect=0.2,
        error_over_effect=error,
        applied=applied,
    )
    fields = {
        "verdicts": (verdict("finite", "finite", output="", passed=True), *failed),
        "metrics": (row,),
        "adapters": ({"name": "sql", "sha256": "", "modules": 4, "scaling": [4.0, 4.0]},),
        "generated": (),
    }
    return parity_reports.good(**(fields | changes))


APPLIED, EFFECT = verdict("effect", "adapter applied"), verdict("effect", "error / effect", value=0.31)
ERROR = verdict("error", "relative error", value=0.046, limit=0.0012)
SCALING = (
    "FAILED: the export does 49 % of what the adapter should; its scaling looks like 2 instead of 4 (alpha "
    "changed after the export?). Export again."
)
BEGINS = Localisation(state="sql", module="layers.7.v_proj")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (report(APPLIED, EFFECT, ERROR, applied=0.49, error=0.515), SCALING),
        (
            report(APPLIED, applied=0.81, error=0.2),
            "does 81 % of what the adapter should; its scaling looks like about 3.24 instead of 4",
        ),
        (
            report(APPLIED, applied=1.99, error=1.0),
            "does 199 % of what the adapter should; its scaling looks like 8 instead of 4 (merged twice",
        ),
        (
            report(APPLIED, applied=0.001, error=1.0),
            "does nothing of what the adapter should (it was left out?)",
        ),
        (
            report(APPLIED, applied=-0.7, error=17.0),
            "does something else than the adapter should (another adapter",
        ),
        (
            report(APPLIED, applied=0.9, error=0.4, localisation=BEGINS),
            "what the adapter should, and other things besides; the error begins at layers.7.v_proj. E",
        ),
        (report(APPLIED, applied=math.nan, error=math.nan), "doesn't do what the adapter should"),
        (report(APPLIED, metrics=()), "doesn't do what the adapter should"),
        (
            report(EFFECT, ERROR, localisation=BEGINS),
            "is off by 31 % of what the adapter does; the error begins at layers.7.v_proj. Export",
        ),
        (
            report(EFFECT, own=0.15),
            "can't be shown that the export does what the adapter should. Check an export in float32",
        ),
        (
            report(ERROR),
            "with the adapter the export's output logits is off by 4.6 %, where rounding explains 0.12 %",
        ),
        (report(verdict("error", "worst position", value=2.0)), "off by 200 % at its worst position"),
        (
            report(verdict("error", "tolerance", value=3.2, limit=1.0)),
            "off by 3.2 times what the tolerance allows",
        ),
        (
            report(verdict("error", "relative error", "no adapter"), APPLIED, applied=0.5, error=0.5),
            "even without an adapter the export's output logits is off by 50 %",
        ),
        (
            report(verdict("error", "relative error", "no adapter"), adapters=()),
            "FAILED: the export's output logits is off by 50 %, where rounding explains 5 %. Export again.",
        ),
        (
            report(verdict("finite", "finite", value=3.0), APPLIED),
            "NaN or infinite (float16 can't hold what this model computes?). Export in float32 or bfloat16.",
        ),
        (
            report(verdict("finite", "finite"), candidate={"dtype": "float32"}),
            "NaN or infinite. Check the weights",
        ),
        (
            report(verdict("error", "not compared", "everything", value=math.nan, limit=math.inf)),
            "has no output logits, which the reference returns",
        ),
        (
            report(verdict("error", "not compared", output="", value=math.nan, limit=math.inf)),
            "every position is padding",
        ),
        (
            report(verdict("effect", "adapter applied", value=math.nan, limit=math.inf, counted=False)),
            "the adapter changes nothing on these inputs (was it trained?)",
        ),
        (
            report(
                verdict("tokens", "greedy tokens"),
                generated=(
                    Generated(state="sql", prompt=(1,), reference=(2, 3, 4), candidate=(2, 3, 5), equal=2),
                ),
            ),
            "writes another text than the reference, from token 3 on",
        ),
        (report(verdict("law", "A→B→A")), "an adapter leaves something behind"),
        (
            report(verdict("law", "mixed batch: adapter applied", "a, b")),
            "rows of one batch don't each get their own adapter",
        ),
        (
            report(verdict("law", "permuted rows: relative error", "a, b")),
            "depends on its place in the batch",
        ),
        (report(verdict("law", "row alone: worst position", "a, b")), "another answer by itself"),
        (report(verdict("law", "of a later version")), "of a later version is not as it should be"),
        (report(verdicts=()), "FAILED: nothing was proven"),
        (
            report(verdicts=(verdict("effect", "adapter applied", passed=True, counted=False),)),
            "FAILED: nothing was proven",
        ),
        (
            report(verdict("effect", "error / effect", passed=True, value=5e-4)),
            "PASSED: the export does what the adapter should; it is off by 0.05 % of the effect.",
        ),
        (
            report(verdict("effect", "error / effect", passed=True, value=5e-7)),
            "off by less than 0.01 % of the effect.",
        ),
        (
            report(verdict("error", "relative error", passed=True, value=0.002), adapters=()),
            "PASSED: the export computes what the reference does; it is off by 0.2 %.",
        ),
        (
            report(verdict("error", "relative error", passed=True, value=0.002)),
            "How much of that is the adapter's was not measured.",
        ),
    ],
)
def test_each_verdict_has_its_sentence(found: ParityReport, said: str) -> None:
    assert said in sentence(found)
    assert sentence(found).startswith("PASSED: " if found.passed else "FAILED: ")
    assert sentence(found).endswith(".")


def test_of_several_adapters_it_names_the_one() -> None:
    one = report(APPLIED, applied=0.49, error=0.515)
    two = dataclasses.replace(one, adapters=(*one.adapters, {**one.adapters[0], "name": "other"}))
    assert sentence(two) == SCALING.replace("the adapter", "the adapter sql")
    mixed = dataclasses.replace(one, adapters=({**one.adapters[0], "scaling": [1.0, 4.0]},))
    assert "its scaling looks like 0.5 times what it should be" in sentence(mixed)


def test_what_explains_the_others_is_said_whatever_the_order() -> None:
    failed = (ERROR, EFFECT, APPLIED, verdict("tokens", "greedy tokens"))
    for order in itertools.permutations(failed):
        assert sentence(report(*order, applied=0.49, error=0.515)) == SCALING


def test_hostile_names_make_one_harmless_line() -> None:
    for found in (parity_reports.hostile(), *map(parity_reports.named, parity_reports.HOSTILE)):
        assert sentence(found).isprintable()
        assert all(line.isprintable() for line in str(found).splitlines())
    long = report(
        verdict("error", "relative error", output="x" * 5000),
        localisation=Localisation(state="sql", module="y" * 5000),
    )
    assert len(sentence(long)) < 500


# --- where it is read ---------------------------------------------------------------------------------------

REPORTS = {
    "good": parity_reports.good,
    "failed": parity_reports.failed,
    "nothing": lambda: report(verdicts=()),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_it_is_first_everywhere_and_the_numbers_follow(kind: str) -> None:
    found = REPORTS[kind]()
    said = sentence(found)
    text = check_lines(found)
    assert (text[0], text[-1]) == (said, verdict_line(found))
    assert " ".join(check_lines(found, cut=True)).startswith(said)
    assert str(found).splitlines()[0] == said
    assert len(str(found)) < 2000
    assert found.candidate["path"] in str(found)
    page, markdown = (content("parity", found, ending).decode("utf-8") for ending in ("html", "md"))
    big, _, rest = said.partition(": ")
    assert re.search(rf"<h1>{big}</h1><p>{re.escape(rest.replace(chr(39), '&#x27;'))}</p>", page)
    assert markdown.startswith(f"# {big}\n")


def test_junit_says_it_for_every_failure_of_a_state() -> None:
    other = verdict("law", "permuted rows: relative error", "a, b")
    found = report(ERROR, APPLIED, EFFECT, other, applied=0.49, error=0.515)
    messages: dict[str, list[str]] = {}
    for suite in ElementTree.fromstring(junit_xml(found)):
        messages[str(suite.get("name"))] = [str(f.get("message")) for f in suite.iter("failure")]
    assert messages == {"sql": [SCALING] * 3, "a, b": [failure_sentence(found, [other])]}
    assert sentence(found) == SCALING


# --- exports that are wrong ---------------------------------------------------------------------------------


def scaled(factor: float) -> broken.Damage:
    """Another alpha than the adapter has now."""

    def damage(adapter: Adapter) -> Adapter:
        modules = {
            name: dataclasses.replace(module, alpha=module.alpha * factor)
            for name, module in adapter.modules.items()
        }
        return dataclasses.replace(adapter, modules=modules)

    return damage


def merged(damage: broken.Damage, folder: Path, strength: float = 1, **options: Any) -> ParityReport:
    good = broken.adapter("llama", strength=strength)
    candidate = broken.export("merged", broken.base("llama"), {"a": damage(good)}, folder)
    return check_parity(tiny.checkpoint("llama"), candidate, {"a": good}, **(QUICK | options))


@pytest.mark.xdist_group("parity-llama")
@pytest.mark.parametrize(
    ("damage", "strength", "said"),
    [
        (scaled(0.5), 1, r"does (4[5-9]|5[0-5]) % of .*looks like 1 instead of 2 \(alpha"),
        (scaled(0.25), 0.05, r"does 25 % of .*looks like 0.5 instead of 2 \(alpha"),
        (broken.doubled, 0.05, r"does (19\d|200) % of .*looks like 4 instead of 2 \(merged twice"),
        (broken.not_applied, 1, "does nothing of what the adapter should"),
    ],
)
def test_a_wrong_export_is_said_to_be_what_it_is(
    damage: broken.Damage, strength: float, said: str, tmp_path: Path
) -> None:
    found = merged(damage, tmp_path, strength)
    assert re.search(said, sentence(found)), sentence(found)
    # The share is that of the verdict.
    row = next(m for m in found.metrics if m.output == "logits")
    (applied,) = [v.value for v in found.failed if v.name == "adapter applied"]
    assert row.applied is not None
    np.testing.assert_allclose(abs(row.applied - 1), applied)


@pytest.mark.xdist_group("parity-llama")
def test_a_module_that_is_dropped_is_no_wrong_scaling(tmp_path: Path) -> None:
    module = "model.layers.1.mlp.up_proj"
    found = merged(broken.without(module), tmp_path, localise=True)
    assert "scaling" not in sentence(found)
    assert f"the error begins at {module}" in sentence(found)


@pytest.mark.xdist_group("parity-llama")
def test_every_check_of_a_bank_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    adapters = {name: broken.adapter("llama", seed=seed, name=name) for seed, name in enumerate("ab")}
    candidate = broken.export("bank", broken.base("llama"), adapters, tmp_path)
    found = check_parity(tiny.checkpoint("llama"), candidate, adapters, **(QUICK | {"batches": (1, 3)}))
    assert found.passed
    assert sentence(found).startswith(
        "PASSED: the export does what each of the 2 adapters should; it is off by"
    )
    names = {v.name.partition(":")[0] for v in found.verdicts}
    assert {"A→B→A", "mixed batch", "permuted rows", "row alone"} <= names
    for one in found.verdicts:
        failed = dataclasses.replace(one, passed=False)
        assert sentences._place(failed) < len(sentences._ORDER) - 1, failed
