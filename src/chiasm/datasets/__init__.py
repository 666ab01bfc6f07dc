"""Data sets as they lie on disk, read into tables of samples."""

from chiasm.datasets.columns import Columns
from chiasm.datasets.corpus import ReportCorpus
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.folder import load_folder
from chiasm.datasets.images import open_sample_image
from chiasm.datasets.reports import read_reports
from chiasm.datasets.sources import open_dataset
from chiasm.datasets.table import load_table
from chiasm.datasets.webdataset import load_webdataset

__all__ = [
    "Columns",
    "Dataset",
    "ReportCorpus",
    "load_folder",
    "load_table",
    "load_webdataset",
    "open_dataset",
    "open_sample_image",
    "read_reports",
]
