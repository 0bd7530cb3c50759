"""The source's tokenizer: loaded as transformers loads it, compared by the ids that it gives, and kept by what is written."""

from xeco_convert.tokenizer.keeping import keep_tokenizer, prepared_companions
from xeco_convert.tokenizer.loading import TokenizerFiles, load_tokenizer
from xeco_convert.tokenizer.probes import first_difference

__all__ = ["TokenizerFiles", "first_difference", "keep_tokenizer", "load_tokenizer", "prepared_companions"]
