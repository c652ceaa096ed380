"""Two networks in one: what of them stays apart, and what that costs."""
