"""Mathematics: the weights of one attention layer in, those of its MLA form out. Opens no file, knows no family."""

from xeco_convert.factorize.layer_weights import MlaAttention, SourceAttention

__all__ = ["MlaAttention", "SourceAttention"]
