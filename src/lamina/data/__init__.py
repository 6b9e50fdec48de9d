"""Tasks: who has which data, and what is asked of the network."""

from lamina.data.digits import Digits
from lamina.data.images import Images
from lamina.data.shakespeare import Shakespeare
from lamina.data.streams import Text
from lamina.data.texts import TextClassification

TASKS = {
    "shakespeare": Shakespeare,
    "text": Text,
    "text-classification": TextClassification,
    "images": Images,
    "digits": Digits,
}
