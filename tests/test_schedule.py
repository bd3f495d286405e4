"""The schedule language: what it reads, what it refuses, and the phases it gives."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unfreeze import UnfreezeError, all_at_once, freeze_out, gradual, linear_probe, parse_schedule, top
from hf_unfreeze.schedule import Time, spec_of


@dataclass(frozen=True)
class Group:
    name: str
    stack: str = ""
    parameter_names: tuple[str, ...] = ("weight",)
    level: int | None = None


def single(blocks: int = 4) -> list[Group]:
    return [Group("embeddings"), *(Group(f"block[{i}]") for i in range(blocks)), Group("head")]


def towers(encoder: int = 3, decoder: int = 2) -> list[Group]:
    return [
        Group("embeddings"),
        *(Group(f"encoder.block[{i}]", "encoder") for i in range(encoder)),
        *(Group(f"decoder.block[{i}]", "decoder") for i in range(decoder)),
        Group("head"),
    ]


def plan(spec, groups=None, total_steps=70, steps_per_epoch=7):
    groups = groups or single()
    phases = parse_schedule(spec).phases(groups, total_steps, steps_per_epoch)
    return [(phase.start, spec_of(phase.trainable, groups)) for phase in phases]


PLANS = {
    "head@0, block[-2:]@1ep, all@50%": [(0, "head"), (7, "block[2:4], head"), (35, "all")],
    " all@0 ,- block[ 0 : 2 ] @ 1.25 ep": [(0, "all"), (9, "embeddings, block[2:4], head")],
    "all@1ep, head@0": [(0, "head"), (7, "all")],  # time, not writing, orders
    "all@0, -head@0": [(0, "embeddings, block[0:4]")],  # at one time the later entry wins
    "-head@0, all@0": [(0, "all")],
    "head@0, head@1ep": [(0, "head")],  # no change, no phase
    "block[1]@0, block[3]@0, block[-1]@1ep": [(0, "block[1], block[3]")],
    "block@0, embeddings@1step": [(0, "block[0:4]"), (1, "embeddings, block[0:4]")],
    "gradual": [(0, "head"), (7, "block[3], head"), (14, "block[2:4], head"), (21, "block[1:4], head"),
                (28, "block[0:4], head"), (35, "all")],
    "gradual(every=10%, blocks=3, embeddings=false)": [(0, "head"), (7, "block[1:4], head"), (14, "block[0:4], head")],
    "gradual(every=30%)": [(0, "head"), (21, "block[3], head"), (42, "block[2:4], head"), (63, "block[1:4], head"),
                           (70, "all")],
    "linear_probe(until=3step)": [(0, "head"), (3, "all")],
    "top": [(0, "block[2:4], head")],
    "top(0.26)": [(0, "block[2:4], head")],  # rounded up
    "top(share=0.25)": [(0, "block[3], head")],
    "top(1)": [(0, "block[0:4], head")],
    "top(0.5, encoder_until=40%)": [(0, "block[2:4], head")],  # one stack: nothing to freeze again
    "all_at_once": [(0, "all")],
}  # fmt: skip


@pytest.mark.parametrize("spec", PLANS)
def test_phases(spec):
    assert plan(spec) == PLANS[spec]
    schedule = parse_schedule(spec)
    assert parse_schedule(str(schedule)) == schedule and hash(parse_schedule(str(schedule))) == hash(schedule)


@pytest.mark.parametrize(("share", "first"), [(0.25, 3), (0.5, 2), (1, 0)])
def test_a_share_counts_the_blocks_of_a_model_without_a_head(share, first):
    groups = [replace(group, parameter_names=()) if group.name == "head" else group for group in single()]
    assert parse_schedule(f"top({share})").phases(groups)[0].trainable == tuple(f"block[{i}]" for i in range(first, 4))


NORMS = ("model.encoder.layer_norm.bias", "model.decoder.layer_norm.bias")


@pytest.mark.parametrize(("spec", "head", "opened"), [
    ("top(0.4)", NORMS, "decoder.block[0:2]"),
    ("top(0.4)", ("encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"), "decoder.block[0:2]"),
    ("top(0.6)", NORMS, "encoder.block[2], decoder.block[0:2], head"),  # the gradient goes there anyway
    ("top(0.4)", NORMS[1:], "decoder.block[0:2], head"),
    ("top(0.4)", (*NORMS, "lm_head.weight"), "decoder.block[0:2], head"),
    ("top(0.4)", (), "decoder.block[0:2]"),
    ("head@0", NORMS, "head"),
])  # fmt: skip
def test_an_encoders_last_norm_alone_does_not_open_the_head(spec, head, opened):
    root = "" if "encoder.final_layer_norm.weight" in head else "model."
    assert plan(spec, named_towers(head, root)) == [(0, opened)]


def named_towers(head: tuple[str, ...], root: str = "model.") -> list[Group]:
    paths = {group.name: root + re.sub(r"block\[(\d+)\]", r"layers.\1.fc1", group.name) for group in towers()}
    groups = [replace(group, parameter_names=(f"{paths[group.name]}.bias",)) for group in towers()[:-1]]
    return [*groups, Group("head", parameter_names=head)]


@pytest.mark.parametrize(("spec", "encoder", "decoder", "until"), [
    ("top(0.4, encoder_until=40%)", "encoder.block[1:3]", "decoder.block[1], head", 28),
    ("top(1, encoder_until=1ep)", "encoder.block[0:3]", "decoder.block[0:2], head", 7),
])  # fmt: skip
def test_a_share_of_encoder_and_of_decoder(spec, encoder, decoder, until):
    assert plan(spec, towers()) == [(0, f"{encoder}, {decoder}"), (until, decoder)]
    assert str(parse_schedule(spec)) == spec.replace("(1,", "(1.0,")


def test_an_encoders_last_norm_does_not_open_with_blocks_that_freeze_again():
    phases = plan("top(0.4, encoder_until=1ep)", named_towers(NORMS))
    assert phases == [(0, "encoder.block[1:3], decoder.block[1]"), (7, "decoder.block[1]")]


def test_what_lies_between_encoder_and_decoder_trains_to_the_end():
    below, above = towers()[:4], towers()[4:]
    phases = plan("top(0.4, encoder_until=1ep)", [*below, Group("connector"), *above])
    assert [trainable for _, trainable in phases] == [
        "encoder.block[1:3], connector, decoder.block[1], head",
        "connector, decoder.block[1], head",
    ]


def test_a_share_of_each_stack_counts_blocks_with_parameters():
    bare = [replace(group, parameter_names=()) if group.name == "encoder.block[2]" else group for group in towers()]
    assert plan("top(0.5, encoder_until=1ep)", bare)[0] == (0, "encoder.block[1], decoder.block[1], head")
    no_encoder = [group for group in towers() if group.stack != "encoder"]
    assert plan("top(0.5, encoder_until=1ep)", no_encoder) == plan("top(0.5)", no_encoder)


def test_functions_are_the_specs():
    assert gradual(every="0.5ep", blocks=2, embeddings=False) == parse_schedule(
        "gradual(blocks=2, every=0.50ep, embeddings=false)"
    )
    assert linear_probe() == parse_schedule("linear_probe")
    assert top(1) == parse_schedule("top(1.0)")
    assert top(0.4, encoder_until="40%") == parse_schedule("top(0.4, encoder_until=40%)")
    assert all_at_once() == parse_schedule("all_at_once()")


@pytest.mark.parametrize(
    ("time", "total", "per_epoch", "step"),
    [("10%", 7, 7, 1), ("50%", 7, 7, 4), ("100%", 7, 7, 7), ("1.5ep", 30, 7, 11), ("0.1ep", 30, 30, 3),
     ("0.7ep", 10, 10, 7), ("33.3%", 1000, 10, 333), ("500step", 7, 7, 500), ("0", None, None, 0)],
)  # fmt: skip
def test_time_is_exact(time, total, per_epoch, step):
    assert Time.parse(time).to_step(total, per_epoch) == step


def test_several_stacks():
    assert plan("block[-2:]@0", towers()) == [(0, "encoder.block[1:3], decoder.block[0:2]")]
    assert plan("decoder.block[-1]@0", towers()) == [(0, "decoder.block[1]")]
    assert [spec for _, spec in plan("gradual", towers())][:4] == [
        "head",
        "decoder.block[1], head",
        "decoder.block[0:2], head",
        "encoder.block[2], decoder.block[0:2], head",
    ]


def test_an_index_outside_one_stack_is_told_by_the_name_of_that_stack():
    with pytest.raises(UnfreezeError, match=r"2 in decoder\)\. Write decoder\.block\[0\] to decoder\.block\[1\]"):
        plan("decoder.block[2]@0", towers())
    with pytest.raises(UnfreezeError, match=r"Write decoder\.block\[0:1\]\."):
        plan("decoder.block[1:0]@0", towers())


def test_parallel_towers_open_together():
    groups = [
        Group("embeddings", level=0),
        Group("vision.block[0]", "vision", level=1),
        Group("text.block[0]", "text", level=2),
        Group("vision.block[1]", "vision", level=2),
        Group("head", level=3),
    ]
    assert [spec for _, spec in plan("gradual", groups)][1] == "text.block[0], vision.block[1], head"


def test_a_head_without_parameters_takes_the_top_block_with_it():
    groups = [*single()[:-1], Group("head", parameter_names=())]
    assert plan("gradual", groups)[0] == (0, "block[3]")
    with pytest.raises(UnfreezeError, match="head has no parameter of its own"):
        plan("head@0, all@1ep", groups)
    with pytest.raises(UnfreezeError, match=r"trains nothing from step 0 on\. Open .* for instance block\[-1\]@0\."):
        plan("head@1ep, all@2ep", groups)


BAD = {
    "": "has no time",
    "head": r"write head@0",
    "gradul": "Did you mean 'gradual'",
    "plateu(loss)": "Did you mean 'plateau'",
    "gradual(evry=1ep)": "Did you mean 'every'",
    "gradual(every)": "It takes every=1ep",
    "gradual(every=1)": "gradual: every=1 is of no use. 1 has no unit. Write 1step, 1ep or 1%",
    "gradual(1ep)": r"'1ep' is no argument of gradual\. .* Write every=1ep\.",
    "linear_probe(20%)": r"Write until=20%\.",
    "auto(fisher, 1ep)": r"Write every=1ep\.",
    "plateau(eval_loss, 1ep)": r"at_least=1ep, at_most=3ep, .*embeddings=true\.$",  # two times: it could be either
    "gradual(every=0)": "more than 0",
    "gradual(blocks=0)": "more than 0",
    "gradual(blocks=1.5)": "whole number",
    "gradual(blocks=²)": "whole number",
    "gradual(embeddings=yes)": "true or embeddings=false",
    "gradual(every=1ep, every=2ep)": "twice",
    "all_at_once(1)": "no arguments",
    "head@1": r"1 has no unit\. Write 1step, 1ep or 1%\.",
    "all@0.5": r"0\.5 has no unit\. Write 0\.5ep or 50%\.",
    "all@33.3": r"Write 33\.3ep or 33\.3%\.",
    "all@500": r"Write 500step or 500ep\.",
    "all@100.5": r"Write 100\.5ep\.",
    "head@1epoch": r"Did you mean 1ep\?",
    "head@5steps": r"Did you mean 5step\?",
    "head@-1step": "is no time",
    "head@1.5step": "whole numbers",
    "all@101%": "beyond the run",
    "head@": "is no time",
    "@0": "is no selector",
    "head@0,,all@1ep": "entry 2",
    "head*0@1ep": r"write -head@1ep",
    "head*fast@0": r"as in block\[0\]\*0.1@0",
    "all@0, -head*0.5@2ep": "entry 2: '-head\\*0.5@2ep': a rate is a number above 0",
    "head*inf@0": "above 0",
    "head[0]@0": r"only blocks have an index, 'head' has none\. Write head or block\[0\]\.",
    "decoder.all[0]@0": r"Write decoder\.all or decoder\.block\[0\]\.",
    "encoder.layer[-2:]@1ep": r"'layer' has none\. Write encoder\.block\[-2:\]\.",
    "gradual every=1ep, blocks=2": r"what gradual takes stands in brackets\. Write gradual\(every=1ep, blocks=2\)\.",
    "gradual, every=1ep": r"Write gradual\(every=1ep\)\.",
    "plateau eval_loss": r"Write plateau\(eval_loss\)\.",
    "gradual evry=1ep": "Did you mean 'every'",
    "all_at_once@0": r"all_at_once stands for a whole schedule, without a time\. Write all_at_once alone\.",
    "head@0, linear_probe(until=1ep) @ 1ep": r"Write linear_probe\(until=1ep\) alone\.",
    "head:0": r"'head:0': the time stands after @\. Write head@0\.",
    "block[-1]:1ep": r"Write block\[-1\]@1ep\.",
    "-block[0:2] : 1 ep": r"Write -block\[0:2\]@1ep\.",
    "block[0]*0.1:1ep": r"Write block\[0\]\*0\.1@1ep\.",
    "head:": "'' is no time",
    "block[0:2]": r"has no time\. Write block\[0:2\]@0",
    "head@0; all@1ep": r"a comma stands between two entries\. Write head@0, all@1ep\.",
    "head@0;": r"Write head@0\.",
    ";": r"Write head@0, all@1ep\.",
    "head@0\nall@1ep\n-head@2ep": r"Write head@0, all@1ep, -head@2ep\.",
    "head@0 block[ 0 : 2 ] @ 1 ep": r"Write head@0, block\[0:2\]@1ep\.",
    "head@0; all": "'all' has no time",
    "block[-4:]@1ep*0.1": r"the rate stands before @\. Write block\[-4:\]\*0\.1@1ep\.",
    "-head@1ep*0.1": "To freeze, write -head@1ep",
    "auto(validation_gradient": r"the bracket is not closed\. Write auto\(validation_gradient\)\.",
    "gradual(every=1ep, blocks=2": r"Write gradual\(every=1ep, blocks=2\)\.",
    "auto(": "needs a criterion",
    "gradul(every=1ep": "Did you mean 'gradual'",
    "block[-2:@0": r"'block\[-2:': the bracket is not closed\. Write block\[-2:\]\.",
    "block[@0": "is no index",
    "block[1:2:3]@0": "is no index",
    "block[a]@0": "is no index",
    "block[]@0": "is no index",
    "blok[1]@0": r"'blok' has none\. Write block\[1\]\.",
    "haed@0": "Did you mean 'head'",
    "block[4]@0": r"block\[0\] to block\[3\]",
    "block[-5]@0": r"block\[0\] to block\[3\]",
    "block[4:]@0": "lies outside",
    "block[3:9]@0, block[5:2]@0": r"block\[5:2\] lies outside",
    "block[3:1]@0": r"block\[3:1\] is empty: it ends at or below its start\. Write block\[1:3\]\.",
    "block[-1:-3]@0": r"Write block\[-3:-1\]\.",
    "block[2:2]@0": r"Write block\[2\]\.",
    "block[2:-2]@0": r"Write block\[2\]\.",
    "block[:0]@0": r"Write block\[0:\]\.",
    "decoder.block@0": "matches nothing",
    "block[0]@1ep": "trains nothing from step 0",
    "all@0, -all@2ep": "trains nothing from step 14",
}


@pytest.mark.parametrize("spec", BAD)
def test_bad_specs_are_refused_with_the_cure(spec):
    with pytest.raises(UnfreezeError, match=BAD[spec]):
        plan(spec)


@pytest.mark.parametrize("spec", [None, 3, ["head@0"]])
def test_wrong_types(spec):
    with pytest.raises(UnfreezeError, match="a string or a Schedule"):
        parse_schedule(spec)


def test_all_faults_come_at_once():
    with pytest.raises(UnfreezeError) as caught:
        plan("block[9]@1ep, blck@2ep, head@0")
    assert "block[9]" in str(caught.value) and "blck" in str(caught.value)


def test_a_run_without_epochs():
    with pytest.raises(UnfreezeError, match="needs steps_per_epoch"):
        plan("all@1ep", steps_per_epoch=None)
    with pytest.raises(UnfreezeError, match="needs total_steps"):
        plan("all@10%", total_steps=None)


def test_a_model_without_blocks():
    groups = [Group("all_parameters")]
    assert plan("all@0", groups) == [(0, "all")]
    for spec in ("gradual", "head@0", "linear_probe"):
        with pytest.raises(UnfreezeError, match="all_parameters"):
            plan(spec, groups)


numbers = st.decimals(0, 100, places=3).map(lambda value: f"{value.normalize():f}")
times = st.one_of(
    st.just("0"), st.integers(0, 900).map("{}step".format), numbers.map("{}ep".format), numbers.map("{}%".format)
)
indices = st.one_of(
    st.just(""),
    st.integers(-4, 3).map("[{}]".format),
    st.tuples(st.integers(-4, 0), st.sampled_from(["", "2", "4"])).map(lambda pair: f"[{pair[0]}:{pair[1]}]"),
)
selectors = st.one_of(st.sampled_from(["head", "embeddings", "all"]), indices.map("block{}".format))
rates = st.one_of(st.just(""), st.floats(1e-9, 1e3).map("*{!r}".format))
entries = st.one_of(
    st.tuples(selectors, rates, times).map(lambda e: f"{e[0]}{e[1]}@{e[2]}"),
    st.tuples(selectors, times).map(lambda e: f"-{e[0]}@{e[1]}"),
)


@settings(max_examples=500)
@given(st.lists(entries, min_size=1, max_size=6).map(",".join), st.integers(1, 500), st.integers(1, 90))
def test_valid_schedules_round_trip_and_their_phases_are_ordered(spec, total, per_epoch):
    schedule = parse_schedule(spec)
    assert parse_schedule(str(schedule)) == schedule
    try:
        phases = schedule.phases(single(), total, per_epoch)
    except UnfreezeError as error:
        assert "trains nothing" in str(error) or "lies outside" in str(error) or "is empty" in str(error)
        return
    starts = [phase.start for phase in phases]
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert all(phase.trainable for phase in phases)
    assert all({name for name, rate in phase.rates if rate != 1} <= set(phase.trainable) for phase in phases)
    for phase in phases:  # the spec of a set selects that set
        again = ", ".join(f"{part}@0" for part in spec_of(phase.trainable, single()).split(", "))
        assert parse_schedule(again).phases(single())[0].trainable == phase.trainable


shares = st.floats(0.01, 1)
named = st.one_of(st.builds(top, shares), st.builds(freeze_out, shares, st.booleans(), st.booleans()))


@given(named, st.integers(1, 500))
def test_named_schedules_round_trip_and_their_phases_are_ordered(schedule, total):
    assert parse_schedule(str(schedule)) == schedule and hash(parse_schedule(str(schedule))) == hash(schedule)
    starts = [phase.start for phase in schedule.phases(single(), total)]
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < total


WHOLE = [
    *PLANS,
    "plateau(eval_loss, patience=2, min_delta=0.1, at_most=3ep, stop=no_gain)",
    "freeze_out(0.8)",
    "rotate(blocks=2, every=20step, seed=3)",
    "auto(fisher, every=10%, batches=8)",
    "learn_rates(start=0.5)",
]
WORDS = [*"0123456789.,@%*-[]():= ", "step", "ep", "block", "inf", "nan", "1e400", "9" * 5000, "٣", "²", "\0"]
PIECES = st.one_of(st.sampled_from(WORDS), st.characters())


@st.composite
def damaged(draw):
    """A schedule in which a few characters are replaced."""
    text = draw(st.sampled_from(WHOLE))
    for piece in draw(st.lists(PIECES, min_size=1, max_size=3)):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + piece + text[at + draw(st.integers(0, 2)) :]
    return text


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.one_of(damaged(), st.text(alphabet="headblockl[]:-@0123.%step, ()=gradu", max_size=30)))
def test_any_text_parses_or_is_refused(text):
    try:
        schedule = parse_schedule(text)
        assert parse_schedule(str(schedule)) == schedule
        starts = [phase.start for phase in schedule.phases(single(), 70, 7)]
    except UnfreezeError:
        return
    assert starts[0] == 0 and starts == sorted(set(starts))


def test_a_time_has_an_end_as_a_decimal():
    assert Time(Fraction(1, 2), "ep") == Time.parse("0.5ep")
    with pytest.raises(UnfreezeError, match=r"1/3ep has no end as a decimal. Write for instance 0\.3333ep"):
        Time(Fraction(1, 3), "ep")


def test_a_time_may_be_made_of_a_whole_number():
    time = Time(3, "ep")
    assert time == Time.parse("3ep") and isinstance(time.value, Fraction) and str(time) == "3ep"
