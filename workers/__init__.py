"""Ray entry points, the only code that imports ray. The work is `evomerge.service.worker`."""
