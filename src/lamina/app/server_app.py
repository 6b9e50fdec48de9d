"""The server's side of lamina as a Flower app: `lamina run` with devices on a grid."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lamina.deployed import play

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run that the run config names."""
    play(grid, context.run_config)
