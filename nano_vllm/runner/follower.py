"""A rank that does what the deciding one says."""

from __future__ import annotations

import signal

import torch

from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import Launch
from nano_vllm.runner.model_worker import ModelWorker
from nano_vllm.runner.step_message import Step, StepReceiver
from nano_vllm.sampling.gathering import LIKELIEST


class Follower(ModelWorker):
    """Any rank but the first."""

    def __init__(self, config: EngineConfig, launch: Launch) -> None:
        super().__init__(config, launch=launch)

    def run(self) -> None:
        """Until it is told to stop."""
        assert self.channel is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the deciding rank gets them too, and says
        receiver = StepReceiver(self.channel)
        try:
            while (step := receiver.receive(self._staging_of)) is not None:
                self.parallel.progress.step += 1
                self._execute(step)
        except BaseException as error:
            self.parallel.fail(error)
            raise
        self.close()

    def _staging_of(self, slot: int) -> torch.Tensor:
        return self.input_batch.slots[slot].wait()

    @torch.inference_mode()
    def _execute(self, step: Step) -> None:
        inputs = self.prepare(step)
        out = self.forward(step, inputs)
        if not self.stage.is_last:
            return
        logits = self.sampled_logits(step, inputs, out)
        for first, last in step.logit_ranges:
            self.gather(self.model.compute_logits(out[first:last]))
        if step.num_candidates == LIKELIEST:
            self._token_ids = self.likeliest(logits)
        else:
            self.gather(logits, step.num_candidates)
            self._token_ids = torch.empty(len(logits), dtype=torch.int64, device=self.device)
            self.parallel.tp.broadcast(self._token_ids)
