"""``python -m privfed``."""

from .cli import main

main()
