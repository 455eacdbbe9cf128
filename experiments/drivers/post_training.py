"""What follows pre-training, by compiled steps: supervised fine-tuning, preferences (DPO), and rewards (PPO, GRPO).

Updates are training steps of their own objective; a reference, or who judges, is a forward pass (`score`); an answer is
written by decode steps, `rollouts` of them at a time. How much there is of each is assumed (`post.*`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ...profiling.assumptions import Assumptions
from ...profiling.price import SECONDS_PER_HOUR
from ..flags import UsageError
from .driver import Bills, bill
from .serving import fewest_chips
from .sweep import Point, mesh_of

STAGES = {"sft": "fine-tuning", "preference": "preferences", "policy": "rewards"}


@dataclass(frozen=True)
class Pass:
    """One kind of step in a stage. tokens: that it handles; hours: of a chip, as fast as it is taken to run."""

    stage: str
    name: str
    tokens: float
    point: Point
    hours: float


def points(step: Point, rollouts: int, known: Assumptions) -> dict[str, Point]:
    """The steps beside that of pre-training, `step`, whose context all sequences are packed to.

    Where its mesh is still to be found, an update is that step itself: its loss is another, its products are the same.
    """
    config = step.config
    prompt, answer = (known.whole(f"post.policy.{name}_tokens") for name in ("prompt", "answer"))
    longest = prompt + answer
    writer = replace(config, remat="none", max_context=max(longest, config.max_context))
    shared = fewest_chips(writer, step.target, rollouts, longest)
    alone = fewest_chips(writer, step.target, 1, step.context)
    found = {
        "score": Point(writer, "score", 1, step.context, step.target, alone),
        "read": Point(writer, "prefill", 1, prompt, step.target, shared),
        # Time grows with the cache in a line: that of all steps of an answer is that of the middle one.
        "write": Point(writer, "decode", rollouts, prompt + answer // 2, step.target, shared),
    }
    if step.batch is None:
        return found | {"preference": step, "policy": step}
    pairs = replace(step, objective="preference", batch=max(step.batch, 2 * mesh_of(step.mesh).get("data", 1)))
    if pairs.batch is None or pairs.batch % 2:
        raise UsageError(f"--sequences: {pairs.batch} of them in a step cannot be pairs")
    return found | {"preference": pairs, "policy": replace(step, objective="policy")}


def passes(step: Point, steps: Mapping[str, Point], bills: Bills, known: Assumptions, slower: float) -> Iterator[Pass]:
    """Every pass of the three stages.

    slower: than its roofline, by so many times, is training as it runs; writing is by serving.roofline_share.
    """

    def done(stage: str, name: str, tokens: float, point: Point, times: float = slower) -> Pass:
        found = bill(bills, point)
        if not found.timed:
            raise UsageError(f"--target={point.target}: its step times are not known")
        handled = (point.batch or found.program["batch"]) * (1 if point.step == "decode" else point.context)
        seconds = found.total.seconds * found.program["chips"] / handled
        return Pass(stage, name, tokens, point, tokens * seconds * times / SECONDS_PER_HOUR)

    def amount(name: str) -> float:
        return known.number(f"post.{name}")

    tokens = amount("sft.examples") * amount("sft.tokens") * amount("sft.epochs")
    yield done("sft", "update", tokens, step)
    tokens = 2 * amount("preference.pairs") * amount("preference.tokens")
    yield done("preference", "reference", tokens, steps["score"])
    yield done("preference", "update", tokens * amount("preference.epochs"), steps["preference"])
    answers, prompt, answer = amount("policy.answers"), amount("policy.prompt_tokens"), amount("policy.answer_tokens")
    served, each = 1 / known.number("serving.roofline_share"), answers * (prompt + answer)
    yield done("policy", "rollout: reading", answers / amount("policy.group") * prompt, steps["read"], served)
    yield done("policy", "rollout: writing", answers * answer, steps["write"], served)
    yield done("policy", "reward", each * amount("policy.judged"), steps["score"])
    yield done("policy", "reference", each, steps["score"])
    yield done("policy", "as written", each, steps["score"])
    yield done("policy", "update", each * amount("policy.epochs"), steps["policy"])
