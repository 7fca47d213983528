"""Image sets, their corruptions, and batches of them on the device."""

from forde_fast.data.corrupted import CorruptedFiles, open_corrupted, write_corrupted
from forde_fast.data.corruptions import CORRUPTIONS, corrupt
from forde_fast.data.datasets import DATASETS, Images, Normalisation, load
from forde_fast.data.loader import Loader
from forde_fast.data.own import read_unlabelled, stratified
from forde_fast.data.unknown import UNKNOWN, load_unknown

__all__ = [
    "CORRUPTIONS",
    "DATASETS",
    "UNKNOWN",
    "CorruptedFiles",
    "Images",
    "Loader",
    "Normalisation",
    "corrupt",
    "load",
    "load_unknown",
    "open_corrupted",
    "read_unlabelled",
    "stratified",
    "write_corrupted",
]
