"""Which links become coarser, and that a line whose speed swings does not take the job with it."""

import math
import random

import pytest

from swarmnode.boundary_codecs import (
    BoundaryCodecs,
    Level,
    boundary_codecs,
    boundary_links,
    evaluation_codec,
    levels_of,
)
from swarmnode.codec_specs import PRESETS, wire_share
from swarmnode.coordinator.link_codecs import (
    COARSER_ABOVE,
    COARSER_AFTER_S,
    FINER_AFTER_S,
    FINER_BELOW,
    LEAST_STEPS,
    LineLoad,
    Link,
    LinkCodecs,
)
from swarmnode.coordinator.outlook import Outlook
from swarmnode.domain import Generation, LinkPreset, PeerId, Plan
from swarmnode.errors import ManifestError
from swarmnode.job_codecs import CodecConfig
from swarmnode.messages import LinkReport
from tests.coordinator.bench import FACTS, manifest

A, B, C, D = map(PeerId, "abcd")
ONE, TWO = Generation(1), Generation(2)
LAN = CodecConfig.model_validate({"preset": "lan"})
SHARES = (1.0, 0.5, 0.28)
"""Bytes of the three levels of a job in bf16, roughly."""


def plan(links: tuple[LinkPreset, ...] = ()) -> Plan:
    return Plan(ONE, ((0, 3), (3, 6)), ((A, C), (B, D)), A, links=links)


def choice(codecs: CodecConfig = LAN) -> LinkCodecs:
    return LinkCodecs(levels_of(codecs))


def load(busy_s: float) -> LineLoad:
    """Of a line with one link, that is busy for so long with the job's own codecs."""
    return LineLoad(tuple(busy_s * share for share in SHARES))


