"""The ops of latent attention: one file each, with schema, reference, fake and autograd; the kernels are in csrc/."""

from xeco_convert.ops._latent_attention import latent_attention
from xeco_convert.ops._latent_attention_decode import latent_attention_decode
from xeco_convert.ops._latent_attention_packed import latent_attention_packed
from xeco_convert.ops._pack_rows import pack_rows
from xeco_convert.ops._rope_and_append import rope_and_append

__all__ = ["latent_attention", "latent_attention_decode", "latent_attention_packed", "pack_rows", "rope_and_append"]
