"""Encoding: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_wire import messages
from penstock_wire.messages import (
    Admit,
    ChunkDelivered,
    ChunkItem,
    Credit,
    Generate,
    GroupAddress,
    Groups,
    Sampling,
    StepPlan,
    WireError,
    decode_control,
    decode_notification,
    encode,
    pack_tokens,
    unpack_tokens,
)

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)


@given(
    tokens=TOKENS,
    seed=st.integers(0, 2**63 - 1),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-1, 1)),
)
def test_generate_comes_back(tokens: list[int], seed: int, bias: dict[int, float]) -> None:
    message = Generate(
        request_id="r",
        tokens=pack_tokens(tokens),
        sampling=Sampling(seed=seed, logit_bias=bias, stop_token_ids=(1, 2)),
        group="g",
    )
    again = decode_control(encode(message))
    assert again == message
    assert unpack_tokens(again.tokens).tolist() == tokens


def test_a_plan_comes_back_whole() -> None:
    admit = Admit(
        key=1, grant=2, receiver="d/b", incarnation=3, pages=(4, 5), target_pages=(6, 7), length=40
    )
    plan = StepPlan(
        step=9, epoch=2, items=(ChunkItem(1, 0, 32, False),), admit=(admit,), release=(0,)
    )
    assert decode_control(encode(plan)) == plan


@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused_or_a_message(data: bytes) -> None:
    for decode in (decode_control, decode_notification):
        try:
            message = decode(data)
        except WireError:
            continue
        assert isinstance(message, messages.Message)


def test_a_notification_is_no_control_message_and_the_other_way_round() -> None:
    note = ChunkDelivered(incarnation=1, grant=2, stage=0, start=0, end=16)
    assert decode_notification(encode(note)) == note
    with pytest.raises(WireError, match="delivered"):
        decode_control(encode(note))
    with pytest.raises(WireError, match="groups"):
        decode_notification(encode(Groups(groups=(GroupAddress(name="g", stages=("a:1",)),))))


def test_wrong_types_and_ranges_are_refused() -> None:
    good = msgspec.to_builtins(Generate(request_id="r", tokens=b"", sampling=Sampling(seed=1)))
    for change in (
        {"sampling": {"seed": 1, "top_p": 0.0}},
        {"sampling": {"seed": 1, "temperature": -1}},
        {"sampling": {"seed": "one"}},
        {"request_id": "x" * 300},
        {"request_id": 5},
        {"tokens": [1, 2]},
    ):
        with pytest.raises(WireError):
            decode_control(msgspec.msgpack.encode(good | change))


def test_limits_name_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(WireError, match="over the limit of 10"):
        encode(Credit(epoch=1, number=2))
    with pytest.raises(WireError, match="over the limit of 10"):
        decode_control(b"x" * 11)


def test_token_bytes_are_whole_words() -> None:
    assert pack_tokens([1, 256]) == b"\x01\x00\x00\x00\x00\x01\x00\x00"
    with pytest.raises(WireError, match="whole number"):
        unpack_tokens(b"\x01\x00\x00")
    with pytest.raises(OverflowError):
        pack_tokens([2**31])