class Line:
    """One link whose speed changes, beside a step that computes for a second."""

    def __init__(self, link: Link = (A, B), steps_left: int = 1_000_000) -> None:
        self.choice = choice()
        self.link = link
        self.now_s = 0.0
        self.steps_left = steps_left
        self.changes: list[tuple[float, int]] = []

    def last(self, seconds: float, busy_s: float, generation: Generation = ONE) -> "Line":
        """For so long a step a second is committed, while the line is so slow."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            before = self.level
            self.choice.see(generation, {self.link: load(busy_s)}, 1.0, self.steps_left, self.now_s)
            if self.level != before:
                self.changes.append((self.now_s, self.level))
        return self

    @property
    def level(self) -> int:
        return self.choice.level(self.link)


# ---- levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codecs", "names"),
    [
        ({"preset": "fidelity"}, ["", "lan", "home", "slow"]),
        ({"preset": "lan"}, ["", "home", "slow"]),
        ({"preset": "home"}, ["", "slow"]),
        ({"preset": "slow"}, [""]),
        ({"activation": "int2/32", "activation_gradient": "int2/32"}, [""]),
        ({"activation": "aq/int8"}, [""]),
        ({"activation": "powersgd/r8", "activation_gradient": "int4/32+hadamard"}, [""]),
    ],
)
def test_the_levels_of_a_job_are_its_own_codecs_and_what_is_coarser(
    codecs: dict[str, str], names: list[str]
) -> None:
    levels = levels_of(CodecConfig.model_validate(codecs))
    assert [level.preset for level in levels] == names


@pytest.mark.parametrize("activation", ["none", "bf16", "int8", "int4/32", "int3/32"])
@pytest.mark.parametrize("gradient", ["none", "int8", "int2/32"])
def test_no_level_is_finer_than_the_job_s_own_codecs_or_coarser_than_slow(
    activation: str, gradient: str
) -> None:
    own = CodecConfig(activation=activation, activation_gradient=gradient)
    levels = levels_of(own)
    assert levels[0].codecs == (activation, gradient)
    for role in range(2):
        shares = [wire_share(level.codecs[role]) for level in levels]
        assert shares == sorted(shares, reverse=True)
        slow = PRESETS["slow"].activation if role == 0 else PRESETS["slow"].activation_gradient
        assert shares[-1] == min(shares[0], wire_share(slow))


def test_a_plan_says_which_links_are_coarser_and_refuses_codecs_with_a_memory() -> None:
    links = (LinkPreset(A, B, "slow", "int4/32", "int4/32+hadamard"),)
    assert boundary_codecs(plan(links)) == {(A, B): BoundaryCodecs("int4/32", "int4/32+hadamard")}
    assert boundary_links(plan()) == {(A, B), (B, A), (C, D), (D, C)}
    for wrong in ("aq/int4/32", "int4/32+ef", "int4", "x" * 1000):
        with pytest.raises(ManifestError):
            boundary_codecs(plan((LinkPreset(A, B, "slow", "int8", wrong),)))


def test_an_evaluation_names_the_codecs_that_hidden_states_had() -> None:
    codecs = CodecConfig.model_validate({"preset": "home"})
    back = LinkPreset(B, A, "slow", "int4/32", "int4/32+hadamard")
    assert evaluation_codec(codecs, None) == "int8"
    assert evaluation_codec(codecs, plan((back,))) == "int8", "gradients alone cross it"
    there = LinkPreset(A, B, "slow", "int4/32", "int4/32+hadamard")
    assert evaluation_codec(codecs, plan((there, back))) == "int8, int4/32 on 1 of 2 links"


# ---- when a link changes -----------------------------------------------------------------------


def test_a_line_that_stalls_the_pipeline_goes_one_level_coarser_after_a_while() -> None:
    line = Line().last(COARSER_AFTER_S, COARSER_ABOVE + 0.05)
    assert line.level == 0
    line.last(1, COARSER_ABOVE + 0.05)
    assert line.level == 1
    line.last(600, COARSER_ABOVE + 0.05)
    assert line.changes == [(COARSER_AFTER_S + 1, 1)], "it fits now, and would not clearly before"


def test_a_line_far_too_slow_goes_level_by_level_to_the_coarsest_and_no_further() -> None:
    line = Line().last(1000, 50.0)
    assert [level for _, level in line.changes] == [1, 2]


def test_a_line_that_just_fits_stays_as_the_job_asks_for() -> None:
    assert Line().last(2000, COARSER_ABOVE - 0.01).changes == []


def test_a_slow_spell_shorter_than_the_patience_changes_nothing() -> None:
    line = Line()
    for _ in range(50):
        line.last(COARSER_AFTER_S - 1, 5.0).last(1, 0.1)
    assert line.changes == []


def test_seconds_alone_do_not_count_where_steps_are_long() -> None:
    some = choice()
    for number in range(LEAST_STEPS):
        assert some.level((A, B)) == 0
        some.see(ONE, {(A, B): load(200.0)}, 100.0, 1000, 100.0 * number)
    assert some.level((A, B)) == 1


def test_a_line_that_is_clearly_fast_again_goes_back_and_later_than_it_came() -> None:
    line = Line().last(100, 1.2)
    assert line.level == 1
    line.last(500, FINER_BELOW + 0.05)
    assert line.level == 1, "the finer codecs would fit, but not clearly"
    began_s = line.now_s
    line.last(500, FINER_BELOW - 0.05)
    assert line.changes[1:] == [(began_s + 1 + FINER_AFTER_S, 0)]
    assert FINER_AFTER_S > COARSER_AFTER_S


def test_a_speed_that_swings_for_hours_changes_the_codecs_a_few_times() -> None:
    line, period_s = Line(), 2 * FINER_AFTER_S
    for _ in range(8 * 3600 // round(2 * period_s)):
        line.last(period_s, 3.0).last(period_s, 0.1)
    hasty = 8 * 3600 / (2 * period_s)
    assert 0 < len(line.changes) <= 12, line.changes
    assert len(line.changes) < hasty / 5
    assert line.level > 0, "where it swings, the coarser codecs are the ones that always fit"


def test_the_patience_doubles_with_each_return() -> None:
    line, waits_s = Line(), []
    for _ in range(4):
        line.last(100, 1.2)
        assert line.level == 1
        began_s = line.now_s
        while line.level:
            line.last(1, 0.1)
        waits_s.append(line.now_s - began_s - 1)
    assert waits_s == [FINER_AFTER_S * 2**n for n in range(4)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_around_the_limit_never_makes_a_link_flap(seed: int) -> None:
    chance, line = random.Random(seed), Line()
    for _ in range(2000):
        line.last(1, chance.uniform(0.8, 1.4) * COARSER_ABOVE)
    assert len(line.changes) <= 1


def test_a_new_generation_begins_to_look_anew() -> None:
    line = Line().last(COARSER_AFTER_S, 2.0).last(COARSER_AFTER_S, 2.0, TWO)
    assert line.changes == []
    assert line.last(1, 2.0, TWO).level == 1


def test_a_change_that_would_not_pay_before_the_end_is_not_made() -> None:
    assert Line(steps_left=1).last(100, 2.0).changes == []
    assert Line(steps_left=30).last(100, 2.0).changes != []


def test_a_link_is_left_alone_where_another_of_the_same_sender_is_the_slow_one() -> None:
    some = choice()
    slow, fast = LineLoad((3.0, 1.6, 0.9)), LineLoad((3.0, 2.98, 2.97))
    for second in range(60):
        some.see(ONE, {(A, B): slow, (A, C): fast}, 1.0, 1000, float(second))
    assert (some.level((A, B)), some.level((A, C))) == (2, 0)


class TwoLinks:
    """Equal links of one sender to B and C, which share its line, beside a second of computing."""

    LINKS: tuple[Link, Link] = ((A, B), (A, C))

    def __init__(self) -> None:
        self.choice = choice(CodecConfig.model_validate({"preset": "home"}))
        self.now_s = 0.0

    def last(self, seconds: int, one_s: float) -> list[int]:
        """A link at the job's own codecs takes the line `one_s` a step; the levels of the two."""
        for _ in range(seconds):
            self.now_s += 1.0
            levels = [self.choice.level(link) for link in self.LINKS]
            loads = {
                link: LineLoad(tuple(one_s * (share + (1.0, 0.55)[other]) for share in (1.0, 0.55)))
                for link, other in zip(self.LINKS, reversed(levels), strict=True)
            }
            self.choice.see(ONE, loads, 1.0, 1_000_000, self.now_s)
        return [self.choice.level(link) for link in self.LINKS]


