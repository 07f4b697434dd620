"""What happens beside the steps of a training: a bar, an early end, and an end at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from oneplusn.adapters.training.metrics import TaskLosses
from oneplusn.errors import InvalidRequest

EVAL_LOSS = "eval_loss"


class ProgressBar(TrainerCallback):
    """One bar over all steps with the last loss, and a line for every validation."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Open the bar, where a resumed run goes on."""
        del args, control
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Move the bar."""
        del args, control
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,  # noqa: ANN401 - logs among them
    ) -> None:
        """Show the loss."""
        del args, control
        logs: Mapping[str, float] = given["logs"]
        if self._bar is None:
            return
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
        if EVAL_LOSS in logs:
            figures = [
                f"{task} {logs[key]:.4f}"
                for task in self._tasks
                if (key := f"eval_{task}_loss") in logs
            ]
            line = f"step {state.global_step}: validation loss {logs[EVAL_LOSS]:.4f}"
            self._bar.write(f"{line} ({', '.join(figures)})")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Close the bar."""
        del args, state, control
        self.close()

    def close(self) -> None:
        """Close the bar, after a failure too."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def is_over(history: Sequence[Mapping[str, float]], patience: int | None) -> bool:
    """Say whether so many validations in a row brought nothing better.

    It reads the history alone, which a checkpoint holds, so that a resumed run stops where the
    run would have stopped.
    """
    losses = [row[EVAL_LOSS] for row in history if EVAL_LOSS in row]
    if patience is None or not losses:
        return False
    finite = [math.inf if math.isnan(loss) else loss for loss in losses]
    return len(finite) - 1 - finite.index(min(finite)) >= patience


class EarlyEnd(TrainerCallback):
    """Stops a training whose validation does not get better."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Look back over the validations."""
        del args
        if is_over(state.log_history, self._patience):
            control.should_training_stop = True


class Watchdog(TrainerCallback):
    """Ends a training before a gradient that is not finite reaches the parameters.

    Gradients are the mean over all processes, so all of them see it and end in the same step.
    """

    def __init__(
        self,
        losses: TaskLosses,
        tasks: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Watch.

        Args:
            losses: of the current step.
            tasks: names.
            parameters: trained ones.
            reduce: see `TaskLosses.means`.
        """
        self._losses = losses
        self._tasks = tasks
        self._parameters = parameters
        self._reduce = reduce

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Forget the losses of the step before."""
        del args, state, control
        self._losses.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Check the gradient.

        Raises:
            InvalidRequest: It is not finite.
        """
        del control
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if math.isfinite(get_total_norm(grads)):
            return
        means = self._losses.means(self._reduce)
        named = {t: m for t, m in zip(self._tasks, means, strict=True) if m is not None}
        broken = [task for task, mean in named.items() if not math.isfinite(mean)]
        if broken:
            what = f"the loss of {_listed(broken)} is {named[broken[0]]}"
        else:
            worst = max(named, key=lambda task: named[task])
            what = (
                "the gradient is not finite, though every task's loss is; the largest is"
                f" {named[worst]:.4g} of {_listed([worst])}"
            )
        raise InvalidRequest(
            f"step {state.global_step + 1}: {what}. Look at its examples, or begin again with lower"
            f" rates (learning_rate is {args.learning_rate:g}) or a longer warmup."
            f"{_kept(args, state)}",
            code="training_diverged",
        )


def _listed(tasks: Sequence[str]) -> str:
    return ("task " if len(tasks) == 1 else "tasks ") + ", ".join(map(repr, tasks))


def _kept(args: TrainingArguments, state: TrainerState) -> str:
    last = state.global_step - state.global_step % max(1, int(args.save_steps))
    if args.save_strategy == SaveStrategy.NO or not last:
        return ""
    return f" checkpoint-{last} is kept: --finish makes an adapter of the best that there is"
