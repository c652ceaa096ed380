"""Ray entry points: the only code that imports ray. The work itself is `evomerge.service.worker`."""
