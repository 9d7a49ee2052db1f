"""Runtime: caches, scheduler, engine, HTTP front."""
