"""The zoo: a tiny base and four experts that are trained on the spot, with their lm-eval tasks.

It is the demo's and the tests' input: real training, real interference, nothing downloaded.
`evomerge.zoo.build.build_zoo` makes it; nothing here knows of studies, recipes of merges or
scores.
"""
