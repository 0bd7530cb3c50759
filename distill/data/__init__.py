"""Training rows: documents of any source, or samples of the teacher, packed to one length on disk."""

from xeco_convert.calibration.records import Document

from ..data.documents import read_documents
from ..data.packing import Segments, pack
from ..data.rows import PackedRows, RowWriter

__all__ = ["Document", "PackedRows", "RowWriter", "Segments", "pack", "read_documents"]
