"""What a worker says to a coordinator that asks: its promise, and what it holds."""

from swarmnode.domain import Plan
from swarmnode.messages import Answer, Assign, Inquire
from swarmnode.worker.state_keeper import StateKeeper
from swarmnode.worker.tenancy import Tenancy


def refusal(tenancy: Tenancy, inquire: Inquire, *, in_touch: bool) -> Answer:
    """What somebody hears who may not ask: whom to leave it to, and nothing else."""
    promised, promised_to = tenancy.promised, tenancy.promised_to
    return Answer(
        tenancy.job, inquire.generation, False, promised, promised_to, (), (),
        in_touch=in_touch, is_over=tenancy.is_over, adopted=tenancy.adopted,
    )  # fmt: skip


def answer(
    message: Inquire | Assign,
    tenancy: Tenancy,
    keeper: StateKeeper,
    prepared_plan: Plan | None,
    *,
    is_granted: bool,
    is_warm: bool,
    in_touch: bool,
    vote: bytes = b"",
) -> Answer:
    """What somebody hears who may; `prepared_plan` says what is held where none was adopted."""
    plan = tenancy.plan or prepared_plan
    fence = message.plan.generation if isinstance(message, Assign) else message.generation
    return Answer(
        job=tenancy.job,
        generation=fence,
        granted=is_granted,
        promised=tenancy.promised,
        promised_to=tenancy.promised_to,
        held=() if plan is None else keeper.held(plan),
        ready=keeper.readies(),
        vote=vote,
        is_warm=is_warm,
        in_touch=in_touch,
        is_new=tenancy.plan is None,
        is_over=tenancy.is_over,
        adopted=tenancy.adopted,
    )
