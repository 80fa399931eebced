"""Who votes about the next generation."""

from swarmnode.coordinator.shadows import MAX_VOTERS, MIN_VOTERS, choose_voters
from swarmnode.domain import PeerId


def voters(slots: list[str], granted: str, shadows: list[str] | None = None) -> str:
    """Peers are letters; "a" coordinates."""
    grid, second = ([[PeerId(p) for p in row] for row in rows] for rows in (slots, shadows or []))
    return "".join(choose_voters(PeerId("a"), grid, second, dict.fromkeys(map(PeerId, granted))))


def test_the_coordinator_comes_first_then_who_holds_a_stage() -> None:
    assert voters(["cb", "cd"], "abcdef") == "acbd"
    assert voters(["cc"], "abcdef", shadows=["b"]) == "acb"
    assert len(voters(["bcdefghij"], "abcdefghij")) == MAX_VOTERS


def test_idle_machines_vote_where_too_few_hold_anything() -> None:
    """Two are no majority without one another, so that nobody could follow a dead coordinator."""
    assert voters(["aa"], "abcd") == "abc"
    assert voters(["bb"], "abcd") == "abc"
    assert len(voters(["aa"], "abcd")) == MIN_VOTERS
    assert voters(["aa"], "ad") == "ad", "where there is nobody else"


def test_who_did_not_agree_has_no_vote() -> None:
    assert voters(["bc"], "ac") == "ac"
