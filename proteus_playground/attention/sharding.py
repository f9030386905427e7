"""One attention layer on several devices, each of which holds some of its KV groups (tensor parallelism over heads).

A group's queries, keys, values, prototypes and router rows concern that group alone. So each device runs an ordinary
layer of G / n groups, and the outputs of the n devices are added up: one all-reduce of `(B, T, D)` per forward pass
and one per backward pass, as in Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). Salience alone is
a mean over all groups, so it is averaged over the devices: `(B, T)` numbers where tokens are dropped.

Axes: `B` batch, `T` tokens, `D` model width, `G` KV groups, `d` head dim, `n` devices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from .config import AttentionConfig
from .gates import Gates
from .heads import is_bare
from .layer import ProteusAttention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LAST_BIAS = "o_proj.bias"  # is added once, by the first device


class GroupShard(ProteusAttention):
    """One device's KV groups of a layer. `shard_groups` makes it.

    All devices call the same methods with the same x, and get the same output of the whole layer: `forward`, `prefill`
    and `decode`. Statistics, traces and KV banks are those of this device's heads. A weight lies on one device only, so
    the squared norm of a gradient is the sum over the devices.
    """

    def __init__(self, cfg: AttentionConfig, mesh: DeviceMesh):
        super().__init__(cfg)
        self.mesh = mesh
        sizes = (cfg.n_kv_heads, cfg.gates_per_group, cfg.head_dim, cfg.heads_per_group, cfg.ema_decay)
        self.gates = _SharedGates(mesh, *sizes)
        if mesh.get_local_rank():
            self.o_proj.bias = None

    def forward(self, x: Tensor, **how):
        """As `ProteusAttention.forward`, `(B, T, D)` to `(B, T, D)`; a backward pass adds up the gradients of x."""
        if getattr(x, "requires_grad", False):
            x = DTensor.from_local(x, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        return super().forward(x, **how)

    def save(self, path: str | Path) -> Path:
        """Write the whole layer, as `ProteusAttention.save` does. All devices call this; the first one writes.

        The others return the path at once, where the file may not be yet.
        """
        whole = join_groups(self)
        return Path(path) if self.mesh.get_local_rank() else whole.save(path)

    def _fast_path(self, x: Tensor, *how) -> Tensor | None:
        y = super()._fast_path(x, *how)
        return None if y is None else add_up(y, self.mesh)

    def _project_out(self, *heads) -> Tensor:
        return add_up(super()._project_out(*heads), self.mesh)


class _SharedGates(Gates):
    """Gates of one device's groups, whose salience is the mean over the groups of all devices."""

    def __init__(self, mesh: DeviceMesh, *sizes):
        super().__init__(*sizes)
        self.mesh = mesh

    def salience(self, k: Tensor) -> Tensor:
        return add_up(super().salience(k), self.mesh) / self.mesh.size()


def shard_groups(attn: ProteusAttention, mesh: DeviceMesh) -> GroupShard:
    """This device's part of a layer, on the mesh's device type; all devices of the mesh call this.

    mesh: of one axis, whose size n divides G, for instance `init_device_mesh("cuda", (n,))`. The values are those of
    the first device's `attn`; its hooks are not taken over. Outputs and gradients are those of `attn` up to rounding,
    in which a token whose salience is at the threshold may go either way, for all devices alike. In training a gate
    that is hardly used moves to the key that fits worst in this device's groups, instead of in all. Change gates
    (`surgery`) before this. Raises `TypeError` for an adapted projection or another kind of `attn` or `mesh`,
    `ValueError` for a mesh that does not fit.
    """
    _check(attn, mesh)
    n, cfg = mesh.size(), attn.cfg
    with torch.device("meta"):
        part = GroupShard(replace(cfg, n_heads=cfg.n_heads // n, n_kv_heads=cfg.n_kv_heads // n), mesh)
    mine = {name: distribute_tensor(x, mesh, [_placement(name)]) for name, x in attn.state_dict().items()}
    part.load_state_dict({name: mine[name].to_local().clone() for name in part.state_dict()}, assign=True)
    for name, weight in part.named_parameters():
        weight.requires_grad_(attn.get_parameter(name).requires_grad)
    return part.train(attn.training)


@torch.no_grad()
def join_groups(part: GroupShard) -> ProteusAttention:
    """The whole layer of which `part` is this device's share, on every device. All devices call this.

    A weight that is frozen in `part` is frozen in the layer.
    """
    if not isinstance(part, GroupShard):
        raise TypeError(f"part={type(part).__name__}: expected GroupShard, from shard_groups")
    n, cfg, held = part.mesh.size(), part.cfg, part.state_dict()
    with torch.device("meta"):
        whole = ProteusAttention(replace(cfg, n_heads=cfg.n_heads * n, n_kv_heads=cfg.n_kv_heads * n))
    joined = {}
    for name in whole.state_dict():  # in one order, in which all devices exchange them
        mine = held[name] if name in held else part.o_proj.weight.new_zeros(cfg.d_model)
        placement = Partial() if name == LAST_BIAS else _placement(name)
        joined[name] = DTensor.from_local(mine, part.mesh, [placement]).full_tensor().clone()
    whole.load_state_dict(joined, assign=True)
    for name, weight in part.named_parameters():
        whole.get_parameter(name).requires_grad_(weight.requires_grad)
    return whole.train(part.training)


def add_up(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all devices' x, on each of them; in a backward pass its gradient as it is."""
    return DTensor.from_local(x, mesh, [Partial()]).full_tensor()


def _placement(name: str) -> Placement:
    """How a tensor of the layer's state is divided: by groups, which are its first axis but in o_proj's weight.

    o_proj's bias is copied out to all devices, of which only the first keeps it.
    """
    if name == LAST_BIAS or "quantiles" in name:
        return Replicate()
    return Shard(1 if name == "o_proj.weight" else 0)


def _check(attn: ProteusAttention, mesh: DeviceMesh) -> None:
    if type(attn) is not ProteusAttention:
        raise TypeError(f"attn={type(attn).__name__}: expected ProteusAttention, whole")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh={type(mesh).__name__}: expected a DeviceMesh, from init_device_mesh")
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} axes {mesh.mesh_dim_names or ''}: must have one, such as mesh['name']")
    if attn.cfg.n_kv_heads % mesh.size():
        raise ValueError(f"n_kv_heads={attn.cfg.n_kv_heads}: must be a multiple of the mesh's {mesh.size()} devices")
    for name in PROJECTIONS:
        if not is_bare(proj := getattr(attn, name)):
            raise TypeError(
                f"{name} is a {type(proj).__module__}.{type(proj).__qualname__}: must be an nn.Linear without hooks, "
                "because its weight is divided; merge adapters first"
            )
