"""A child that hangs is given up; one that works long, or whose daemon was stopped, is not."""

from swarmnode.worker.child_watch import (
    CONFIGURE_S,
    Answered,
    Ask,
    ChildWatch,
    Configuring,
    GiveUp,
    Look,
)

HANG_S = 100.0


class Watching:
    """A watch, the clock, and a child that takes messages in order."""

    def __init__(self) -> None:
        self.watch = ChildWatch(HANG_S)
        self.now_s = 1000.0
        self.num_open = 0
        self.gave_up: list[float] = []

    def feed(self, event: Configuring | Answered | Look) -> None:
        for effect in self.watch.handle(event, self.now_s):
            match effect:
                case Ask():
                    self.num_open += 1
                case GiveUp(silent_s):
                    self.gave_up.append(silent_s)
        assert self.num_open <= 1, "one question at a time"

    def answer(self) -> None:
        self.num_open -= 1
        self.feed(Answered())

    def passes(self, seconds: float, *, is_listening: bool = True) -> None:
        """So much time, with regular looks."""
        for _ in range(round(seconds / self.watch.look_s)):
            self.now_s += self.watch.look_s
            self.feed(Look(is_listening))

    def configured(self) -> "Watching":
        self.feed(Configuring())
        self.passes(20)
        self.answer()
        assert self.num_open == 0
        return self


def test_a_child_that_answers_is_asked_again_and_never_given_up() -> None:
    it = Watching().configured()
    for _ in range(100):
        it.passes(it.watch.look_s)
        assert it.num_open == 1
        it.passes(0.9 * HANG_S)
        it.answer()
    assert it.gave_up == []


def test_a_child_that_hangs_is_given_up_once() -> None:
    it = Watching().configured()
    it.passes(HANG_S)
    assert it.gave_up == []
    it.passes(3 * it.watch.look_s)
    assert len(it.gave_up) == 1
    assert HANG_S < it.gave_up[0] <= HANG_S + 2 * it.watch.look_s
    it.passes(10 * HANG_S)
    assert len(it.gave_up) == 1


def test_nobody_asks_a_child_that_has_no_generation_yet() -> None:
    it = Watching()
    it.passes(10 * HANG_S)
    assert (it.num_open, it.gave_up) == (0, [])


def test_making_ready_may_take_longer_but_not_forever() -> None:
    it = Watching()
    it.feed(Configuring())
    it.passes(CONFIGURE_S - 5)
    assert it.gave_up == []
    it.answer()
    it.passes(HANG_S + 15)
    assert len(it.gave_up) == 1, "what comes after it may not"
    other = Watching()
    other.feed(Configuring())
    other.passes(CONFIGURE_S + 10)
    assert len(other.gave_up) == 1


def test_who_hung_already_when_it_is_to_make_ready_gets_no_longer() -> None:
    it = Watching().configured()
    it.passes(HANG_S / 2)
    it.feed(Configuring())
    it.passes(HANG_S / 2 + 10)
    assert len(it.gave_up) == 1


def test_who_is_to_make_ready_after_long_work_gets_the_time_for_it() -> None:
    it = Watching().configured()
    it.passes(HANG_S / 2)
    it.feed(Configuring())
    it.passes(HANG_S / 4)
    it.answer()
    assert it.num_open == 1, "asked at once: the answer comes behind the order"
    it.passes(CONFIGURE_S - 5)
    assert it.gave_up == []


def test_a_daemon_that_was_stopped_blames_nobody_for_it() -> None:
    it = Watching().configured()
    it.passes(it.watch.look_s)
    for _ in range(5):
        it.now_s += 1000 * HANG_S
        it.feed(Look(is_listening=True))
    assert it.gave_up == []
    it.passes(HANG_S)
    assert len(it.gave_up) == 1, "but time with regular looks counts"


def test_a_daemon_that_cannot_hand_on_what_a_child_said_blames_nobody_for_it() -> None:
    it = Watching().configured()
    it.passes(10 * HANG_S, is_listening=False)
    assert it.gave_up == []
