"""Pages on this machine, in a browser: people rank, people look."""
