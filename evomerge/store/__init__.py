"""The store: every study, trial and attempt, kept so that nothing finished is ever lost."""
