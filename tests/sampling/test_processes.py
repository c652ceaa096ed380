"""A search is the same in another process, with other string hashes and more threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEARCH = """
import hashlib, sys
from evomerge.sampling import make_sampler
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import go_on, sphere
name, genes, trials = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sampler = make_sampler(
    SamplerSpec(name=name, seed=3),
    genes=genes,
    init=[0.3] * genes,
    objectives=1,
    gene_names=[f"weight.scale[{i}]" for i in range(genes)],
)
results = go_on(sampler, range(trials), sphere)
print(hashlib.sha256(repr([result.genome for result in results]).encode()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "genes", "trials"),
    [("random", 5, 30), ("cmaes", 90, 170), ("tpe", 20, 40), ("nsga2", 20, 70), ("gp", 20, 20)],
)
def test_hashes_and_threads_change_no_bit(name, genes, trials):
    digests = set()
    for hash_seed, threads in (("1", "1"), ("2", "2")):
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(variables, threads)}
        done = subprocess.run(
            [sys.executable, "-c", SEARCH, name, str(genes), str(trials)],
            env=environment | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
