"""`python -m attnlrp_fx`, as `torchrun -m attnlrp_fx` starts it: the command line."""

from attnlrp_fx.cli import app

if __name__ == "__main__":
    app()
