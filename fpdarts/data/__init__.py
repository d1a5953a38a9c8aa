"""Images in: what is on disk becomes an ImageData, a Loader turns it into batches.

Read in this order: images.py (the types), source.py (which format a path holds), augment.py, loader.py, and then what
reads for it: resident.py (with cache.py), dali.py or workers.py. folder.py is below all of them: the files of an image
folder, found, looked into and decoded, on all cores.
"""

from fpdarts.data.augment import Augmentation, augmentation
from fpdarts.data.images import ImageData, Images
from fpdarts.data.loader import Loader, select_reader
from fpdarts.data.resident import in_memory
from fpdarts.data.source import open_data
from fpdarts.data.split import read_split, write_split
from fpdarts.errors import DataError

__all__ = [
    "Augmentation",
    "DataError",
    "ImageData",
    "Images",
    "Loader",
    "augmentation",
    "in_memory",
    "open_data",
    "read_split",
    "select_reader",
    "write_split",
]
