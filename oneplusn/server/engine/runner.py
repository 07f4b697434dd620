"""Run the model on what the scheduler picked."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from oneplusn.adapters.attach import attach
from oneplusn.adapters.pool import Pool
from oneplusn.errors import ModelRefused, OneplusnError
from oneplusn.kernels.cpu_attention import AttentionMeta
from oneplusn.kernels.plan import BASE_SLOT, StepContext, StepHandle, build_plan
from oneplusn.kernels.tuning import tile_rows
from oneplusn.server.engine.attention import AttentionHook, KVCache
from oneplusn.server.engine.batch import StepBatch, build_batch
from oneplusn.server.engine.families import model_logits
from oneplusn.server.engine.model import LoadedModel
from oneplusn.server.engine.scheduler import Schedule


class Runner:
    """One model with its adapters and its KV cache, ready to run steps.

    Attributes:
        hook: The model's attention; counts its calls.
    """

    def __init__(self, loaded: LoadedModel, pool: Pool, cache: KVCache) -> None:
        """Wrap the model's linears and take its attention over; it is this runner's from now on.

        Args:
            loaded: The base model.
            pool: Where the adapters of its sites are resident.
            cache: Keys and values of its layers.

        Raises:
            ModelRefused: The model does more with its linears than call them.
        """
        self._model = loaded.model
        self._pool = pool
        self._block_size = cache.block_size
        self._handle = StepHandle()
        self.hook = AttentionHook(self._handle, cache)
        self._model.set_attn_implementation(self.hook.name)
        self._attached = attach(self._model, pool.sites, self._handle)
        self._rehearse()

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> Tensor:
        """Compute one step, all tasks mixed in one forward pass.

        Returns:
            Logits [M, V] of the rows that are sampled, in the order of `schedule.sampled`, in the
            model's dtype.

        Raises:
            OneplusnError: The model did not call its linears as their sites say.
        """
        return self._run(build_batch(schedule, self._block_size))

    def close(self) -> None:
        """Give the model back as it was, and drop the KV cache."""
        self._attached.detach()
        self._model.set_attn_implementation("eager")
        self.hook.close()

    def _run(self, batch: StepBatch) -> Tensor:
        row_slots = batch.row_slots.tolist()
        plan = build_plan(row_slots, self._pool.slots, tile_rows=tile_rows(len(row_slots)))
        self._handle.current = StepContext(plan, _attention_meta(batch, self._block_size))
        try:
            logits = model_logits(
                self._model,
                torch.from_numpy(batch.token_ids),
                torch.from_numpy(batch.positions),
                torch.from_numpy(batch.sample_rows),
            )
        except BaseException:
            # What a step that broke off has computed ahead is no reason for a second error.
            with suppress(OneplusnError):
                self._attached.check_step_end()
            raise
        finally:
            self._handle.current = None
        self._attached.check_step_end()
        return logits

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Run one token of the bare base, in a block that holds nothing yet.

        Raises:
            ModelRefused: The model does more with its linears than call them.
        """
        one, zero = np.ones(1, np.int32), np.zeros(1, np.int64)
        batch = StepBatch(
            token_ids=zero,
            positions=zero,
            kv_pos=zero,
            query_start=np.array([0, 1], np.int32),
            context_lens=one,
            block_tables=np.zeros((1, 1), np.int32),
            row_slots=np.full(1, BASE_SLOT, np.int32),
            sample_rows=zero,
            num_decodes=1,
        )
        try:
            self._run(batch)
        except AttributeError as error:
            msg = (
                f"{type(self._model).__name__} is refused: it reads its linears' weights itself "
                f"({error}), so it would miss what adapters add"
            )
            raise ModelRefused(msg) from error
        self.hook.calls = [0] * len(self.hook.calls)


def _attention_meta(batch: StepBatch, block_size: int) -> AttentionMeta:
    """Take the arrays that attention reads over from the batch, without copying."""
    return AttentionMeta(
        kv_pos=torch.from_numpy(batch.kv_pos),
        query_start=torch.from_numpy(batch.query_start),
        context_lens=torch.from_numpy(batch.context_lens),
        block_tables=torch.from_numpy(batch.block_tables),
        block_size=block_size,
        num_decodes=batch.num_decodes,
    )
