"""Latent-attention operations: one file each, with the reference in plain torch and the choice of implementation."""

from xeco_convert.ops.latent_attention import latent_attention, latent_attention_reference

__all__ = ["latent_attention", "latent_attention_reference"]
