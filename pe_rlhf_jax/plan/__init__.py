"""Memory, FLOPs and traffic of a run before anything is allocated: its very programs, compiled ahead of time for any topology."""
