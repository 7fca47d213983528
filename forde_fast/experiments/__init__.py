"""The paper's tables and experiments, each by one command."""
