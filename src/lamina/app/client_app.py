"""The device's side of lamina as a Flower app: `lamina.node` behind Flower's messages."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lamina.deployed import answer, hello

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this device is, what it can spare and what it has."""
    return hello(message, context.node_config)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take a job and answer it."""
    return answer(message, context.node_config)
