"""Images in: what is on disk becomes an ImageData, a Loader turns it into batches.

Read in this order: images.py (the types), source.py (which format a path holds), augment.py, loader.py.
"""

from fpdarts.data.augment import Augmentation, augmentation
from fpdarts.data.images import DataError, ImageData, Images
from fpdarts.data.loader import Loader
from fpdarts.data.source import open_data

__all__ = ["Augmentation", "DataError", "ImageData", "Images", "Loader", "augmentation", "open_data"]
