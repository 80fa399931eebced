from hypothesis import given
from hypothesis import strategies as st

from swarmnode.http.text import StopGate, TextDecoder


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@given(st.text(max_size=40))
def test_text_comes_in_whole_characters_and_complete(text: str) -> None:
    decoder = TextDecoder(decode)
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "".join(pieces) + decoder.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.binary(max_size=60))
def test_invalid_bytes_still_come_out_and_nothing_waits_for_ever(data: bytes) -> None:
    decoder = TextDecoder(decode)
    pushed = "".join(decoder.push(byte) for byte in data)
    rest = decoder.finish()
    assert pushed + rest == decode(list(data))
    assert len(rest) <= 3


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3),
)
def test_a_stop_string_never_shows_and_nothing_before_it_is_lost(
    parts: list[str], stops: list[str]
) -> None:
    gate = StopGate(stops)
    shown, seen = "", ""
    for part in parts:
        seen += part
        shown += gate.push(part)
        if gate.stopped:
            break
    first = min((at for stop in stops if (at := seen.find(stop)) >= 0), default=None)
    assert gate.stopped == (first is not None)
    if first is None:
        assert shown + gate.finish() == seen
    else:
        assert shown == seen[:first]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    gate = StopGate(["\nUser:"])
    assert gate.push("hello\nUs") == "hello"
    assert gate.push("ual") == "\nUsual"
    assert gate.push("\nUser: x") == ""
    assert gate.stopped
