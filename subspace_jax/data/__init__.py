"""Real data from ordinary packages, a user's own rows and images, and any prepared tfds dataset, as arrays."""

from ._anomaly_folder import AnomalyFolder as AnomalyFolder
from ._anomaly_folder import anomaly_categories as anomaly_categories
from ._anomaly_folder import is_anomaly_folder as is_anomaly_folder
from ._anomaly_folder import load_anomaly_folder as load_anomaly_folder
from ._errors import DataError as DataError
from ._forms import check_form as check_form
from ._forms import find_form as find_form
from ._forms import unused_columns as unused_columns
from ._image_folder import ImageFolder as ImageFolder
from ._image_folder import load_image_folder as load_image_folder
from ._image_folder import read_image as read_image
from ._image_folder import unreadable as unreadable
from ._image_task import ImageSplit as ImageSplit
from ._image_task import ImageTask as ImageTask
from ._image_task import load_image_task as load_image_task
from ._languages import messages_by_application as messages_by_application
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
from ._textures import TextureTask as TextureTask
from ._textures import load_texture_task as load_texture_task
from ._textures import textures as textures

__all__ = [
    "AnomalyFolder",
    "DataError",
    "ImageFolder",
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
    "TextureTask",
    "anomaly_categories",
    "check_classes",
    "check_form",
    "find_form",
    "image_tasks",
    "is_anomaly_folder",
    "load_anomaly_folder",
    "load_image_folder",
    "load_image_task",
    "load_operator_task",
    "load_pair_task",
    "load_text_task",
    "load_texture_task",
    "messages_by_application",
    "operator_tasks",
    "pair_tasks",
    "prepare",
    "read_image",
    "read_rows",
    "split_rows",
    "text_tasks",
    "textures",
    "tokenize",
    "unreadable",
    "unused_columns",
]
