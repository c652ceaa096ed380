"""The search space: which parameters of a merge are searched, how a genome becomes a recipe.

A space is a product of a few factors for each searched parameter; a gene is one number of one
factor. Knows nothing of samplers, checkpoints or studies, and imports no torch.
"""

from evomerge.space.check import check_space
from evomerge.space.factor import Gene
from evomerge.space.load import load_space, shipped_spaces
from evomerge.space.show import show
from evomerge.space.space import Space

__all__ = ["Gene", "Space", "check_space", "load_space", "shipped_spaces", "show"]
