"""`python -m cmae.train` is the command `cmae`, for launchers that start modules (torchrun -m)."""

from cmae.train.commands.main import main

raise SystemExit(main())
