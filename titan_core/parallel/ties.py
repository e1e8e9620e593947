"""Parameters that several stages of a pipeline use: each has one of its own, and all stay equal.

Each stage adds up what its own use gives of the gradient; the sum over the stages is the gradient of all. From equal
weights, equal gradients and equal states of the optimizer follow equal weights. Stages that lie on one rank train one
parameter, and the others take its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from titan_core.config.schema import Parallelism
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.stages import Cut, rank_of


def by_name(models: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that a rank trains; of those that several of its stages hold, the first stage's."""
    found: dict[str, nn.Parameter] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            found.setdefault(name, parameter)
    return found


@dataclass(frozen=True)
class Ties:
    """The parameters of this rank that other stages have too.

    `followers` are (a parameter, that which another stage on this rank trains); `groups` the parameters that other
    ranks train too, with the ranks that do; `counted_elsewhere` those of them that are another rank's in a norm.
    """

    followers: Sequence[tuple[nn.Parameter, nn.Parameter]]
    groups: Sequence[tuple[nn.Parameter, ProcessGroup]]
    counted_elsewhere: Sequence[nn.Parameter]

    @torch.no_grad()
    def follow(self) -> None:
        """Give followers the numbers of what is trained, before they are used."""
        for follower, trained in self.followers:
            _local(follower).copy_(_local(trained))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Make of each stage's part of a gradient the whole, in fp32 between ranks; after all backwards of a step."""
        for follower, trained in self.followers:
            _local(_grad(trained)).add_(_local(_grad(follower)))
            follower.grad = None
        for parameter, group in self.groups:
            local = _local(_grad(parameter))
            total = local.float()
            dist.all_reduce(total, group=group)
            if total is not local:
                local.copy_(total)


def find(models: Sequence[nn.Module], cuts: Sequence[Cut], mesh: Mesh, config: Parallelism) -> Ties:
    """Return what the stages of this rank, materialised, share with each other and with those of other ranks."""
    trained = by_name(models)
    followers = [
        (parameter, trained[name])
        for model in models
        for name, parameter in model.named_parameters()
        if parameter is not trained[name]
    ]
    every = {name: stages for cut in cuts for name, stages in cut.shared.items()}
    groups, elsewhere = [], []
    for name, stages in sorted(every.items()):
        ranks = [rank_of(config, stage, cuts[0].count) for stage in stages]
        if len(set(ranks)) > 1:
            groups.append((trained[name], mesh.pp_ranks(sorted(set(ranks)))))
            if ranks[0] != mesh.at["pp"]:
                elsewhere.append(trained[name])
    return Ties(followers, groups, elsewhere)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
