"""Files of a checkpoint: which there are, reading tensors lazily, writing shards. Knows no model."""

from xeco_convert.checkpoint.dtypes import DTYPE_BYTES
from xeco_convert.checkpoint.index import CheckpointIndex, TensorHeader
from xeco_convert.checkpoint.reader import TensorReader
from xeco_convert.checkpoint.writer import CheckpointWriter

__all__ = ["DTYPE_BYTES", "CheckpointIndex", "CheckpointWriter", "TensorHeader", "TensorReader"]
