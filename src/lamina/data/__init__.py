"""Tasks: who has which data, and what is asked of the network."""

from lamina.data.shakespeare import Shakespeare

TASKS = {"shakespeare": Shakespeare}
