"""Training rows: documents of any source, or samples of the teacher, packed to one length on disk."""

from xeco_distill.data.documents import Document, read_documents
from xeco_distill.data.packing import Segments, pack
from xeco_distill.data.rows import PackedRows, RowWriter

__all__ = ["Document", "PackedRows", "RowWriter", "Segments", "pack", "read_documents"]
