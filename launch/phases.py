"""The engine of every phase of a stage, by either of two methods (`train.phase_method`).

rebuild: a new engine for every phase, from the consolidated checkpoint of the one before; what is frozen has neither
gradients nor optimizer state. zero_lr: one engine with all parameters in the optimizer; what is frozen has the
learning rate 0 (weight decay is multiplied by it), and its gradients are zeroed as they arise, so that they count for
nothing in the clipping norm. Flipping `requires_grad` on a live ZeRO-3 engine would be silently wrong.

Both train alike: at the switch the optimizer's moments begin at zero, for all parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from launch import resume, tasks
from launch.checkpoints import Checkpoint
from launch.construction import build_split
from launch.deepspeed_config import deepspeed_config
from launch.engine import build_engine
from launch.gradients import trained_parameters
from launch.optimizer import parameter_groups
from launch.shards import ShardedState
from launch.task import Phase, Task


class Phases:
    """Makes the engine of one phase after another."""

    def __init__(self, task: Task, precision: Literal["bf16", "fp32"], device: torch.device):
        self._task, self._precision, self._device = task, precision, device
        self._train = task.config.train
        self._engine: deepspeed.DeepSpeedEngine | None = None
        self._hooks: list[Any] = []

    def enter(
        self, phase: Phase, resumed: Checkpoint | None
    ) -> tuple[deepspeed.DeepSpeedEngine, dict[str, Any] | None]:
        """The engine for a phase.

        Args:
            resumed: the checkpoint to go on from, of this phase or the end of the one before.

        Returns:
            The engine, and what this rank had saved in `resumed` if that is of this phase.
        """
        keeps_engine = self._train.phase_method == "zero_lr"
        same_phase = resumed is not None and resumed.state.phase == phase.name
        rank_state = None
        if self._engine is None:
            loads_all = resumed is not None and (same_phase or keeps_engine)
            self._engine = self._build(phase, resumed, loads_all)
            if loads_all:
                assert resumed is not None
                rank_state = resume.load(self._engine, resumed)
        if keeps_engine:
            self._freeze(phase)
            if resumed is not None and not same_phase:
                reset_moments(self._engine)
        return self._engine, rank_state if same_phase else None

    def leave(self) -> None:
        """The phase is over; with `rebuild` this makes room for the next, if the caller holds no engine either."""
        if self._train.phase_method == "rebuild":
            self._engine = None

    def _build(self, phase: Phase, resumed: Checkpoint | None, loads_all: bool) -> deepspeed.DeepSpeedEngine:
        task, train = self._task, self._train

        def fill(model: nn.Module) -> None:
            if resumed is None:
                task.initialize(model)
            elif not loads_all:
                tasks.load_state(model, ShardedState(resumed), resumed.directory)

        torch.manual_seed(task.config.seed)
        if train.zero_stage == 3 and dist.get_world_size() > 1:
            dtype = torch.bfloat16 if self._precision == "bf16" else torch.float32
            config = deepspeed_config(train, self._precision, dist.get_world_size())
            model = build_split(task.create_model, None if loads_all else fill, config, dtype, self._device)
        else:
            model = task.create_model()
            fill(model)
        frozen: list[nn.Parameter] = []
        if train.phase_method == "rebuild":
            task.set_phase(model, phase)
            frozen = list(task.frozen_parameters(model, phase))
        groups = parameter_groups(model, task.backbone_parameters(model), train)
        engine = build_engine(model, groups, train, self._precision)
        check_trained(engine, frozen)
        return engine

    def _freeze(self, phase: Phase) -> None:
        for hook in self._hooks:
            hook.remove()
        assert self._engine is not None
        frozen = self._task.frozen_parameters(self._engine.module, phase)
        self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in frozen]


def check_trained(engine: deepspeed.DeepSpeedEngine, frozen: list[nn.Parameter]) -> None:
    """Make sure that the engine trains all parameters but the frozen ones.

    Raises:
        RuntimeError: it does not; names what differs.
    """
    trained = {id(parameter) for parameter in trained_parameters(engine)}
    left_out = {id(parameter) for parameter in frozen}
    wrong = [
        f"{name} is {'trained' if id(parameter) in trained else 'not trained'}"
        for name, parameter in engine.module.named_parameters()
        if (id(parameter) in trained) == (id(parameter) in left_out)
    ]
    if wrong:
        raise RuntimeError("the engine does not train what the phase says: " + "; ".join(wrong[:10]))


def reset_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let the optimizer start afresh, with its bias correction, as a new engine would."""
    for state in engine.basic_optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                state[name] = 0
