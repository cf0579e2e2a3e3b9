"""Tokenizing, packing, and the order in which data are read; nothing of Lightning in it."""

from lightning_bharat.data.budget import TokenBatches
from lightning_bharat.data.documents import TokenDocuments
from lightning_bharat.data.errors import DataError
from lightning_bharat.data.files import FileBatches
from lightning_bharat.data.lengths import LengthBatches
from lightning_bharat.data.loader import OrderedLoader
from lightning_bharat.data.order import GlobalOrder, OrderedBatches, Steps
from lightning_bharat.data.pack import prepare
from lightning_bharat.data.prepared import Prepared
from lightning_bharat.data.windows import IGNORED, TokenStream, TokenWindows

__all__ = [
    "IGNORED",
    "DataError",
    "FileBatches",
    "GlobalOrder",
    "LengthBatches",
    "OrderedBatches",
    "OrderedLoader",
    "Prepared",
    "Steps",
    "TokenBatches",
    "TokenDocuments",
    "TokenStream",
    "TokenWindows",
    "prepare",
]
