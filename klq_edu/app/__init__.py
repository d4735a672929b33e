"""The command line and what only it needs; `commands` lists what there is, and imports each only when it runs."""
