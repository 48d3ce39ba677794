"""Which shapes an engine takes: from the graph, changed by the user, and everything wrong said at once."""

import pytest

from lora_export.engines.dims import Range, sum_of_both
from lora_export.engines.profiles import ProfileRequest, make_profiles, parse_shapes, shape_text
from lora_export.errors import BackendError
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member
from lora_export.graph.port import Port
from lora_export.graph.roles import role_of


def port(name, *dims, dtype="int64"):
    return Port(name, dtype, dims)


TEXT = [port("input_ids", "batch", "sequence"), port("attention_mask", "batch", "sequence")]
CACHED = [
    port("input_ids", "batch", "sequence"),
    port("attention_mask", "batch", "total_sequence"),
    port("past_key_values.0.key", "batch", 3, "past_sequence", 64, dtype="float16"),
]


def lora(name="layer.q", members=1, groups=1):
    paths = tuple(Member(path=f"{name}.{n}", start=0, out_dim=8) for n in range(members))
    module = ExposedModule(
        name=name, kind="linear", in_dim=16, out_dim=8, dtype="float16", members=paths, groups=groups
    )
    record = LoraRecord(
        mode="swap",
        base="base.onnx",
        base_sha256="0" * 64,
        modules=(module,),
        max_rank=16,
        flavour="tensorrt",
    )
    rank = module.rank_symbol
    b_rank = rank if groups == 1 else f"{rank}/{groups}"
    return record, [port(module.lora_a, 16, rank), port(module.lora_b, b_rank, 8)]


def made(inputs, exposed=None, largest=None, **shapes):
    (profile,) = make_profiles(inputs, exposed, largest or {}, [ProfileRequest(shapes=shapes)])
    return profile.shapes


def test_text_inputs_have_usual_sizes():
    assert made(TEXT)["input_ids"] == ((1, 1), (1, 128), (4, 512))


def test_the_model_says_how_long_a_sequence_may_get():
    shapes = made(CACHED, largest={"sequence": 64, "past_sequence": 64})
    assert shapes["input_ids"][2] == (4, 64)
    assert shapes["past_key_values.0.key"] == ((1, 3, 0, 64), (1, 3, 64, 64), (4, 3, 64, 64))


def test_a_mask_is_as_long_as_past_and_sequence_together():
    shapes = made(CACHED, sequence="1:8:32", past_sequence="0:100:200")
    assert shapes["attention_mask"] == ((1, 1), (1, 108), (4, 232))


OPTIMUM = [
    port("input_ids", "batch_size", "sequence_length"),
    port("attention_mask", "batch_size", "past_sequence_length + sequence_length"),
    port("past_key_values.0.key", "batch_size", 3, "past_sequence_length", 64),
]
ONE_TOKEN = [
    port("input_ids", "batch_size", 1),
    port("attention_mask", "batch_size", "past_sequence_length + 1"),
    port("past_key_values.0.key", "batch_size", 3, "past_sequence_length", 64),
]
LETTERS = [
    port("attention_mask", "b", "p + s"),
    port("input_ids", "b", "s"),
    port("past_key_values.0.key", "b", 3, "p", 64),
]


@pytest.mark.parametrize(
    ("inputs", "shapes", "mask"),
    [
        (OPTIMUM, {"past_sequence_length": "0:4:16", "sequence_length": "1:2:3"}, (1, 6, 19)),
        (OPTIMUM, {"past_sequence_length": "0:4:16", "sequence": "1:2:3"}, (1, 6, 19)),
        (OPTIMUM, {"past_key_values.0.key": "1x3x0x64:1x3x4x64:1x3x16x64"}, (1, 132, 528)),
        (ONE_TOKEN, {"past_sequence_length": "1:4:16"}, (2, 5, 17)),
        (LETTERS, {"p": "0:4:16", "s": "1:2:3"}, (1, 6, 19)),
        (TEXT, {}, (1, 128, 512)),
        ([port("attention_mask", "batch", "total_sequence"), TEXT[0]], {}, (1, 128, 512)),
    ],
)
def test_a_mask_follows_its_parts_whatever_they_are_called(inputs, shapes, mask):
    found = made(inputs, **shapes)["attention_mask"]
    assert tuple(shape[1] for shape in found) == mask


@pytest.mark.parametrize("order", [1, -1])
def test_a_total_that_the_user_says_stays(order):
    said = {"total_sequence": "1:2000:4000", "sequence": "1:1:2"}
    assert made(CACHED, **dict([*said.items()][::order]))["attention_mask"] == ((1, 1), (1, 2000), (4, 4000))


