"""What `bench/e2e.py` prints at the end: the figures, and what they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bench import table
from bench.e2e_compare import Side
from bench.e2e_worker import PHASES, Work

_console = Console(highlight=False)
_QUIET = 0.1  # share of the machine that others may take before the times are doubted


def print_comparison(sides: Sequence[Side], floor: Mapping[str, float], work: Work) -> None:
    """Seconds of each phase of ours and TRL's, their ratio, and each against the floor."""
    grid = Table(title=f"One PPO step, {work.dtype}: seconds, the median of {_counts(sides)}")
    grid.add_column("phase", no_wrap=True)
    for title in ("ours", "TRL", "TRL/ours", "floor", "ours/floor", "TRL/floor"):
        grid.add_column(title, justify="right")
    for phase in (*PHASES, "step"):
        seconds = [side.median(phase) if side.steps else None for side in sides]
        grid.add_row(
            phase,
            *(_number(x) for x in seconds),
            _ratio(seconds[1], seconds[0]),
            _number(floor[phase]),
            *(_ratio(x, floor[phase]) for x in seconds),
            style="bold" if phase == "step" else None,
            end_section=phase in (PHASES[-1], "step"),
        )
    tokens = len(work.prompts) * work.new_tokens
    speeds = [tokens / side.median("step") if side.steps else None for side in sides]
    grid.add_row("response tok/s", *(_number(x) for x in speeds))
    peaks = [side.peak_bytes / 1e9 if side.steps else None for side in sides]
    ratio = _ratio(peaks[1], peaks[0])
    grid.add_row("peak memory, GB", *(_number(x) for x in peaks), ratio)
    _console.print(grid)
    others = max(side.others for side in sides if side.steps)
    if others > _QUIET:
        table.say(
            f"Other processes took up to {others:.0%} of the machine's CPU time in a step: these "
            "times are too long, and not equally on both sides. Measure again on an idle machine."
        )


def print_differences(work: Work) -> None:
    """What is the same on both sides and what is not; TRL's as its source of 1.12.0 has it."""
    same = Table(title="The same on both sides", show_header=False)
    for line in _same(work):
        same.add_row(line)
    different = Table(title="Not the same")
    for title in ("", "ours", "TRL 1.12.0"):
        different.add_column(title)
    for row in _different(work):
        different.add_row(*row)
    _console.print(same)
    _console.print(different)


def _same(work: Work) -> list[str]:
    count, prompt_tokens = len(work.prompts), sum(map(len, work.prompt_ids))
    return [
        "Policy, reference, reward model and critic: one architecture, the same files; the critic "
        "starts from the reward model."
        + " Every weight of policy and critic is trained."
        * (not work.share_base),
        f"{count} prompts, {prompt_tokens} tokens; every response {work.new_tokens} tokens, "
        "whatever is sampled: temperature 1, no top-k, no top-p, all prompts in one batch.",
        f"{work.epochs} epochs of one mini-batch of {count}, so {work.epochs} optimizer steps.",
        "Fused AdamW, learning rate 1e-6, policy and value clip 0.2, gamma 1, lambda 0.95, KL "
        "coefficient 0.05; PyTorch attention, no dropout, no gradient checkpointing.",
    ]


def _different(work: Work) -> list[tuple[str, str, str]]:
    count = len(work.prompts)
    rows = [
        (
            "log-probs before the update",
            "the sampler's where they agree with a pass's to 0.02 nats (in fp32), else that pass",
            "from the sampler's logits, which are kept for every token; no pass",
        ),
        (
            "passes of the update",
            "packed, by tokens, without padding",
            f"{work.micro_batch} sequences, padded",
        ),
        (
            "logits of policy and reference",
            "none; log-probs from hidden states, of response tokens only",
            "of prompt and response tokens",
        ),
        (
            "passes without gradients",
            "likewise, all but the last token",
            f"{count} at once (the setting that also sets the sampling batch), every token",
        ),
        (
            "hidden states",
            "the last layer's",
            "those of every layer are kept until the pass is over",
        ),
        (
            "policy and critic",
            "one backward pass and one optimizer step each, one after the other",
            "one backward pass over the sum of both losses, one optimizer over both",
        ),
        (
            "gradient clipping",
            "to a norm of 1, for each model",
            "none: max_grad_norm is not read",
        ),
        (
            "entropy in the update",
            "in the same pass over the logits as the log-probs",
            "by a softmax over the logits of its own, after each micro-batch",
        ),
        (
            "GAE and rewards",
            "one kernel",
            "a Python loop over tokens",
        ),
        ("responses", "decoded to text", "left as tokens"),
        ("memory that is freed", "kept for the next tensor, as ppo-engine does", "as torch has it"),
    ]
    if work.share_base:
        rows.insert(
            0,
            (
                "what is trained",
                "adapters in the last layers of one base; the layers below are run once",
                "every weight of policy and critic",
            ),
        )
    if work.dtype == "bfloat16":
        rows.insert(
            0,
            (
                "weights, gradients, Adam states",
                "bf16, with the rest of an fp32 master; Adam states fp32",
                "bf16: its sampling does not use mixed precision",
            ),
        )
    return rows


def _counts(sides: Sequence[Side]) -> str:
    counts = [f"{len(side.steps)} ({side.name})" for side in sides if side.steps]
    return " and ".join(counts) + " steps"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ratio(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"
