"""The widths of one MLA layer, and what follows from them. No torch: plans are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a layer may hold: state-dict names below the attention module, in the order in which they are stored, with the fields
# of `MlaAttention` that they belong to. The one table for writing, reading back and planning.
FIELDS = {
    "q_proj.weight": "q_weight",
    "q_a_proj.weight": "q_a_weight",
    "q_b_proj.weight": "q_b_weight",
    "q_proj.bias": "q_bias",
    "q_b_proj.bias": "q_bias",
    "q_norm.weight": "q_norm_weight",
    "q_head_proj.weight": "q_head_weight",
    "k_proj.weight": "k_weight",
    "k_proj.bias": "k_bias",
    "k_norm.weight": "k_norm_weight",
    "v_proj.weight": "v_weight",
    "v_proj.bias": "v_bias",
    "kv_a_proj_with_mqa.weight": "kv_a_weight",
    "kv_a_proj_with_mqa.bias": "kv_a_bias",
    "kv_a_layernorm.weight": "latent_norm_weight",
    "kv_b_proj.weight": "kv_b_weight",
    "kv_b_proj.bias": "kv_b_bias",
    "o_proj.weight": "o_weight",
    "o_proj.bias": "o_bias",
}


# Numbers that are the same for every layer, and stand in config.json already.
_OF_THE_MODEL = ("num_attention_heads", "num_key_value_heads", "hidden_size")


@dataclass(frozen=True, kw_only=True)
class MlaShape:
    """Widths of one converted layer, in DeepSeek's names.

    `rope_index` says which frequency of the source each rotary pair uses (qk_rope_head_dim / 2 entries); None stands for
    fresh frequencies of the source's rotary type over qk_rope_head_dim, as X-EcoMLA takes them.
    `biases` names the projections that have one: q, kv_a, kv_b, o. `q_norm` is "head" or "all" where queries are normalised
    after q_proj (each head by itself, or all rows together), before q_head_proj maps each head to its un-rotated and rotary
    rows; qk_nope_head_dim is the source's head_dim then. `k_norm` is the same of the keys: the source's k_proj, k_norm and
    v_proj stay, and kv_a_proj_with_mqa reads normalised keys and values of all groups in place of the layer's input; the
    source's head_dim is v_head_dim then, and `biases` may name k and v. `logit_softcap` bounds the scores:
    cap · tanh(score / cap).
    """

    num_attention_heads: int
    hidden_size: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    latent_norm: bool = False
    rope_index: tuple[int, ...] | None = None
    biases: tuple[str, ...] = ()
    q_norm: str | None = None
    k_norm: str | None = None
    logit_softcap: float | None = None
    num_key_value_heads: int = 0

    @property
    def key_value_width(self) -> int:
        """Rows of the source's k_proj, and of its v_proj, where they stay."""
        return self.num_key_value_heads * self.v_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: its un-rotated rows, then its rotary rows."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: the latent and the one rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def layer_fields(self) -> dict[str, Any]:
        """What config.json says of the layer: everything but the numbers of the whole model."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_MODEL}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """State-dict names below the attention module, with shapes, in the order in which they are stored."""
        heads, rank = self.num_attention_heads, self.kv_lora_rank
        rows = {
            **self._query_rows(),
            **self._key_value_rows(),
            "kv_b_proj": (heads * (self.qk_nope_head_dim + self.v_head_dim), rank),
            "o_proj": (self.hidden_size, heads * self.v_head_dim),
        }
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in rows.items()}
        bias_of = {"q_proj": "q", "q_b_proj": "q", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b", "o_proj": "o"}
        bias_of |= {"k_proj": "k", "v_proj": "v"}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in rows.items() if bias_of.get(name) in self.biases}
        if self.q_norm is not None:
            shapes["q_norm.weight"] = (self.qk_nope_head_dim * (heads if self.q_norm == "all" else 1),)
            shapes["q_head_proj.weight"] = (heads * self.qk_head_dim, self.qk_nope_head_dim)
        if self.k_norm is not None:
            shapes["k_norm.weight"] = (self.key_value_width if self.k_norm == "all" else self.v_head_dim,)
        if self.latent_norm:
            shapes["kv_a_layernorm.weight"] = (rank,)
        return {name: shapes[name] for name in sorted(shapes, key=list(FIELDS).index)}

    def _key_value_rows(self) -> dict[str, tuple[int, int]]:
        if self.k_norm is None:
            return {"kv_a_proj_with_mqa": (self.cache_width, self.hidden_size)}
        kept = (self.key_value_width, self.hidden_size)
        return {"k_proj": kept, "v_proj": kept, "kv_a_proj_with_mqa": (self.cache_width, 2 * self.key_value_width)}

    def _query_rows(self) -> dict[str, tuple[int, int]]:
        width = self.num_attention_heads * (self.qk_head_dim if self.q_norm is None else self.qk_nope_head_dim)
        if self.q_lora_rank is None:
            return {"q_proj": (width, self.hidden_size)}
        return {"q_a_proj": (self.q_lora_rank, self.hidden_size), "q_b_proj": (width, self.q_lora_rank)}
