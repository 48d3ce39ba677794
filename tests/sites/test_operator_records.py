"""What the records of operators say of themselves holds together, and is what ONNX's own schemas say."""

import onnx_ir as ir
import pytest
from onnx import defs

from lora_export.sites import OPERATORS, operator_named, operator_of

RECORDS = [(domain, name, operator_of(domain, name)) for domain, name in OPERATORS]
INPUTS = 24


def operands(domain, name, record):
    inputs = [ir.Value(name=f"in{number}") for number in range(INPUTS)]
    return {operand.index: operand for operand in record.operands(ir.node(name, inputs, domain=domain))}


@pytest.mark.parametrize(("domain", "name", "record"), RECORDS)
def test_inputs_have_one_meaning_each(domain, name, record):
    found = operands(domain, name, record)
    assert not record.code_inputs & found.keys()
    told = {record.weight_scale, record.weight_zero} - {None}
    assert told <= record.code_inputs
    assert record.bias not in record.code_inputs
    if record.bias in found:
        assert (found[record.bias].kind, found[record.bias].parameter) == ("vector", "bias")


@pytest.mark.parametrize(("domain", "name", "record"), RECORDS)
def test_a_whole_layer_takes_a_merge_and_a_branch(domain, name, record):
    if record.weight is not None:
        operand = operands(domain, name, record)[record.weight]
        assert operand.kind in ("linear", "conv", "embedding")
        assert not operand.refusal
        assert not operand.no_branch
    if record.is_product:
        assert record.bias is None
    if record.takes_codes:
        assert record.weight is None
    if record.without_activation:
        plain = operator_of("", record.without_activation)
        assert (plain.weight, plain.bias) == (record.weight, record.bias)


@pytest.mark.parametrize("name", sorted({name for domain, name in OPERATORS if not domain}))
def test_positions_are_those_of_the_schema(name):
    record, inputs = operator_of("", name), [entry.name for entry in defs.get_schema(name).inputs]
    if record.bias is not None:
        assert inputs[record.bias] in ("B", "C")
    if record.weight_zero is not None:
        assert inputs[record.weight_zero] == "b_zero_point"
    assert all("scale" in inputs[index] or "zero_point" in inputs[index] for index in record.code_inputs)


def test_one_name_in_two_domains_has_the_same_facts():
    for domain, name, record in RECORDS:
        other = operator_named(name)
        facts = ("is_product", "is_convolution", "folds_norms", "code_inputs", "takes_codes")
        assert [getattr(record, fact) for fact in facts] == [getattr(other, fact) for fact in facts], domain


def test_what_is_not_registered_is_not_known():
    assert operator_of("", "Softmax") is None
    assert operator_named("Softmax") is None
    assert operator_of("somebody", "MatMul") is None
