"""Real data from ordinary packages, and any prepared tfds dataset, as arrays in memory."""

from ._errors import DataError as DataError
from ._forms import check_form as check_form
from ._forms import find_form as find_form
from ._forms import unused_columns as unused_columns
from ._image_files import list_images as list_images
from ._image_files import read_image as read_image
from ._image_files import square_image as square_image
from ._image_task import ImageSplit as ImageSplit
from ._image_task import ImageTask as ImageTask
from ._image_task import load_image_task as load_image_task
from ._operator_task import OperatorSplit as OperatorSplit
from ._operator_task import OperatorTask as OperatorTask
from ._operator_task import load_operator_task as load_operator_task
from ._pair_task import PairSplit as PairSplit
from ._pair_task import PairTask as PairTask
from ._pair_task import load_pair_task as load_pair_task
from ._prepare import prepare as prepare
from ._rows import Rows as Rows
from ._rows import read_rows as read_rows
from ._sources import image_tasks as image_tasks
from ._sources import operator_tasks as operator_tasks
from ._sources import pair_tasks as pair_tasks
from ._sources import text_tasks as text_tasks
from ._split import Split as Split
from ._split import check_classes as check_classes
from ._split import split_rows as split_rows
from ._text_task import TextSplit as TextSplit
from ._text_task import TextTask as TextTask
from ._text_task import load_text_task as load_text_task
from ._text_task import tokenize as tokenize

__all__ = [
    "DataError",
    "ImageSplit",
    "ImageTask",
    "OperatorSplit",
    "OperatorTask",
    "PairSplit",
    "PairTask",
    "Rows",
    "Split",
    "TextSplit",
    "TextTask",
    "check_classes",
    "check_form",
    "find_form",
    "image_tasks",
    "list_images",
    "load_image_task",
    "load_operator_task",
    "load_pair_task",
    "load_text_task",
    "operator_tasks",
    "pair_tasks",
    "prepare",
    "read_image",
    "read_rows",
    "split_rows",
    "square_image",
    "text_tasks",
    "tokenize",
    "unused_columns",
]
