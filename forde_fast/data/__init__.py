"""Image sets, their corruptions, and batches of them on the device."""

from forde_fast.data.cifar import CorruptedFiles
from forde_fast.data.corruptions import CORRUPTIONS, corrupt
from forde_fast.data.datasets import DATASETS, Images, Normalisation, load
from forde_fast.data.loader import Loader
from forde_fast.data.own import stratified

__all__ = [
    "CORRUPTIONS",
    "DATASETS",
    "CorruptedFiles",
    "Images",
    "Loader",
    "Normalisation",
    "corrupt",
    "load",
    "stratified",
]
