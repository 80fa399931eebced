"""Who holds a stage besides its hosts, and who votes about the next generation."""

from dataclasses import replace

from swarmnode.coordinator.shadows import MAX_VOTERS, MIN_VOTERS, choose_shadows, choose_voters
from swarmnode.coordinator.solver.decision import Decision
from swarmnode.domain import PeerId
from tests.coordinator.bench import FACTS, advert, manifest


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


def test_a_second_holder_has_a_device_of_the_same_kind_where_there_is_one() -> None:
    """Another kind may compute other bits, and be the odd one out for ever."""
    kinds = {"a": "cuda", "b": "cpu", "c": "cuda", "d": "cpu"}
    adverts = [advert(name, memory=(9 - n) << 30) for n, name in enumerate(kinds)]
    peers = [replace(each, device=replace(each.device, kind=kinds[each.peer])) for each in adverts]
    job = manifest(stages=1, slots=1)

    def second(host: str, *, holder: str = "") -> str:
        decision = Decision(((0, 6),), ((PeerId(host),),), 1.0, 0.5, (), ())
        able = [each for each in peers if each.peer != "d" or host == "d"]
        shadows = choose_shadows(decision, able, FACTS, job, lambda _, peer: peer == holder)
        return "".join(shadows[0])

    assert second("a") == "c"
    assert second("a", holder="b") == "c", "also where another one has the state at hand"
    assert second("b") == "a", "there is no other one of its kind"
    assert second("d") == "b"
