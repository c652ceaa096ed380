"""Ray entry points: the only code that imports ray. Thin: a worker's job is `evomerge.service.worker`."""