def test_a_total_that_takes_less_than_past_and_sequence_is_refused():
    with pytest.raises(BackendError, match="1:2:3, but sequence and past together are 1:257:1026"):
        made(CACHED, total_sequence="1:2:3", sequence="1:1:2")


def test_by_default_no_more_positions_than_the_model_has():
    largest = {"sequence": 128, "past_sequence": 128, "total_sequence": 128}
    assert made(CACHED, largest=largest)["attention_mask"] == ((1, 1), (1, 128), (4, 128))
    (prefill,) = make_profiles(CACHED, None, largest, [ProfileRequest("prefill")])
    assert prefill.shapes["input_ids"][2] == (4, 128)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "can't be read"),
        ("batch=1:1:8", "has no name"),
        ("=1", "has no name"),
        ("prefil", "did you mean 'prefill'"),
        ("'open", "can't be read"),
    ],
)
def test_profiles_that_say_nothing(text, said):
    with pytest.raises(BackendError) as caught:
        ProfileRequest.parse(text)
    assert said in str(caught.value)


def test_sizes_in_python_are_what_would_be_typed():
    assert shape_text((1, 1, 8)) == "1:1:8"
    assert shape_text(((1, 1), (1, 128), (8, 2048))) == "1x1:1x128:8x2048"
    assert shape_text("1:1:8") == "1:1:8"


def test_a_multiple_is_computed():
    inputs = [port("x", "batch", 4), port("y", "2*batch", 4), port("z", "64 - batch", 4)]
    shapes = made(inputs, batch="1:2:8")
    assert shapes["y"] == ((2, 4), (4, 4), (16, 4))
    assert shapes["z"] == ((56, 4), (62, 4), (63, 4))
    with pytest.raises(BackendError, match=r"x: the sizes of dimension 0 \(batch\*16\) are unknown"):
        made([port("x", "batch*16", 4)])


def test_fixed_inputs_are_left_out():
    assert "pixel_values" not in made([port("pixel_values", 1, 3, 8, 8), *TEXT])


def test_ranks_go_up_to_the_graphs():
    record, tensors = lora()
    assert made([*TEXT, *tensors], record)["layer.q.lora_A.weight"] == ((16, 1), (16, 8), (16, 16))
    assert made([*TEXT, *tensors], record, rank="0:4:8")["layer.q.lora_B.weight"] == ((0, 8), (4, 8), (8, 8))


def test_packed_modules_add_up_their_ranks():
    record, tensors = lora(members=3)
    shapes = made([*TEXT, *tensors], record)["layer.q.lora_A.weight"]
    assert shapes == ((16, 1), (16, 24), (16, 48))  # an adapter may change one of them alone


def test_b_of_a_grouped_convolution_has_a_part_of_the_rank():
    record, tensors = lora(groups=4)
    assert made([*TEXT, *tensors], record)["layer.q.lora_B.weight"] == ((1, 8), (2, 8), (4, 8))


def test_a_shape_of_one_input_holds_for_the_dimensions_of_others():
    shapes = made(TEXT, input_ids="1x1:2x8:8x2048")
    assert shapes["attention_mask"] == shapes["input_ids"] == ((1, 1), (2, 8), (8, 2048))


def test_one_size_stands_for_all_three():
    assert made(TEXT, batch="2")["input_ids"] == ((2, 1), (2, 128), (2, 512))


def test_a_dimension_may_be_named_as_the_graph_does():
    inputs = [port("x", "N", "frames")]
    assert made(inputs, frames="1:2:3")["x"] == ((1, 1), (1, 2), (4, 3))


def test_an_empty_past_is_a_size_as_well():
    assert made(CACHED, past_sequence="0")["past_key_values.0.key"][2] == (4, 3, 0, 64)
    assert made(CACHED, **{"past_key_values.0.key": "1x3x0x64"})["attention_mask"][2] == (1, 512)


