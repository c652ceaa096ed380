"""Which units the architectures of transformers have, and the fit that matches them."""
