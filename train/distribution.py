"""Several processes: one model in parts (FSDP2), and states that do not depend on their number.

States are saved whole: `whole` gathers what is sharded, `like` shards it again, for as many
processes as there are then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Result = TypeVar("Result")


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard all parameters over all processes, in place; blocks one by one (FSDP2).

    Units are the members of lists and sequences of like modules: the blocks of every stage. The
    unit that is gathered at a time is then one block, and what is left of the model another.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost members of lists and sequences of modules of the same class."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children())
        alike = isinstance(child, (nn.Sequential, nn.ModuleList)) and len(set(map(type, members)))
        nested = [block for member in members for block in _blocks(member)]
        if alike == 1 and not nested and any(True for _ in child.parameters()):
            found += members
        else:
            found += _blocks(child)
    return found


def whole(value: Any) -> Any:
    """The same nested state with gathered tensors; called in every process.

    What is not sharded is returned as it is.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return [whole(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sharded as `target` is."""
    if not isinstance(target, DTensor) or tensor.shape != target.shape:
        return tensor
    tensor = tensor.to(target.device)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of a whole state.

    Raises:
        KeyError, RuntimeError: it does not fit.
    """
    present = module.state_dict()
    unknown = sorted(state.keys() ^ present.keys())
    if unknown:
        raise KeyError(f"parameters differ: {', '.join(unknown[:5])}")
    module.load_state_dict({name: like(tensor, present[name]) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of a whole state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {
            name: like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What `function` returns or raises in the main process, in every process.

    Raises:
        OSError, ValueError: as `function` does.
    """
    if accelerator.num_processes == 1:
        return function()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