def test_prefill_and_decode_know_their_sizes():
    requests = [ProfileRequest("prefill"), ProfileRequest("decode", {"batch": "1:1:8"})]
    prefill, decode = make_profiles(CACHED, None, {}, requests)
    assert prefill.shapes["past_key_values.0.key"] == ((1, 3, 0, 64), (1, 3, 0, 64), (4, 3, 0, 64))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (8, 1))
    assert decode.shapes["attention_mask"] == ((1, 2), (1, 257), (8, 1025))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"batch": "4:2:8"}, "out of order"),
        ({"batch": "1:2:0"}, "out of order"),
        ({"batch": "0:0:0"}, "the smallest size is 0"),
        ({"batch": "1:1:2147483648"}, "larger than any size that TensorRT takes"),
        ({"batch": "1:x:3"}, "wanted MIN:OPT:MAX"),
        ({"batch": "1:2"}, "wanted MIN:OPT:MAX"),
        ({"batch": "-1:2:3"}, "wanted MIN:OPT:MAX"),
        ({"batch": "1x1:1x2:1x3"}, "it has 1 dimension"),
        ({"input_ids": "1:2:3"}, "it has 2 dimensions"),
        ({"input_idz": "1x1"}, "did you mean 'input_ids'?"),
        ({"nothing_like_it": "1"}, "there are: batch, sequence, rank, input_ids, attention_mask)"),
        ({"rank": "1:8:17"}, "rank 17, the graph takes at most 16"),
        ({"layer.q.lora_A.weight": "16x1:16x8:16x32"}, "rank 32, the graph takes at most 16"),
        ({"layer.q.lora_A.weight": "8x1:8x8:8x8"}, "dimension 0 is 16 in the graph, got 8:8:8"),
        ({"past_sequence": "1"}, "the graph has no such input or dimension"),
        ({"fixed": "2"}, "its shape [1] is fixed in the graph"),
    ],
)
def test_what_does_not_fit_is_said(shapes, said):
    record, tensors = lora()
    with pytest.raises(BackendError) as caught:
        made([*TEXT, *tensors, port("fixed", 1)], record, **shapes)
    assert said in str(caught.value)
    assert "--shape" in caught.value.hint


def test_everything_wrong_is_listed():
    with pytest.raises(BackendError) as caught:
        made([*TEXT, port("x", "batch", "length_of_x")], batch="3:2:1", foo="1", sequence="a")
    assert len(caught.value.problems) == 4


def test_a_dimension_that_nothing_tells_is_asked_for():
    with pytest.raises(BackendError, match=r"x: the sizes of dimension 1 \(frames\) are unknown"):
        made([port("x", "batch", "frames")])


def test_profiles_have_names_of_their_own():
    with pytest.raises(BackendError, match="two profiles are called 'decode'"):
        make_profiles(TEXT, None, {}, [ProfileRequest("decode"), ProfileRequest("decode")])


@pytest.mark.parametrize("name", ["x", "x y", "x'y", 'x"y', "a=b", "a:0", "é", "x\\y"])
def test_a_request_is_written_as_it_is_read(name):
    request = ProfileRequest("my profile", {name: "1x4:2x4:8x4"})
    assert ProfileRequest.parse(request.text()) == request


@pytest.mark.parametrize("text", ["", "decode x='1"])
def test_a_request_that_cannot_be_read(text):
    with pytest.raises(BackendError, match="can't be read") as caught:
        ProfileRequest.parse(text)
    assert "--profile" in caught.value.hint


def test_requests_are_read():
    request = ProfileRequest.parse("decode sequence=1:1:1  a=b=2")
    assert request == ProfileRequest("decode", {"sequence": "1:1:1", "a=b": "2"})
    with pytest.raises(BackendError) as caught:
        parse_shapes(["batch", "x=1", "x=2", "=3"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "dims", "axis", "role"),
    [
        ("input_ids", ("batch_size", "sequence_length"), 1, "sequence"),
        ("input_ids", ("s0", "s1"), 1, "sequence"),
        ("input_ids", ("input_ids_dynamic_axes_1", "input_ids_dynamic_axes_2"), 0, "batch"),
        ("attention_mask", ("batch", "past_sequence_length + 1"), 1, "total_sequence"),
        ("attention_mask", ("batch", "total_sequence_length"), 1, "total_sequence"),
        ("past_key_values.3.value", ("b", 8, "past_seq_len", 64), 2, "past_sequence"),
        ("past_key_values.3.value", ("s0", 8, "s5", 64), 2, "past_sequence"),
        ("pixel_values", ("s0", 3, "h", "w"), 0, "batch"),
        ("pixel_values", ("s0", 3, "h", "w"), 2, None),
        ("decoder_input_ids", ("batch", "decoder_sequence"), 1, "sequence"),
    ],
)
def test_dimensions_are_known_by_what_exporters_call_them(name, dims, axis, role):
    assert role_of(name, dims, axis) == role


def test_a_total_adds_up():
    assert sum_of_both(Range(1, 2, 3), Range(0, 10, 20)) == Range(1, 12, 23)