def test_of_two_equal_links_one_becomes_coarser_where_one_is_enough() -> None:
    assert TwoLinks().last(600, one_s=0.7) == [1, 0]


def test_where_one_is_not_enough_the_other_one_follows_and_finer_goes_one_at_a_time_too() -> None:
    links = TwoLinks()
    assert links.last(600, one_s=0.8) == [1, 1]
    assert links.last(600, one_s=0.45) == [0, 1], "both finer would be busy for 0.9"


def test_a_level_that_saves_nothing_on_a_link_is_passed_over() -> None:
    some = choice(CodecConfig(activation="bf16", activation_gradient="int8"))
    assert [level.preset for level in some.levels] == ["", "home", "slow"]
    for second in range(30):
        some.see(ONE, {(B, A): LineLoad((2.0, 2.0, 1.1))}, 1.0, 1000, float(second))
    assert some.level((B, A)) == 2, "it carries gradients alone"
    for second in range(30, 2000):
        some.see(ONE, {(B, A): LineLoad((0.2, 0.2, 0.1))}, 1.0, 1000, float(second))
        if some.level((B, A)) != 2:
            break
    assert some.level((B, A)) == 0, "and on the way back"


def test_a_job_that_keeps_its_codecs_never_changes() -> None:
    fixed = LinkCodecs(levels_of(LAN)[:1])
    assert not fixed.can_change
    for second in range(100):
        fixed.see(ONE, {(A, B): LineLoad((9.0,))}, 1.0, 1000, float(second))
    assert not fixed.is_due(plan())


def test_what_is_decided_is_due_until_a_plan_says_it_and_survives_in_the_plan() -> None:
    line = Line().last(20, 2.0)
    links = line.choice.links_of(plan())
    assert links == (LinkPreset(A, B, "home", "int8", "int8"),)
    assert line.choice.is_due(plan())
    assert not line.choice.is_due(plan(links))
    again = choice()
    again.restore(plan(links).links)
    assert again.level((A, B)) == 1
    assert again.links_of(plan()) == links
    again.restore((LinkPreset(A, B, "a preset of another version", "int8", "int8"),))
    assert again.is_due(plan(links)), "it is not known here: back to what the job asks for"


def test_a_peer_that_is_gone_comes_back_with_the_job_s_own_codecs() -> None:
    line = Line().last(20, 2.0)
    line.choice.forget(C)
    assert line.level == 1
    line.choice.forget(B)
    assert line.level == 0


def test_a_plan_with_other_hosts_takes_along_only_the_links_that_it_has() -> None:
    line = Line().last(20, 2.0)
    moved = Plan(TWO, ((0, 3), (3, 6)), ((A, C), (D, B)), A)
    assert line.choice.links_of(moved) == ()
    assert [link[:2] for link in line.choice.links_of(plan())] == [(A, B)]


# ---- what it is told ---------------------------------------------------------------------------


def outlook(rates: dict[Link, float]) -> Outlook:
    found = Outlook(FACTS, manifest(), A)
    for (source, target), rate in rates.items():
        found.measured.linked(source, [LinkReport(target, 0.01, rate)])
    return found


def test_the_load_of_a_line_is_all_that_its_sender_has_to_send_at_measured_rates() -> None:
    some = LinkCodecs((Level("", BoundaryCodecs("none", "bf16")), levels_of(LAN)[-1]))
    # b is the second stage of two slots: its line carries gradients to a and to c.
    both = Plan(ONE, ((0, 3), (3, 6)), ((A, C), (B, B)), A)
    found = outlook({(A, B): 1000.0, (B, A): 500.0, (B, C): 2000.0}).line_loads(both, some)
    values, frames = 8 * 16, 2
    assert found.keys() == {(A, B), (B, A), (B, C)}, "of c's line nobody knows anything"
    assert found[A, B].busy_s[0] == pytest.approx(frames * 4 * values / 1000)
    to_a, to_c = frames * 2 * values / 500, frames * 2 * values / 2000
    assert found[B, A].busy_s[0] == pytest.approx(to_a + to_c)
    slow = frames * (values * 4.5 / 8)
    assert found[B, A].busy_s[1] == pytest.approx(slow / 500 + to_c)
    assert found[B, C].busy_s == pytest.approx((to_a + to_c, to_a + slow / 2000))


def test_computing_is_that_of_the_slowest_machine_once_all_were_seen_at_work() -> None:
    some = outlook({})
    assert some.computing_s(plan()) is None
    for peer, seconds in ((A, 1.0), (B, 3.0), (C, 1.0)):
        some.measured.busy(peer, seconds)
    some.step_done(plan())
    assert some.computing_s(plan()) is None, "of d nobody knows anything"
    some.measured.busy(D, 2.0)
    some.step_done(plan())
    found = some.computing_s(plan())
    assert found is not None
    assert math.isclose(found, 3.0)
