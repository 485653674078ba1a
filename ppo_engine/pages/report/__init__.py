"""`report.html`, a run to look at: its curves, its settings, what it wrote token by token, and what
looks wrong. One file, which opens from disk."""
