"""Tasks: who has which data, and what is asked of the network."""

from lamina.data.digits import Digits
from lamina.data.images import Images
from lamina.data.noise import Noise
from lamina.data.shakespeare import Shakespeare
from lamina.data.streams import Text
from lamina.data.task import TaskTable
from lamina.data.texts import TextClassification

TASKS: dict[str, type[TaskTable]] = {
    "shakespeare": Shakespeare,
    "text": Text,
    "text-classification": TextClassification,
    "images": Images,
    "digits": Digits,
    "noise": Noise,
}
