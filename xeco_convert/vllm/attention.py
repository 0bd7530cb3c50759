"""The attention of a converted layer in vLLM: its tensors by the project's table, its cache vLLM's for latents.

Letters: T tokens of all requests, H heads of this rank, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim,
R kv_lora_rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from xeco_convert.errors import CheckpointError
from xeco_convert.modeling.configuration_xeco import norm_eps
from xeco_convert.modeling.layer_xeco import MlaLayer, MlaShape
from xeco_convert.vllm.backends import make_latent_attention
from xeco_convert.vllm.rotary import LatentRotary

# How ranks of a tensor-parallel group share the projections: these by heads, all others whole.
_BY_HEADS = {"q_proj": ColumnParallelLinear, "q_b_proj": ColumnParallelLinear, "kv_b_proj": ColumnParallelLinear}
_BY_HEADS["o_proj"] = RowParallelLinear
# Not modules of their own: what attention takes per head.
_HEAD_TENSORS = ("q_head_proj.weight", "kv_b_proj.bias")


class VllmLatentAttention(nn.Module):
    """Latent attention in place of the attention of a vLLM decoder layer, with its call."""

    # made by `_build_projections`, those that the layer has: vLLM's linear layers, which return a pair
    q_proj: Any
    q_a_proj: Any
    q_b_proj: Any
    k_proj: Any
    v_proj: Any
    kv_a_proj_with_mqa: Any
    kv_b_proj: Any
    o_proj: Any
    q_head_weight: nn.Parameter
    value_bias: nn.Parameter | None

    def __init__(
        self,
        config: Any,
        layer: MlaLayer,
        rotary: LatentRotary | None,
        *,
        scaling: float,
        window: int | None,
        vllm_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.shape = layer.in_model(config)
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads = config.num_attention_heads // ranks
        self.rotary_emb = rotary
        self._build_projections(self.shape, norm_eps(config), vllm_config.quant_config, prefix)
        self.attn = make_latent_attention(
            layer,
            num_heads=self.num_heads,
            scale=scaling,
            window=window,
            kv_b_proj=self.kv_b_proj,
            vllm_config=vllm_config,
            prefix=f"{prefix}.attn",
        )

    def _build_projections(self, shape: MlaShape, eps: float, quant_config: Any, prefix: str) -> None:
        """A module for each tensor of the layer's table, None for the norms that it has not; quantised as vLLM was told to."""
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        self.kv_a_layernorm: nn.RMSNorm | None = None
        self.register_parameter("q_head_weight", None)
        self.register_parameter("value_bias", None)
        tensors = shape.tensors()
        for name, size in tensors.items():
            module, _, part = name.rpartition(".")
            if name == "q_head_proj.weight":
                self.q_head_weight = _empty_parameter(self.num_heads, shape.qk_head_dim, size[1])
            elif name == "kv_b_proj.bias":
                self.value_bias = _empty_parameter(self.num_heads * shape.v_head_dim)
            elif part == "weight" and len(size) == 1:
                setattr(self, module, nn.RMSNorm(*size, eps=eps))
            elif part == "weight":
                has_bias = f"{module}.bias" in tensors and f"{module}.bias" not in _HEAD_TENSORS
                linear = _BY_HEADS.get(module, ReplicatedLinear)
                names = {"quant_config": quant_config, "prefix": f"{prefix}.{module}"}
                setattr(self, module, linear(size[1], size[0], bias=has_bias, **names))

    def forward(self, positions: Tensor, hidden_states: Tensor, **_: Any) -> Tensor:
        """positions [T], hidden_states [T, hidden] -> [T, hidden]."""
        queries = self._queries(hidden_states)
        c_kv, k_rope = self._latents(hidden_states)
        k_rope = k_rope.unsqueeze(1)
        if self.rotary_emb is not None:
            q_nope, q_rope = queries.split([self.layer.qk_nope_head_dim, self.layer.qk_rope_head_dim], dim=-1)
            q_rope, k_rope = self.rotary_emb(positions, q_rope, k_rope)
            queries = torch.cat([q_nope, q_rope], dim=-1)
        size = torch.Size((hidden_states.shape[0], self.num_heads * self.layer.v_head_dim))
        out = self.attn(queries, c_kv, k_rope, output_shape=size)
        if self.value_bias is not None:  # weights of a softmax sum to 1, so values' bias comes out as it went in
            out = out + self.value_bias
        projected: Tensor = self.o_proj(out)[0]
        return projected

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """[T, H, N + P], not yet rotated."""
        if self.layer.q_lora_rank is None:
            rows = self.q_proj(hidden_states)[0]
        else:
            rows = self.q_b_proj(self.q_a_proj(hidden_states)[0])[0]
        heads: Tensor = rows.unflatten(-1, (self.num_heads, -1))
        if self.q_norm is None:
            return heads
        return torch.einsum("thn,hmn->thm", self.q_norm(heads), self.q_head_weight)

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [T, R] and shared rotary key [T, P], not yet rotated."""
        inputs = hidden_states if self.k_norm is None else self._keys_and_values(hidden_states, self.k_norm)
        rows = self.kv_a_proj_with_mqa(inputs)[0]
        c_kv, k_rope = rows.split([self.layer.kv_lora_rank, self.layer.qk_rope_head_dim], dim=-1)
        return c_kv if self.kv_a_layernorm is None else self.kv_a_layernorm(c_kv), k_rope

    def _keys_and_values(self, hidden_states: Tensor, norm: nn.RMSNorm) -> Tensor:
        """Normalised keys of all groups, not rotated, then their values [T, 2·G·V]: on every rank, whose latents are whole."""
        keys = self.k_proj(hidden_states)[0].unflatten(-1, (-1, norm.weight.numel()))
        return torch.cat([norm(keys).flatten(-2), self.v_proj(hidden_states)[0]], dim=-1)

    def load_weight(self, name: str, tensor: Tensor) -> str:
        """Load a tensor of the checkpoint, by its name below this module; returns the parameter that it became.

        Raises `CheckpointError` for a tensor that the layer has not, or in another size.
        """
        parameters = dict(self.named_parameters())
        try:
            if name in _HEAD_TENSORS:
                return self._load_heads(name, tensor)
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
        except (KeyError, RuntimeError, AssertionError):
            expected = self.shape.tensors().get(name)
            raise CheckpointError(
                f"{name} {list(tensor.shape)}: expected {'no such tensor' if expected is None else list(expected)} by mla_layers "
                "in config.json; take the folder as xeco-convert wrote it."
            ) from None
        return name

    def _load_heads(self, name: str, tensor: Tensor) -> str:
        """q_head_proj, and the values' part of kv_b_proj's bias (softmax ignores that of the un-rotated keys)."""
        heads = tensor.unflatten(0, (self.shape.num_attention_heads, -1))
        own = heads.narrow(0, get_tensor_model_parallel_rank() * self.num_heads, self.num_heads)
        if name == "q_head_proj.weight":
            self.q_head_weight.data.copy_(own)
            return "q_head_weight"
        assert self.value_bias is not None
        self.value_bias.data.copy_(own[:, self.layer.qk_nope_head_dim :].flatten())
        return "value_bias"


def _empty_parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size), requires_grad=False)
